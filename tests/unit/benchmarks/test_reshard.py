"""The figures of the re-sharding benchmark, from made-up streams."""

from __future__ import annotations

from pathlib import Path

import msgspec

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import Digest, Placement
from pyagent_node.benchmarks.reshard import ReshardReport, Stream, _figures
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.home import Home

ANSWER = Answer(
    text="",
    token_ids=(1, 2, 3),
    finish_reason="length",
    prompt_tokens=1,
    completion_tokens=3,
    seed=0,
    ttft_seconds=0.1,
    seconds=1.0,
    tokens_per_second=3.0,
    placement=Placement(Digest("0" * 64), 1, (), n_ctx=64, n_seq=1),
    recomputed_tokens=64,
)


def stream(*times: float) -> Stream:
    made = Stream(Home(Path("nowhere")), Ask(model="m", seed=1))
    made.times = list(times)
    made.answer = ANSWER
    return made


def report(streams: list[Stream], expected: list[Answer]) -> ReshardReport:
    events = [("joins", False, 0.5, 1.5), ("moves", True, 2.0, 6.0), ("drains", True, 6.5, 7.5)]
    fields = _figures(streams, expected, events, 1000)
    plain = {"bench": "reshard", "time": 1.0, "machine": {}, "model": "m", "tokens": 3}
    return msgspec.convert({**plain, **fields}, ReshardReport)


def test_a_stall_is_the_longest_pause_that_touches_a_switch() -> None:
    a = stream(0.0, 1.0, 1.9, 2.1, 4.1, 5.0, 6.0, 7.0, 8.0)
    b = stream(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.5, 8.0)
    made = report([a, b], [ANSWER, ANSWER])
    assert [event.stalls_ms for event in made.events] == [(1000, 1000), (2000, 1000), (1000, 1000)]
    assert (made.stall_ms_p50, made.stall_ms_p99) == (1000, 2000)
    assert (made.identical, made.failed, made.switches) == (True, 0, 2)
    assert (made.recomputed_tokens, made.recomputed_a_switch, made.bytes_moved) == (128, 32, 1000)


def test_failures_and_other_tokens_show() -> None:
    a, b = stream(0.0, 1.0, 8.0), stream(0.0, 1.0, 8.0)
    b.answer, b.error = None, Unavailable("gone", code="peer_lost")
    made = report([a, b], [ANSWER, ANSWER])
    assert (made.failed, made.identical, made.errors) == (1, False, ("gone",))
    other = msgspec.structs.replace(ANSWER, token_ids=(1, 2, 4))
    assert not report([a, stream(0.0, 8.0)], [ANSWER, other]).identical
