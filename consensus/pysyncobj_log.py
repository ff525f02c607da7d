"""The journal that PySyncObj reads and writes, in memory, with what is not durable yet told apart.

It begins with a base: a stand-in for the last entry of the snapshot, (0, term 0) for a new log.
The engine makes durable what :meth:`CoreLog.unsaved` returns before any message leaves, and goes
back to what is durable with :meth:`CoreLog.rollback` when the disk refuses.  Pure.
"""
# ruff: noqa: N802, N803

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pyagent_node.consensus.pysyncobj_messages import (
    MEMBERSHIP,
    NO_OP,
    HardState,
    Members,
    decode_members,
)
from pyagent_node.consensus.segments import LogEntry

Row = tuple[bytes, int, int]
"""An entry as PySyncObj holds it: content, index, term."""


class CoreLog:
    """PySyncObj's ``Journal``, and what the engine needs to know of it."""

    def __init__(
        self,
        base: tuple[int, int],
        members: Members,
        entries: Sequence[LogEntry],
        hard: HardState,
    ) -> None:
        """Hold ``entries``, which follow on ``base`` (index, term), as durable.

        ``members`` are in force at ``base``.  Raises :class:`CorruptData` (``bad_entry``).
        """
        self._rows: list[Row] = [(NO_OP, *base)]
        self._memberships: list[tuple[int, Members]] = [(base[0], members)]
        self._hard = self._saved_hard = hard
        self._hard_changed = False
        for entry in entries:
            self.add(entry.data, entry.index, entry.term)
        self._saved_to = self.last_index
        self._undo: tuple[list[Row], list[tuple[int, Members]], int] | None = None

    # --- what PySyncObj calls -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Row:
        return self._rows[place]

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry."""
        assert not self._rows or idx == self.last_index + 1
        if command[:1] == MEMBERSHIP:
            self._memberships.append((idx, decode_members(command)))
        self._rows.append((command, idx, term))

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Note what is committed; written with whatever is written next."""
        self._hard = msgspec.structs.replace(self._hard, commit=raftCommitIndex)

    def getRaftCommitIndex(self) -> int:
        """Return what was known to be committed."""
        return self._hard.commit

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        """Note the term and the vote; to be durable before any message leaves."""
        self._hard_changed |= (term, votedForNodeId) != (self._hard.term, self._hard.vote)
        self._hard = msgspec.structs.replace(self._hard, term=term, vote=votedForNodeId)

    def getCurrentTerm(self) -> int:
        """Return the term."""
        return self._hard.term

    def getVotedForNodeId(self) -> str | None:
        """Return who got this node's vote in the term."""
        return self._hard.vote

    def onOneSecondTimer(self) -> None:
        """Do nothing: durability is not a matter of time here."""

    def _destroy(self) -> None:
        """Do nothing: there is no file."""

    # --- what the engine asks -------------------------------------------------------------------

    @property
    def base_index(self) -> int:
        """Index that the first kept entry follows on."""
        return self._rows[0][1]

    @property
    def last_index(self) -> int:
        """Index of the last entry."""
        return self._rows[-1][1]

    @property
    def last_term(self) -> int:
        """Term of the last entry."""
        return self._rows[-1][2]

    @property
    def members(self) -> Members:
        """The members in force: of the last membership in the log, committed or not."""
        return self._memberships[-1][1]

    @property
    def membership_index(self) -> int:
        """Index of the last membership in the log."""
        return self._memberships[-1][0]

    @property
    def hard(self) -> HardState:
        """The hard state as of now."""
        return self._hard

    def members_at(self, index: int) -> Members:
        """Return the members in force after entry ``index``, which is kept."""
        return next(m for at, m in reversed(self._memberships) if at <= index)

    def term_at(self, index: int) -> int | None:
        """Return the term of an entry; ``None`` if it is not kept."""
        place = index - self.base_index
        return self._rows[place][2] if 0 <= place < len(self._rows) else None

    def entry(self, index: int) -> LogEntry:
        """Return a kept entry."""
        data, at, term = self._rows[index - self.base_index]
        return LogEntry(at, term, data)

    def entries(self, first: int, count: int, max_bytes: int) -> list[LogEntry]:
        """Return entries from ``first`` on, at least one if there is any."""
        chosen: list[LogEntry] = []
        size = 0
        for index in range(first, min(first + count, self.last_index + 1)):
            entry = self.entry(index)
            size += len(entry.data)
            if chosen and size > max_bytes:
                break
            chosen.append(entry)
        return chosen

    # --- changes ---------------------------------------------------------------------------------

    def _remember(self) -> None:
        if self._undo is None:
            kept = self._rows[: self._saved_to - self.base_index + 1]
            memberships = [m for m in self._memberships if m[0] <= self._saved_to]
            self._undo = (kept, memberships, self._saved_to)

    def truncate(self, index: int) -> None:
        """Drop entry ``index`` and all after it; they were never committed."""
        assert index > max(self.base_index, self._hard.commit)
        self._remember()
        del self._rows[index - self.base_index :]
        self._memberships = [m for m in self._memberships if m[0] < index]
        self._saved_to = min(self._saved_to, index - 1)

    def install(self, index: int, term: int, members: Members) -> None:
        """Begin anew at a snapshot; entries after it stay if they follow on it."""
        self._remember()
        follows = self.term_at(index) == term
        kept = self._rows[index - self.base_index + 1 :] if follows else []
        later = [m for m in self._memberships if m[0] > index] if follows else []
        self._rows = [(NO_OP, index, term), *kept]
        self._memberships = [(index, members), *later]
        self._saved_to = max(index, min(self._saved_to, self.last_index))
        if self._hard.commit < index:
            self.setRaftCommitIndex(index)

    def forget(self, index: int) -> None:
        """Drop the entries up to ``index`` from memory: they are in a snapshot on disk."""
        assert self._undo is None
        assert self.base_index <= index <= self._saved_to
        members = self.members_at(index)
        term = self.term_at(index)
        assert term is not None
        self._rows = [(NO_OP, index, term), *self._rows[index - self.base_index + 1 :]]
        later = [m for m in self._memberships if m[0] > index]
        self._memberships = [(index, members), *later]

    # --- durability ------------------------------------------------------------------------------

    def unsaved(self) -> tuple[list[LogEntry], HardState | None]:
        """Return the entries to write and, if it must be written too, the hard state."""
        first = self._saved_to + 1
        entries = [self.entry(index) for index in range(first, self.last_index + 1)]
        return entries, self._hard if self._hard_changed or entries else None

    def saved(self) -> None:
        """What :meth:`unsaved` returned is durable now, and so is an installed snapshot."""
        self._saved_to = self.last_index
        self._saved_hard = self._hard
        self._hard_changed = False
        self._undo = None

    def rollback(self, applied: int) -> None:
        """Go back to what is durable; entries up to ``applied`` are known to be committed."""
        if self._undo is not None:
            self._rows, self._memberships, self._saved_to = self._undo
        else:
            del self._rows[self._saved_to - self.base_index + 1 :]
            self._memberships = [m for m in self._memberships if m[0] <= self._saved_to]
        commit = max(applied, self._saved_hard.commit)
        self._hard = msgspec.structs.replace(self._saved_hard, commit=commit)
        self._hard_changed = False
        self._undo = None
