"""The re-sharding benchmark: layers move between real daemons while answers are being made.

Three daemons on loopback hold a model, four clients stream answers.  Meanwhile a fourth daemon
joins, the boundaries between the ranks move three times (onto the new node and back), and a node is
drained.  No stream may fail, and each must have the tokens of an undisturbed answer with its seed.
What a user sees of a change is the longest pause between two tokens while it was carried out: the
stall.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.benchmarks.swarm import (
    START_SECONDS,
    LocalNode,
    await_up,
    begin_join,
    finish_join,
    local_swarm,
    start_process,
    stop_all,
    uninterrupted,
)
from pyagent_node.inference.generation import NO_SPECULATION, ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.placement_schema import DrainRequest
from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest
from pyagent_node.node.client import Client
from pyagent_node.node.home import Home

Say = Callable[[str], None]

STREAMS: Final = 4
NODES: Final = 3
"""At the beginning; one more joins."""
BEGUN: Final = 24
"""Tokens of every stream that have come before anything changes."""
AGAIN: Final = 16
"""Tokens of every stream that have come after a change before the next one begins."""
STREAM_SECONDS: Final = 600.0
"""Longest wait for the streams to begin, or to end."""
N_CTX: Final = 2048
CUT: Final = (10, 20)
MOVES: Final = (
    ("boundaries, onto the new node", (8, 19), (0, 1, 3)),
    ("boundaries, one slice stays", (12, 19), (0, 1, 3)),
    ("boundaries, off the new node", (9, 21), (0, 1, 2)),
)
"""What it is called, the cut, and the nodes of the ranks."""
DRAINED: Final = 1
_MOVED = re.compile(
    r'^pyagent_kv_(?:stream|fetched)_bytes(?:_total)?\{direction="out"\} ([0-9.e+]+)$', re.MULTILINE
)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened while the streams ran.

    ``stalls_ms`` is each stream's longest pause between two tokens from its beginning until the
    stream flows again after it; ``plain_ms`` the median pause of all streams then.  ``switches``
    says whether layers changed hands: a node that joins gets none by that.
    """

    what: str
    switches: bool
    seconds: float
    stalls_ms: tuple[float, ...]
    plain_ms: float


class ReshardReport(msgspec.Struct, frozen=True, kw_only=True):
    """The whole benchmark, as it is printed and stored.

    ``stall_ms_p50`` and ``stall_ms_p99`` are over all streams and all events that switch.
    ``recomputed_tokens`` is the sum over the streams, ``recomputed_a_switch`` the most that any
    stream computed again for one switch on average.  ``bytes_moved`` counts KV between nodes.
    """

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    tokens: int
    streams: int
    failed: int
    identical: bool
    stall_ms_p50: float
    stall_ms_p99: float
    recomputed_tokens: int
    recomputed_a_switch: float
    bytes_moved: int
    switches: int
    events: tuple[Event, ...]
    errors: tuple[str, ...] = ()


