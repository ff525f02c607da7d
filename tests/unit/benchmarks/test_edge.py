"""The edge-cloud benchmark's sums, and the relay that makes its path slow."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import Digest, Placement
from pyagent_node.benchmarks.edge import (
    EDGE,
    PROMPTS,
    SERVER,
    Counters,
    Heard,
    Turn,
    stage_counters,
    summarise,
)
from pyagent_node.benchmarks.relay import delaying_relay
from pyagent_node.inference.generation import SpeculationUsage
from pyagent_node.node.answers import Answer

METRICS = """\
# HELP pyagent_stage_tokens_total Tokens computed by a stage.
pyagent_stage_tokens_total{model="m",rank="0"} 120.0
pyagent_stage_batches_total{model="m",rank="0"} 40.0
pyagent_stage_busy_seconds_total{model="m",rank="0"} 1.5
"""


def test_counters_are_read_from_the_metrics_of_the_only_stage() -> None:
    assert stage_counters(METRICS) == Counters(1.5, 120.0, 40.0)


@pytest.mark.parametrize("text", ["", METRICS + METRICS])
def test_without_exactly_one_stage_there_are_no_figures(text: str) -> None:
    with pytest.raises(CorruptData) as caught:
        stage_counters(text)
    assert caught.value.code == "bad_metrics"


def heard(
    tokens: tuple[int, ...], stamps: tuple[float, ...], usage: SpeculationUsage | None = None
) -> Heard:
    answer = Answer(
        text="",
        token_ids=tokens,
        finish_reason="length",
        prompt_tokens=5,
        completion_tokens=len(tokens),
        seed=0,
        ttft_seconds=0.1,
        seconds=1.0,
        tokens_per_second=1.0,
        placement=Placement(model=Digest("a" * 64), epoch=1, ranks=(), n_ctx=64, n_seq=1),
        speculation=usage,
    )
    return Heard(answer, stamps)


def test_the_prompts_share_is_taken_off() -> None:
    usage = SpeculationUsage(
        drafter="suffix",
        passes=2,
        drafted=4,
        accepted=2,
        cancelled=0,
        failed=False,
        length=2,
        depth=1,
        predicted_tokens_per_second=1.0,
        predicted_plain_tokens_per_second=1.0,
    )
    turns = {
        PROMPTS: [Turn((heard((1,), (1.0,)),), Counters(0.5, 50.0, 1.0))],
        SERVER: [Turn((heard((1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),), Counters(2.5, 54.0, 5.0))],
        EDGE: [Turn((heard((1, 2, 3, 4, 6), (1, 2, 2, 3, 3)),), Counters(1.5, 56.0, 3.0))],
    }
    turns[EDGE][0] = Turn((heard((1, 2, 3, 4, 6), (1, 2, 2, 3, 3), usage),), turns[EDGE][0].counted)
    server, edge = (summarise(1, arm, turns) for arm in (SERVER, EDGE))
    assert (server.tokens_per_second, edge.tokens_per_second) == (1.0, 2.0)
    assert (server.server_busy_ms_per_token, edge.server_busy_ms_per_token) == (500.0, 250.0)
    assert (server.tokens_per_pass, edge.tokens_per_pass) == (1.0, 2.0)
    assert (edge.rows_per_token, edge.tokens_per_batch, edge.acceptance) == (1.5, 3.0, 0.5)
    assert (edge.inter_token_ms_p50, edge.inter_token_ms_p99) == (0.0, 1000.0)
    assert (server.identical, edge.identical) == (True, False)


async def test_the_relay_holds_back_what_passes_through_either_way(
    autojump_clock: MockClock,
) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    autojump_clock.autojump_threshold = 0.05
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, listeners)
        port = listeners[0].socket.getsockname()[1]
        async with (
            delaying_relay(port, 3.0) as relayed,
            await trio.open_tcp_stream("127.0.0.1", relayed) as stream,
        ):
            began = trio.current_time()
            for data in (b"one", b"two"):
                await stream.send_all(data)
                assert await stream.receive_some(10) == data
            assert 12.0 <= trio.current_time() - began < 13.0
            await stream.send_eof()
            assert await stream.receive_some(10) == b""
        nursery.cancel_scope.cancel()


async def test_the_relay_survives_a_client_that_goes_away() -> None:
    async with delaying_relay(9, 0.0) as relayed:
        for _ in range(2):
            stream = await trio.open_tcp_stream("127.0.0.1", relayed)
            await stream.aclose()
