"""Counts what simulated nodes send: messages and bytes, by purpose and by phase of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import PREFIX, Frame
from pyagent_node.consensus.raft_messages import PROTOCOL as RAFT_PROTOCOL
from pyagent_node.inference.pipeline.frames import PIPE_PROTOCOL
from pyagent_node.node.journal_messages import PROTOCOL as JOURNAL_PROTOCOL
from pyagent_node.node.rpc import PROTOCOL as RPC_PROTOCOL

PURPOSES: Final = ("raft", "hello", "presence", "facts", "journals", "pipe", "other")
"""``raft``: the log; ``hello``: who is who, between Raft nodes; ``presence``: signs of life and
reports on placements, which are the failure detector's beats; ``facts``: what nodes could take."""

_BY_PROTOCOL: Final[Mapping[str, str]] = {
    RAFT_PROTOCOL: "raft",
    JOURNAL_PROTOCOL: "journals",
    PIPE_PROTOCOL: "pipe",
}
_BY_TAG: Final[Mapping[str, str]] = {
    "are_you_there": "presence",
    "here": "presence",
    "try_peer": "presence",
    "tried": "presence",
    "ask_placements": "presence",
    "placement_reports": "presence",
    "ask_facts": "facts",
    "facts": "facts",
    "fetch_journal": "journals",
    "journal_copy": "journals",
}


class _Tag(msgspec.Struct):
    type: str = ""


class _Envelope(msgspec.Struct):
    body: _Tag = msgspec.field(default_factory=_Tag)


_tag: Final = msgspec.msgpack.Decoder(_Tag)
_envelope: Final = msgspec.msgpack.Decoder(_Envelope)


def purpose_of(protocol: str, frame: Frame) -> str:
    """Return what a frame is for, one of :data:`PURPOSES`."""
    try:
        if protocol == RPC_PROTOCOL:
            return _BY_TAG.get(_envelope.decode(frame.header).body.type, "other")
        if protocol == RAFT_PROTOCOL and _tag.decode(frame.header).type == "hello":
            return "hello"
    except msgspec.DecodeError:  # a malicious member
        return "other"
    return _BY_PROTOCOL.get(protocol, "other")


class Sent(NamedTuple):
    """Messages and bytes (frames with their prefixes, before any encryption)."""

    messages: float
    bytes: float


class Period(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent in one phase of a run, a virtual second.

    ``mean`` is over all nodes, by purpose; ``most`` is the busiest node's, sent and received.
    """

    phase: str
    seconds: float
    mean: dict[str, Sent]
    total: Sent
    most: Sent


class Meter:
    """Counts frames as they are sent; ``clock`` gives virtual seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._phase = ""
        self._since = 0.0
        self._periods: list[Period] = []
        self._messages: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._node_messages: Counter[PeerId] = Counter()
        self._node_bytes: Counter[PeerId] = Counter()

    def frame(self, sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> None:
        """Count one frame; what a node sends to itself never meets a network."""
        if sender == receiver:
            return
        purpose = purpose_of(protocol, frame)
        size = PREFIX.size + len(frame.header) + memoryview(frame.tail).nbytes
        self._messages[purpose] += 1
        self._bytes[purpose] += size
        for node in (sender, receiver):
            self._node_messages[node] += 1
            self._node_bytes[node] += size

    def begin(self, phase: str, nodes: int) -> None:
        """End the phase before, in which there were ``nodes``, and begin another one."""
        self._end(nodes)
        self._phase, self._since = phase, self._clock()

    def periods(self, nodes: int) -> tuple[Period, ...]:
        """Return what was counted in each phase; the last one ends now."""
        self.begin("", nodes)
        return tuple(self._periods)

    def _end(self, nodes: int) -> None:
        seconds = self._clock() - self._since
        if self._phase and seconds > 0:
            share = seconds * nodes
            self._periods.append(
                Period(
                    phase=self._phase,
                    seconds=seconds,
                    mean={
                        p: Sent(self._messages[p] / share, self._bytes[p] / share) for p in PURPOSES
                    },
                    total=Sent(self._messages.total() / share, self._bytes.total() / share),
                    most=Sent(
                        max(self._node_messages.values(), default=0) / seconds,
                        max(self._node_bytes.values(), default=0) / seconds,
                    ),
                )
            )
        for counted in (self._messages, self._bytes):
            counted.clear()
        for by_node in (self._node_messages, self._node_bytes):
            by_node.clear()