class Stream(threading.Thread):
    """One client's answer, with the time of every token."""

    def __init__(self, home: Home, ask: Ask) -> None:
        super().__init__(name=f"stream {ask.seed}", daemon=True)
        self._home = home
        self._ask = ask
        self.times: list[float] = []
        self.answer: Answer | None = None
        self.error: PyAgentError | None = None

    def run(self) -> None:
        """Read the answer to its end."""
        try:
            with Client.from_home(self._home) as client:
                for piece in client.generate(self._ask):
                    if isinstance(piece, Answer):
                        self.answer = piece
                    else:
                        self.times += [time.perf_counter()] * len(piece.token_ids)
        except PyAgentError as error:
            self.error = error

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.answer is not None or self.error is not None

    def pauses(self, start: float, end: float) -> list[float]:
        """Return the pauses between tokens that touch a time, as far as they have ended."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if after > start and before < end]


def measure(path: str, *, tokens: int, say: Say) -> dict[str, object]:
    """Run the whole of it; returns the fields of :class:`ReshardReport` that were measured.

    Raises :class:`DeadlineExceeded` (``streams_too_short``) when the answers had ended before all
    changes were made.
    """
    with local_swarm(NODES, say=say) as nodes, contextlib.ExitStack() as stack:
        model = _load(nodes, path)
        asks = [_ask(model, seed, tokens) for seed in range(1, STREAMS + 1)]
        # Under another salt: the streams must not find what these leave in the block stores.
        plain = [msgspec.structs.replace(ask, cache_salt="undisturbed") for ask in asks]
        expected = _together(nodes[0], plain)
        moved = -sum(_bytes_moved(node) for node in nodes)
        streams = [Stream(nodes[0].home, ask) for ask in asks]
        for stream in streams:
            stream.start()
        _until(partial(_flow, streams, [BEGUN] * STREAMS), "begin")
        events: list[tuple[str, bool, float, float]] = []

        def during(what: str, act: Callable[[], object], *, switches: bool = True) -> None:
            say(f"  {what} ...")
            start = time.perf_counter()
            act()
            seen = [len(stream.times) for stream in streams]
            flows = partial(_flow, streams, [count + AGAIN for count in seen])
            _until(flows, "go on")
            events.append((what, switches, start, time.perf_counter()))
            if any(stream.over for stream in streams):
                _raise_short(streams, what)

        during("a node joins", lambda: stack.enter_context(_joined(nodes)), switches=False)
        for what, cut, where in MOVES:
            request = _request(model, nodes, cut, where)
            during(what, partial(nodes[0].client.apply, request, _quiet))
        drain = DrainRequest(node=nodes[DRAINED].peer_id)
        during("a node is drained", lambda: nodes[0].client.drain(drain, _quiet))
        _until(lambda: all(stream.over for stream in streams), "end")
        moved += sum(_bytes_moved(node) for node in nodes)
    return _figures(streams, expected, events, moved)


def _load(nodes: list[LocalNode], path: str) -> str:
    client = nodes[0].client
    model = client.pull(PullRequest(source=f"file:{path}")).name
    client.load(_request(model, nodes, CUT, tuple(range(NODES))))
    return model


def _request(
    model: str, nodes: Sequence[LocalNode], cut: tuple[int, ...], where: Sequence[int]
) -> LoadRequest:
    return LoadRequest(
        model=model,
        layers=cut,
        nodes=tuple(nodes[at].peer_id for at in where),
        n_ctx=N_CTX,
        standbys=0,
        spares=0,
    )


def _ask(model: str, seed: int, tokens: int) -> Ask:
    return Ask(
        model=model,
        messages=(ChatMessage("user", f"Tell me {seed} stories about rivers."),),
        max_tokens=tokens,
        temperature=0.8,
        seed=seed,
        ignore_eos=True,
        speculation=NO_SPECULATION,
    )


def _together(node: LocalNode, asks: Sequence[Ask]) -> list[Answer]:
    """Return undisturbed answers."""
    streams = [Stream(node.home, ask) for ask in asks]
    for stream in streams:
        stream.start()
    _until(lambda: all(stream.over for stream in streams), "end undisturbed")
    for stream in streams:
        if stream.error is not None:
            raise stream.error
    return [stream.answer for stream in streams if stream.answer is not None]


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + STREAM_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"The streams did not {what} in time.", code="bench_stalled")
        time.sleep(0.05)


def _flow(streams: Sequence[Stream], tokens: Sequence[int]) -> bool:
    """Whether every stream has so many tokens, or is over."""
    return all(
        len(stream.times) >= count or stream.over
        for stream, count in zip(streams, tokens, strict=True)
    )


def _raise_short(streams: Sequence[Stream], what: str) -> None:
    for stream in streams:
        if stream.error is not None:
            raise stream.error
    raise DeadlineExceeded(
        f"The answers had ended before this was done: {what}.",
        code="streams_too_short",
        remedy="Ask for more --tokens.",
    )


@contextlib.contextmanager
def _joined(nodes: list[LocalNode]) -> Iterator[None]:
    """Let one more daemon join the mesh and wait until it is up."""
    first = nodes[0]
    name = f"node-{len(nodes)}"
    node = LocalNode(name, Home(Path(first.home.root).with_name(name)))
    deadline = time.monotonic() + START_SECONDS
    try:
        finish_join(node, begin_join(first, node), deadline)
        start_process(node)
        await_up(node, deadline)
        while node.peer_id not in {peer.peer_id for peer in first.client.peers().peers}:
            if time.monotonic() > deadline:
                raise DeadlineExceeded("The new node did not connect.", code="swarm_not_connected")
            time.sleep(0.05)
        nodes.append(node)
        yield
    finally:
        with uninterrupted():
            stop_all([node])


def _quiet(progress: Progress) -> None:
    """Take a progress report."""


def _bytes_moved(node: LocalNode) -> int:
    return int(sum(float(value) for value in _MOVED.findall(node.client.metrics())))


def _figures(
    streams: Sequence[Stream],
    expected: Sequence[Answer],
    events: Sequence[tuple[str, bool, float, float]],
    moved: int,
) -> dict[str, object]:
    told = []
    for what, switches, start, end in events:
        pauses = [stream.pauses(start, end) for stream in streams]
        told.append(
            Event(
                what=what,
                switches=switches,
                seconds=round(end - start, 3),
                stalls_ms=tuple(round(max(each, default=0.0) * 1000, 1) for each in pauses),
                plain_ms=round(statistics.median([p for each in pauses for p in each]) * 1000, 2),
            )
        )
    stalls = sorted(stall for event in told if event.switches for stall in event.stalls_ms)
    answers = [stream.answer for stream in streams]
    recomputed = [answer.recomputed_tokens if answer is not None else 0 for answer in answers]
    count = sum(event.switches for event in told)
    return {
        "streams": len(streams),
        "failed": sum(stream.error is not None for stream in streams),
        "identical": all(
            answer is not None and answer.token_ids == plain.token_ids
            for answer, plain in zip(answers, expected, strict=True)
        ),
        "stall_ms_p50": round(statistics.median(stalls), 1),
        "stall_ms_p99": stalls[min(len(stalls) - 1, int(0.99 * len(stalls)))],
        "recomputed_tokens": sum(recomputed),
        "recomputed_a_switch": round(max(recomputed) / count, 1),
        "bytes_moved": moved,
        "switches": count,
        "events": tuple(told),
        "errors": tuple(str(stream.error) for stream in streams if stream.error is not None),
    }
