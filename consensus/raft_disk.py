"""The disk under a Raft node: one durable write at a time, and what it holds now."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypedDict

import trio

from pyagent_node.base.errors import ErrorInfo, PyAgentError, Unavailable
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.raft_core import Ready
from pyagent_node.consensus.raft_storage import (
    HardState,
    Loaded,
    encode_hard_state,
    encode_snapshot,
    to_log_entry,
)
from pyagent_node.native import RaftConf, RaftEntry

log = logging.getLogger("pyagent_node.consensus.raft")

RETRY_SECONDS = 1.0
"""Time between two attempts to write on a full disk."""

Snapshot = tuple[int, int, RaftConf, bytes]
"""Index, term, configuration and content, as a core gives and takes it."""


class CoreState(TypedDict):
    """What a core starts from."""

    conf: RaftConf
    term: int
    vote: int
    commit: int
    snapshot_index: int
    snapshot_term: int
    snapshot_data: bytes
    entries: list[RaftEntry]


class Disk:
    """What is durable; ``problem`` says why nothing can be written at present."""

    def __init__(
        self,
        store: LogStore,
        loaded: Loaded,
        incarnation: bytes,
        refused: Callable[[PyAgentError], None],
    ) -> None:
        self.problem: ErrorInfo | None = None
        self.writes = 0
        self._store = store
        self._refused = refused
        self._hard = loaded.hard or HardState(1, incarnation, 0, 0, 0)
        self._hard_unsaved = False
        self._log: deque[RaftEntry] = deque(loaded.entries)
        self._snapshot: Snapshot = (
            loaded.snapshot_index,
            loaded.snapshot_term,
            loaded.conf,
            loaded.snapshot_data,
        )

    @property
    def snapshot_index(self) -> int:
        """Where the durable log begins."""
        return self._snapshot[0]

    def core_state(self) -> CoreState:
        """Return what a core needs to go on from here.

        A term that only the snapshot knows is one in which this node gave no vote: the vote would
        have been durable before it was sent.
        """
        index, term, conf, data = self._snapshot
        behind = self._hard.term < term
        return CoreState(
            conf=conf,
            term=term if behind else self._hard.term,
            vote=0 if behind else self._hard.vote,
            commit=max(index, self._hard.commit),
            snapshot_index=index,
            snapshot_term=term,
            snapshot_data=data,
            entries=list(self._log),
        )

    def note(self, ready: Ready) -> None:
        """Remember a hard state for the next write."""
        if ready.hard_state is not None:
            term, vote, commit = ready.hard_state
            self._hard = HardState(1, self._hard.incarnation, term, vote, commit)
            self._hard_unsaved = True

    async def persist(self, ready: Ready) -> None:
        """Make durable what the core asks for, in one write if there is no snapshot."""
        self.note(ready)
        snapshot, entries = ready.snapshot, ready.entries
        if snapshot is not None:
            stored = encode_snapshot(*snapshot)
            await self._durably(lambda: self._store.compact(stored, ()))
            self._snapshot = snapshot
            self._log.clear()
        if entries or ready.must_sync or (snapshot is not None and self._hard_unsaved):
            batch = [to_log_entry(entry) for entry in entries]
            hard = encode_hard_state(self._hard) if self._hard_unsaved else None
            await self._durably(lambda: self._store.append(batch, hard))
            self._hard_unsaved = False
            self.writes += 1
        if entries:
            while self._log and self._log[-1].index >= entries[0].index:
                self._log.pop()
            self._log.extend(entries)

    async def save(self) -> None:
        """Write a commit index that is not written yet: a restart then begins near it."""
        if self._hard_unsaved:
            hard = encode_hard_state(self._hard)
            await self._durably(lambda: self._store.append((), hard))
            self._hard_unsaved = False

    async def compact(self, snapshot: Snapshot) -> None:
        """Replace the log up to a snapshot; raises :class:`Unavailable` when the disk is full."""
        index = snapshot[0]
        rest = [to_log_entry(entry) for entry in self._log if entry.index > index]
        await self._store.compact(encode_snapshot(*snapshot), rest)
        self._snapshot = snapshot
        while self._log and self._log[0].index <= index:
            self._log.popleft()

    async def _durably(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write, waiting out a full disk; nothing is said or done meanwhile.

        Whoever follows a leader that waits here will elect another.  Raises any other error of
        the disk: nobody knows what it holds then.
        """
        while True:
            try:
                await write()
            except Unavailable as error:
                if error.code != "disk_full":
                    raise
                if self.problem is None:
                    log.error("the log cannot be written: %s", error)
                self.problem = error.to_info()
                self._refused(error)
                await trio.sleep(RETRY_SECONDS)
            else:
                if self.problem is not None:
                    log.info("the log can be written again")
                    self.problem = None
                return
