"""What was applied: the replica, its recent past, and readers who wait for more.

For a window behind the replica it keeps each entry's hash chain and what became of its command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.replica import Replica
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.consensus.state import State

WINDOW = 4096
"""Applied entries that a subscriber may fall behind."""


class Kept(msgspec.Struct, frozen=True):
    """An entry in memory with the hash chain after it."""

    entry: LogEntry
    chain: bytes


class History:
    """A replica that moves on entry by entry, or jumps to a snapshot.  One task moves it."""

    def __init__(self) -> None:
        self._replica = Replica()
        self._kept: deque[Kept] = deque(maxlen=WINDOW)
        self._applied: deque[Applied] = deque(maxlen=WINDOW)
        self._base = (0, self._replica.chain)
        self._forgotten = 0
        self._changed = trio.Event()

    @property
    def replica(self) -> Replica:
        """What is applied."""
        return self._replica

    @property
    def state(self) -> State:
        """The state as applied on this node."""
        return self._replica.state

    @property
    def index(self) -> int:
        """Index of the last applied entry."""
        return self._replica.state.index

    def reset(self, replica: Replica) -> None:
        """Go on from ``replica``, of whose past nothing is known."""
        self._replica = replica
        self._base = (replica.state.index, replica.chain)
        self._forgotten = replica.state.index
        self._kept.clear()
        self._applied.clear()
        self.wake()

    def keep(self, entry: LogEntry, applied: Applied | None, chain: bytes) -> None:
        """Remember an entry that the replica has passed, with its result if it has one.

        Readers hear of it at the next :meth:`wake`.
        """
        if len(self._kept) == WINDOW:
            oldest = self._kept[0]
            self._base = (oldest.entry.index, oldest.chain)
        self._kept.append(Kept(entry, chain))
        if applied is not None:
            if len(self._applied) == WINDOW:
                self._forgotten = self._applied[0].index
            self._applied.append(applied)

    def wake(self) -> None:
        """Let waiting readers look again."""
        self._changed.set()
        self._changed = trio.Event()

    def chain_at(self, index: int) -> bytes | None:
        """Return the hash chain after entry ``index``, or ``None`` if it is not kept."""
        base, chain = self._base
        if index == base:
            return chain
        place = index - base - 1
        return self._kept[place].chain if 0 <= place < len(self._kept) else None

    async def wait_for(self, index: int) -> None:
        """Wait until entry ``index`` is applied."""
        while self.index < index:
            await self._changed.wait()

    @asynccontextmanager
    async def applied(self, after: int) -> AsyncIterator[AppliedEntries]:
        """See ``Consensus.applied``."""
        await trio.lowlevel.checkpoint()
        yield AppliedEntries(self, after)

    async def next_applied(self, after: int) -> Applied:
        """Return the next applied entry after ``after``, waiting for it.

        Raises :class:`LimitExceeded` (``lagging``) when it is not kept any more.
        """
        while True:
            if after < self._forgotten:
                raise LimitExceeded(
                    f"What followed on entry {after} of the log is not kept any more (the oldest"
                    f" is {self._forgotten + 1}).",
                    code="lagging",
                    remedy="Read the state anew and follow from its index.",
                )
            if self._applied and self._applied[-1].index > after:
                return self._applied[self._place_after(after)]
            await self._changed.wait()

    def _place_after(self, index: int) -> int:
        """Return the place of the first kept result with an index above ``index``."""
        low, high = 0, len(self._applied) - 1
        while low < high:
            middle = (low + high) // 2
            if self._applied[middle].index > index:
                high = middle
            else:
                low = middle + 1
        return low


class AppliedEntries:
    """Iterates over applied entries, in order, each once; implements ``AppliedStream``."""

    def __init__(self, history: History, after: int) -> None:
        self._history = history
        self._after = after

    def __aiter__(self) -> AppliedEntries:
        return self

    async def __anext__(self) -> Applied:
        applied = await self._history.next_applied(self._after)
        self._after = applied.index
        await trio.lowlevel.checkpoint()
        return applied
