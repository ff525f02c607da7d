"""A log store and a replica kept in step, with waiting readers.

The order of a commit is: try the entries on a copy of the replica, make them durable, swap the
copy in, wake who waits.  So nothing is visible before it is durable, and nothing is written that
cannot be applied.  One task at a time commits.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from pyagent_node.base.errors import CorruptData, LimitExceeded, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.replica import NO_CHAIN, Record, Replica, decode_replica
from pyagent_node.consensus.segments import LogEntry, Snapshot
from pyagent_node.consensus.state import State

log = logging.getLogger("pyagent_node.consensus")

TERM = 1
"""The engine "single" never changes its leader."""
WINDOW = 4096
"""Applied entries that a subscriber may fall behind."""
COMPACT_ENTRIES = 4096
COMPACT_BYTES = 16 * MIB


class _Kept(msgspec.Struct, frozen=True):
    """An entry in memory with the hash chain after it."""

    entry: LogEntry
    chain: bytes


class Journal:
    """The durable log of one node and what it adds up to."""

    def __init__(self, store: LogStore, *, compact_entries: int = COMPACT_ENTRIES) -> None:
        self._store = store
        self._compact_entries = compact_entries
        self._replica = Replica()
        self._kept: deque[_Kept] = deque(maxlen=WINDOW)
        self._applied: deque[Applied] = deque(maxlen=WINDOW)
        self._since_snapshot = 0
        self._bytes_since_snapshot = 0
        self._base = (0, NO_CHAIN)
        self._changed = trio.Event()

    async def open(self) -> None:
        """Load the store and apply what it holds.

        Raises :class:`CorruptData` or :class:`Unsupported` naming the remedy.
        """
        stored = await self._store.load()
        if stored.snapshot is not None:
            self._replica = decode_replica(stored.snapshot.data)
            if self._replica.state.index != stored.snapshot.index:
                raise CorruptData(
                    "The snapshot of the log is of another index than it says.",
                    code="bad_snapshot",
                )
            self._base = (stored.snapshot.index, self._replica.chain)
        for entry in stored.entries:
            _, applied = self._replica.apply(entry)
            self._keep(entry, applied, self._replica.chain)

    @property
    def replica(self) -> Replica:
        """What is durable and applied; copy it before trying anything on it."""
        return self._replica

    @property
    def state(self) -> State:
        """The state as applied on this node."""
        return self._replica.state

    @property
    def index(self) -> int:
        """Index of the last applied entry."""
        return self._replica.state.index

    async def commit(self, entries: Sequence[LogEntry]) -> list[tuple[Record, Applied]]:
        """Make ``entries`` durable and apply them; returns what became of each.

        Raises :class:`CorruptData` or :class:`Unsupported` for entries that do not follow or fit,
        :class:`Unavailable` when the disk fails; nothing has changed then.
        """
        draft = self._replica.copy()
        results: list[tuple[Record, Applied]] = []
        chains: list[bytes] = []
        for entry in entries:
            results.append(draft.apply(entry))
            chains.append(draft.chain)
        await self._store.append(entries)
        self._replica = draft
        for entry, (_, applied), chain in zip(entries, results, chains, strict=True):
            self._keep(entry, applied, chain)
        self._wake()
        await self._compact_if_due()
        return results

    async def install(self, index: int, data: bytes) -> None:
        """Replace everything by a snapshot from the leader; it must be ahead of this node."""
        replica = decode_replica(data)
        if replica.state.index != index or index <= self.index:
            raise CorruptData(
                f"The leader sent a snapshot of entry {replica.state.index}, which does not lead"
                f" on from {self.index}.",
                code="bad_snapshot",
            )
        await self._store.compact(Snapshot(index, TERM, data), ())
        self._replica = replica
        self._base = (index, replica.chain)
        self._kept.clear()
        self._applied.clear()
        self._since_snapshot = self._bytes_since_snapshot = 0
        self._wake()

    def _keep(self, entry: LogEntry, applied: Applied, chain: bytes) -> None:
        if len(self._kept) == WINDOW:
            oldest = self._kept[0]
            self._base = (oldest.entry.index, oldest.chain)
        self._kept.append(_Kept(entry, chain))
        self._applied.append(applied)
        self._since_snapshot += 1
        self._bytes_since_snapshot += len(entry.data)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _compact_if_due(self) -> None:
        if (
            self._since_snapshot < self._compact_entries
            and self._bytes_since_snapshot < COMPACT_BYTES
        ):
            return
        self._since_snapshot = self._bytes_since_snapshot = 0
        try:
            await self._store.compact(Snapshot(self.index, TERM, self._replica.encode()), ())
        except Unavailable as error:
            log.warning("the log could not be compacted, and will be later: %s", error)

    def chain_at(self, index: int) -> bytes | None:
        """Return the hash chain after entry ``index``, or ``None`` if it is not kept."""
        base, chain = self._base
        if index == base:
            return chain
        place = index - base - 1
        return self._kept[place].chain if 0 <= place < len(self._kept) else None

    def entries_after(self, index: int, count: int, max_bytes: int) -> list[LogEntry] | None:
        """Return the next entries after ``index``, at least one if there is any.

        ``None`` when they are not kept any more: the reader needs a snapshot.
        """
        base, _ = self._base
        if index < base:
            return None
        chosen: list[LogEntry] = []
        size = 0
        for place in range(index - base, min(len(self._kept), index - base + count)):
            entry = self._kept[place].entry
            size += len(entry.data)
            if chosen and size > max_bytes:
                break
            chosen.append(entry)
        return chosen

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
        """Return the applied entry that follows on ``after``, waiting for it.

        Raises :class:`LimitExceeded` (``lagging``) when it is not kept any more.
        """
        await self.wait_for(after + 1)
        first = self._applied[0].index if self._applied else self.index + 1
        if after + 1 < first:
            raise LimitExceeded(
                f"Entry {after + 1} of the log is not kept any more (the oldest is {first}).",
                code="lagging",
                remedy="Read the state anew and follow from its index.",
            )
        return self._applied[after + 1 - first]


class AppliedEntries:
    """Iterates over applied entries, in order, each once; implements ``AppliedStream``."""

    def __init__(self, journal: Journal, after: int) -> None:
        self._journal = journal
        self._after = after

    def __aiter__(self) -> AppliedEntries:
        return self

    async def __anext__(self) -> Applied:
        applied = await self._journal.next_applied(self._after)
        self._after = applied.index
        await trio.lowlevel.checkpoint()
        return applied
