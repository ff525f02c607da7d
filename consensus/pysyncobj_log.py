"""The journal that PySyncObj reads and writes, in memory, with what is not durable yet told apart.

It begins with a base: a stand-in for the last entry before the kept ones, (0, term 0) for a new
log.  The caller makes durable what :meth:`CoreLog.unsaved` returns before a message leaves.  Pure.
"""
# ruff: noqa: N802, N803

from __future__ import annotations

from collections.abc import Iterable

from pyagent_node.consensus.pysyncobj_messages import (
    MEMBERSHIP,
    NO_OP,
    Entry,
    Membership,
    decode_membership,
)

Row = tuple[bytes, int, int]
"""An entry as PySyncObj holds it: content, index, term."""
Hard = tuple[int, int, int]
"""Term, vote (0 for nobody), commit index."""


class CoreLog:
    """PySyncObj's ``Journal``, and what the core needs to know of it."""

    def __init__(
        self,
        base: tuple[int, int],
        membership: Membership,
        entries: Iterable[Entry],
        hard: Hard,
    ) -> None:
        """Hold ``entries``, which follow on ``base`` (index, term), as durable.

        ``membership`` is in force at ``base``.  Raises :class:`CorruptData` (``bad_entry``).
        """
        self._rows: list[Row] = [(NO_OP, *base)]
        self._memberships = [(base[0], membership)]
        for entry in entries:
            self.add(entry.content, entry.index, entry.term)
        self._saved_to = self.last_index
        self.hard = self._told = hard

    # --- what PySyncObj calls -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Row:
        return self._rows[place]

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry."""
        assert idx == self.last_index + 1
        if command[:1] == MEMBERSHIP:
            self._memberships.append((idx, decode_membership(command)))
        self._rows.append((command, idx, term))

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Note what is committed."""
        self.hard = (*self.hard[:2], raftCommitIndex)

    def getRaftCommitIndex(self) -> int:
        """Return what was known to be committed."""
        return self.hard[2]

    def setCurrentTerm(self, term: int, votedForNodeId: int | None) -> None:
        """Note the term and the vote; to be durable before any message leaves."""
        self.hard = (term, votedForNodeId or 0, self.hard[2])

    def getCurrentTerm(self) -> int:
        """Return the term."""
        return self.hard[0]

    def getVotedForNodeId(self) -> int | None:
        """Return who got this node's vote in the term."""
        return self.hard[1] or None

    def onOneSecondTimer(self) -> None:
        """Do nothing: durability is not a matter of time here."""

    def _destroy(self) -> None:
        """Do nothing: there is no file."""

    # --- what the core asks ---------------------------------------------------------------------

    @property
    def base_index(self) -> int:
        """Index that the first kept entry follows on."""
        return self._rows[0][1]

    @property
    def last_index(self) -> int:
        """Index of the last entry."""
        return self._rows[-1][1]

    @property
    def membership(self) -> Membership:
        """The membership in force: the last one in the log, committed or not."""
        return self._memberships[-1][1]

    @property
    def membership_index(self) -> int:
        """Where :attr:`membership` came into force."""
        return self._memberships[-1][0]

    def membership_at(self, index: int) -> Membership:
        """Return the membership in force after entry ``index``, which is kept."""
        return next(found for at, found in reversed(self._memberships) if at <= index)

    def term_at(self, index: int) -> int | None:
        """Return the term of an entry; ``None`` if it is not kept."""
        place = index - self.base_index
        return self._rows[place][2] if 0 <= place < len(self._rows) else None

    def entry(self, index: int) -> Entry:
        """Return a kept entry."""
        content, at, term = self._rows[index - self.base_index]
        return Entry(at, term, content)

    def entries(self, first: int, count: int, max_bytes: int) -> list[Entry]:
        """Return entries from ``first`` on, at least one if there is any."""
        chosen: list[Entry] = []
        size = 0
        for index in range(first, min(first + count, self.last_index + 1)):
            entry = self.entry(index)
            size += len(entry.content)
            if chosen and size > max_bytes:
                break
            chosen.append(entry)
        return chosen

    def bytes_after(self, index: int) -> int:
        """Return the size of the entries above ``index``."""
        return sum(len(row[0]) for row in self._rows[max(0, index - self.base_index) + 1 :])

    # --- changes --------------------------------------------------------------------------------

    def truncate(self, index: int) -> None:
        """Drop entry ``index`` and all after it; they were never committed."""
        assert index > max(self.base_index, self.hard[2])
        del self._rows[index - self.base_index :]
        self._memberships = [m for m in self._memberships if m[0] < index]
        self._saved_to = min(self._saved_to, index - 1)

    def install(self, index: int, term: int, membership: Membership) -> None:
        """Begin anew at a snapshot; what is kept does not agree with it, or ends before it."""
        assert index > self.hard[2]
        assert self.term_at(index) != term
        self._rows = [(NO_OP, index, term)]
        self._memberships = [(index, membership)]
        self._saved_to = index
        self.setRaftCommitIndex(index)

    def forget(self, index: int) -> None:
        """Drop the entries up to ``index`` from memory."""
        assert index <= self._saved_to
        term = self.term_at(index)
        if term is None or index == self.base_index:
            return
        first = (index, self.membership_at(index))
        self._rows = [(NO_OP, index, term), *self._rows[index - self.base_index + 1 :]]
        self._memberships = [first, *(m for m in self._memberships if m[0] > index)]

    # --- durability -----------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """Whether there is something to be told by :meth:`unsaved`."""
        return self._saved_to < self.last_index or self.hard != self._told

    def unsaved(self) -> tuple[list[Entry], Hard | None, bool]:
        """Return the entries and the hard state to write, and whether it must reach the disk.

        They count as written from here on.
        """
        entries = [self.entry(index) for index in range(self._saved_to + 1, self.last_index + 1)]
        hard = self.hard if self.hard != self._told else None
        must_sync = bool(entries) or self.hard[:2] != self._told[:2]
        self._saved_to, self._told = self.last_index, self.hard
        return entries, hard, must_sync
