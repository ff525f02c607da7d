"""A log store and a replica kept in step, with waiting readers.

The order of a commit is: try the entries on a copy of the replica, make them durable, swap the
copy in, wake who waits.  So nothing is visible before it is durable, and nothing is written that
cannot be applied.  One task at a time commits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.consensus.history import History
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.replica import Record, decode_replica
from pyagent_node.consensus.segments import LogEntry, Snapshot

log = logging.getLogger("pyagent_node.consensus")

TERM = 1
"""The engine "single" never changes its leader."""
COMPACT_ENTRIES = 4096
COMPACT_BYTES = 16 * MIB


class Journal(History):
    """The durable log of one node and what it adds up to."""

    def __init__(self, store: LogStore, *, compact_entries: int = COMPACT_ENTRIES) -> None:
        super().__init__()
        self._store = store
        self._compact_entries = compact_entries
        self._since_snapshot = 0
        self._bytes_since_snapshot = 0
        self._writing = trio.Lock()

    async def open(self) -> None:
        """Load the store and apply what it holds.

        Raises :class:`CorruptData` or :class:`Unsupported` naming the remedy.
        """
        stored = await self._store.load()
        if stored.snapshot is not None:
            replica = decode_replica(stored.snapshot.data)
            if replica.state.index != stored.snapshot.index:
                raise CorruptData(
                    "The snapshot of the log is of another index than it says.",
                    code="bad_snapshot",
                )
            self.reset(replica)
        for entry in stored.entries:
            _, applied = self._replica.apply(entry)
            self.keep(entry, applied, self._replica.chain)

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
        async with self._writing:
            await self._store.append(entries)
            self._replica = draft
            for entry, (_, applied), chain in zip(entries, results, chains, strict=True):
                self.keep(entry, applied, chain)
            self.wake()
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
        async with self._writing:
            await self._store.compact(Snapshot(index, TERM, data), ())
            self._since_snapshot = self._bytes_since_snapshot = 0
            self.reset(replica)

    def keep(self, entry: LogEntry, applied: Applied | None, chain: bytes) -> None:
        """See :meth:`History.keep`."""
        super().keep(entry, applied, chain)
        self._since_snapshot += 1
        self._bytes_since_snapshot += len(entry.data)

    async def _compact_if_due(self) -> None:
        if (
            self._since_snapshot < self._compact_entries
            and self._bytes_since_snapshot < COMPACT_BYTES
        ):
            return
        try:
            await self._compact()
        except Unavailable as error:
            log.warning("the log could not be compacted, and will be later: %s", error)

    async def compact(self) -> int:
        """Write a snapshot and drop the log before it; returns its index.

        Raises :class:`Unavailable` when the disk fails.
        """
        async with self._writing:
            await self._compact()
            return self.index

    async def _compact(self) -> None:
        self._since_snapshot = self._bytes_since_snapshot = 0
        await self._store.compact(Snapshot(self.index, TERM, self._replica.encode()), ())

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
