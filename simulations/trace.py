"""What happened in a simulated run, in order, with a digest over all of it.

Two runs of one seed are the same run if and only if their digests are equal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, NamedTuple

from pyagent_node.base.types import PeerId
from pyagent_node.native import Blake3

KEPT: Final = 20_000
"""Events that are kept for the story of a failure; the digest covers them all."""

HERE: Final[ContextVar[PeerId | None]] = ContextVar("HERE", default=None)
"""The node whose code runs now, as far as it is known."""


class Event(NamedTuple):
    """One thing that happened: when (virtual seconds), to whom, and what."""

    time: float
    node: int | None
    kind: str
    detail: str

    def __str__(self) -> str:
        who = "swarm" if self.node is None else f"node {self.node}"
        return f"{self.time:10.3f} s  {who:8}  {self.kind:12}  {self.detail}"


class Trace:
    """Records events; ``clock`` gives virtual seconds since the beginning."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.count = 0
        self.events: deque[Event] = deque(maxlen=KEPT)
        self._clock = clock
        self._digest = Blake3()

    def add(self, node: int | None, kind: str, detail: str = "") -> None:
        """Record that ``kind`` happened to ``node`` (``None``: to the swarm) now."""
        event = Event(round(self._clock(), 6), node, kind, detail)
        self.count += 1
        self.events.append(event)
        self._digest.update(f"{event.time:.6f}|{node}|{kind}|{detail}\n".encode())

    @property
    def digest(self) -> str:
        """Hexadecimal digest over every event so far."""
        return self._digest.hexdigest()
