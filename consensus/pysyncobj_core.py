"""PySyncObj as a core without I/O: messages and time in, messages and entries out.

The order that the caller keeps: feed messages and proposals, :meth:`Core.tick`, then make durable
what :attr:`Core.log` calls unsaved, and only then send and apply what :meth:`Core.take` returns.
So nothing leaves a node before what it rests on is on its disk.  Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from pyagent_node.base.errors import Conflict, Refused
from pyagent_node.consensus.pysyncobj_messages import (
    Append,
    InstallSnapshot,
    Member,
    Members,
    NextIndex,
    RaftMessage,
    RequestVote,
    TimeoutNow,
    Vote,
)
from pyagent_node.consensus.pysyncobj_raft import (
    CANDIDATE,
    LEADER,
    HardenedSyncObj,
    Outgoing,
    node_of,
)
from pyagent_node.consensus.segments import LogEntry

MAX_TERM_STEP = 1 << 32
"""A message of a term further ahead is refused: it would use the terms up."""


class Taken(NamedTuple):
    """What came of the steps since the last time: to send, to apply, who needs a snapshot."""

    messages: list[Outgoing]
    committed: list[LogEntry]
    snapshots: list[Member]


class Core(HardenedSyncObj):
    """One node's Raft: see the module."""

    # --- what the engine asks -------------------------------------------------------------------

    @property
    def role(self) -> Literal["leader", "candidate", "follower", "learner"]:
        """What this node is now."""
        if self._SyncObj__raftState == LEADER:
            return "leader"
        if self.me not in self.log.members.voters:
            return "learner"
        return "candidate" if self._SyncObj__raftState == CANDIDATE else "follower"

    @property
    def leads(self) -> bool:
        """Whether this node leads its term."""
        return self._SyncObj__raftState == LEADER

    @property
    def leader(self) -> Member | None:
        """Who leads, as far as this node knows; ``None`` if nobody was heard of for long."""
        node = self._SyncObj__raftLeader
        if node is None or (not self.leads and self._seams.now - self._heard > self._patience):
            return None
        return node.member

    @property
    def term(self) -> int:
        """The current term."""
        return self._SyncObj__raftCurrentTerm

    @property
    def commit(self) -> int:
        """Index of the last entry known to be committed."""
        return self._SyncObj__raftCommitIndex

    @property
    def ready_to_lead(self) -> bool:
        """Whether an entry of the leader's own term is committed: its commit index is current."""
        noop = self._SyncObj__noopIDx
        return self.leads and noop is not None and self.commit >= noop

    def matched(self, member: Member) -> int:
        """Return the last entry known to be durable at ``member`` (the leader knows)."""
        return self._SyncObj__raftMatchIndex.get(node_of(member), 0)

    def active(self, member: Member) -> bool:
        """Whether ``member`` was heard of within an election timeout (the leader knows)."""
        last = self._SyncObj__lastResponseTime.get(node_of(member), float("-inf"))
        return self._seams.now - last < self._patience / 2

    def next_wake(self, now: float, tick: float) -> float:
        """Return when to tick next, at most ``tick`` seconds from ``now``."""
        if self.leads or self.me not in self.log.members.voters:
            return now + tick
        deadline = self._SyncObj__raftElectionDeadline
        return max(now + tick / 100, min(now + tick, deadline + 1e-6))

    def take(self) -> Taken:
        """Return what is to be sent and applied once :attr:`log` is durable."""
        taken = Taken(self._outbox, self._committed, self._snapshots)
        self._outbox, self._committed, self._snapshots = [], [], []
        return taken

    # --- what the engine feeds ------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Let time pass: elections, commitment, the leader's messages."""
        self._run(now, lambda: self.doTick(0.0))

    def link_up(self, member: Member, now: float) -> None:
        """A stream to ``member`` begins: what was sent before may be lost."""
        self._linked.add(member)
        self._snapshot_until.pop(member, None)
        if self.leads and member in self.log.members.all:
            matched = self.matched(member)
            following = matched + 1 if matched else self.log.last_index + 1
            self._SyncObj__raftNextIndex[node_of(member)] = following
        self._adopt_links()
        if self.leads and member in self.log.members.all:
            self._run(now, lambda: self._send_to(node_of(member)))

    def link_down(self, member: Member) -> None:
        """The stream to ``member`` is gone."""
        self._linked.discard(member)
        self._adopt_links()

    def append(self, contents: Iterable[bytes], now: float) -> list[int]:
        """Append entries as the leader and send them; returns their indices.

        Raises :class:`Conflict` (``not_leader``).
        """
        if not self.leads:
            raise Conflict("This node does not lead.", code="not_leader")
        indices = []
        for content in contents:
            index = self.log.last_index + 1
            self.log.add(content, index, self.term)
            indices.append(index)
        self._adopt()
        self._run(now, self._SyncObj__sendAppendEntries)
        return indices

    def begin_read(self, now: float) -> tuple[int, int] | None:
        """Begin a linearizable read: returns a round to wait for and the index to apply up to.

        ``None`` while the leader does not know its commit index yet.  PySyncObj has no such reads:
        a leader that was deposed without knowing would answer with old state.
        """
        if not self.ready_to_lead:
            return None
        self._round += 1
        self._run(now, self._SyncObj__sendAppendEntries)
        return self._round, self.commit

    def confirmed(self, round_: int) -> bool:
        """Whether a majority acknowledged this leader after the round began."""
        voters = self.log.members.voters
        count = sum(1 for v in voters if v == self.me or self._rounds.get(v, 0) >= round_)
        return self.leads and 2 * count > len(voters)

    def hand_over(self, to: Member, now: float) -> bool:
        """Ask ``to`` to stand for election; ``False`` while its log is not complete."""
        outcome: list[int] = []
        self._run(
            now,
            lambda: self.transferLeadership(node_of(to), lambda _, reason: outcome.append(reason)),
        )
        return outcome == [0] and to in self._linked

    def step(
        self,
        sender: Member,
        message: RaftMessage,
        now: float,
        *,
        entries: Sequence[LogEntry] = (),
        members: Members | None = None,
    ) -> bool:
        """Take a message; returns whether a snapshot is to be installed now.

        ``entries`` of an ``Append`` and ``members`` of a snapshot were checked against their
        schemas.  What is merely late is dropped and counted.  Raises :class:`Refused`
        (``not_a_voter``, ``not_the_leader``, ``future_term``) and :class:`CorruptData`
        (``protocol_error``, ``log_diverged``); nothing has changed then.
        """
        if message.term > self.term + MAX_TERM_STEP:
            raise Refused(f"{sender.peer} names a term far ahead.", code="future_term")
        match message:
            case RequestVote():
                self._asked_for_vote(sender, message, now)
            case Vote():
                self._got_vote(sender, message, now)
            case NextIndex():
                self._acknowledged(sender, message, now)
            case TimeoutNow():
                self._told_to_stand(sender, message, now)
            case Append():
                self._appended(sender, message, entries, now)
            case InstallSnapshot():
                assert members is not None
                return self._snapshot(sender, message, members, now)
        return False
