"""PySyncObj's ``SyncObj`` without I/O, and with what it does by itself put right.

Its elections, its counting of what is committed and its leader's fallback are used as they are.
What was found wanting is overridden, each with the reason beside it; the tests show for each that
the class as shipped does fail.  All names that begin with ``_SyncObj__`` are the library's.  Time
is counted in ticks.  Pure.
"""
# ruff: noqa: N802

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pyagent_node.consensus.pysyncobj_log import CoreLog
from pyagent_node.consensus.pysyncobj_messages import (
    Append,
    Entry,
    InstallSnapshot,
    Membership,
    Message,
    RequestVote,
    TimeoutNow,
)
from pyagent_node.consensus.pysyncobj_parts import Node, Wire, conf_of
from pyagent_node.consensus.pysyncobj_stock import Seams, stock

_SyncObj: Any = stock().SyncObj

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
MAX_BATCH_ENTRIES = 1024
MAX_BATCHES = 4
"""Messages with entries to one node at a time; the next follow on its acknowledgement."""
MAX_AHEAD = 4096
"""Entries sent to a node that it has not acknowledged."""
SNAPSHOT_TICKS = 100
"""A snapshot that is not acknowledged is sent again after this long."""

T = TypeVar("T")
Snapshot = tuple[int, int, Membership, bytes]
"""Index, term, who the members are there, and the state."""


class QuietSyncObj(_SyncObj):  # type: ignore[misc]  # it is untyped
    """One node of PySyncObj that has no thread, no socket, no file and no pickle."""

    _SyncObj__conf: Any
    _SyncObj__raftState: int
    _SyncObj__raftCurrentTerm: int
    _SyncObj__raftCommitIndex: int
    _SyncObj__raftLastApplied: int
    _SyncObj__raftLeader: Node | None
    _SyncObj__raftElectionDeadline: float
    _SyncObj__raftNextIndex: dict[Node, int]
    _SyncObj__raftMatchIndex: dict[Node, int]
    _SyncObj__lastResponseTime: dict[Node, float]
    _SyncObj__otherNodes: set[Node]
    _SyncObj__readonlyNodes: set[Node]
    _SyncObj__connectedNodes: set[Node]
    _SyncObj__noopIDx: int | None
    _SyncObj__newAppendEntriesTime: float
    _SyncObj__leaderCommitIndex: int | None
    _SyncObj__transferInProgress: bool

    def __init__(
        self,
        me: int,
        log: CoreLog,
        snapshot: Snapshot,
        *,
        heartbeat_ticks: int,
        election_ticks: int,
        max_batch_bytes: int,
    ) -> None:
        self.me = me
        self.log = log
        self.stale = 0
        """Messages that came too late, or twice, and were dropped."""
        self.last_snapshot = snapshot
        self.installed: Snapshot | None = None
        self.outbox: list[tuple[int, Message]] = []
        self.committed: list[Entry] = []
        self.acknowledged_round: dict[int, int] = {}
        self.round = 0
        self._election_ticks = election_ticks
        self._lease_ticks = election_ticks - heartbeat_ticks
        self._max_batch_bytes = max_batch_bytes
        self._asking = 0
        self._promised: set[int] = set()
        self._granted: set[int] = set()
        self._snapshot_until: dict[int, float] = {}
        self._heard = -float(election_ticks)
        self._seams = Seams()
        conf = conf_of(log, heartbeat_ticks, election_ticks)
        with self._seams.active():
            super().__init__(Node(me), (), conf=conf, transport=Wire(self.put))
        self._SyncObj__raftLastApplied = snapshot[0]
        self._SyncObj__raftCommitIndex = max(snapshot[0], min(log.hard[2], log.last_index))
        self.adopt()

    # --- plumbing -------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """Ticks since the node was started."""
        return self._seams.now

    def tick(self) -> None:
        """Let one tick pass; the library looks at it in :meth:`look`."""
        self._seams.now += 1.0

    def look(self) -> None:
        """Have the library look at what changed: elections, commitment, messages that are due."""
        self.run(lambda: self.doTick(0.0))

    def broadcast(self) -> None:
        """Send every node what it lacks, as the leader."""
        self.run(self._SyncObj__sendAppendEntries)

    def draw(self, ticks: int) -> None:
        """Set the election timeout.

        The library draws low + (high - low) * random(), and acts when that has passed.
        """
        self._seams.draw = (ticks - 0.5) / self._election_ticks - 1.0

    def wait_longer(self, ticks: float) -> None:
        """Move the end of the election timeout that runs."""
        self._SyncObj__raftElectionDeadline += ticks

    def stand(self) -> None:
        """End the election timeout that runs."""
        self._SyncObj__raftElectionDeadline = self.now - 1

    @property
    def state(self) -> int:
        """Follower, candidate or leader."""
        return self._SyncObj__raftState

    @property
    def term(self) -> int:
        """The current term."""
        return self._SyncObj__raftCurrentTerm

    @property
    def commit(self) -> int:
        """The last entry known to be committed."""
        return self._SyncObj__raftCommitIndex

    @property
    def handed_out(self) -> int:
        """The last committed entry that was handed out."""
        return self._SyncObj__raftLastApplied

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""
        node = self._SyncObj__raftLeader
        return node.id if node is not None else 0

    @property
    def settled(self) -> bool:
        """Whether this leader has committed an entry of its own term, so knows what is committed.

        Before that it may neither answer a read nor change the voters.
        """
        noop = self._SyncObj__noopIDx
        return self.state == LEADER and noop is not None and self.commit >= noop

    def matched(self, node: int) -> int:
        """Return the last entry known to be durable at ``node`` (the leader knows)."""
        if node == self.me:
            return self.log.last_index
        return self._SyncObj__raftMatchIndex.get(Node(node), 0)

    def progress(self, node: int) -> tuple[int, int, bool, str]:
        """Return ``(id, matched, recently active, state)`` of a node (the leader knows)."""
        last = self._SyncObj__lastResponseTime.get(Node(node), 0.0)
        active = node == self.me or self.now - last < self._election_ticks
        following = self._SyncObj__raftNextIndex.get(Node(node), self.log.last_index + 1)
        state = "snapshot" if following <= self.log.base_index else "replicate"
        return node, self.matched(node), active, state

    def lost(self, node: int) -> None:
        """Send again what ``node`` has not acknowledged."""
        if self.state == LEADER and self.matched(node) and node != self.me:
            self._SyncObj__raftNextIndex[Node(node)] = self.matched(node) + 1

    def snapshot_lost(self, node: int) -> None:
        """Send a snapshot again."""
        self._snapshot_until.pop(node, None)

    def tell_to_stand(self, node: int) -> None:
        """Have a voter whose log is complete stand for election."""
        self.run(lambda: self.transferLeadership(Node(node)))

    def run(self, work: Callable[[], T]) -> T:
        """Run a method of the library under this node's clock and generator."""
        with self._seams.active():
            return work()

    def put(self, to: int, message: Message) -> None:
        """Queue a message; it is sent when what it rests on is durable."""
        self.outbox.append((to, message))

    def adopt(self) -> None:
        """Bring the library's sets of nodes in line with the membership in the log.

        PySyncObj replays pickled "add" and "rem" entries, in reverse when it truncates; an entry
        that holds the whole membership cannot get out of step.
        """
        membership = self.log.membership
        self._SyncObj__otherNodes = {Node(n) for n in membership.voters if n != self.me}
        self._SyncObj__readonlyNodes = {Node(n) for n in membership.learners if n != self.me}
        nodes = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        self._SyncObj__connectedNodes = nodes
        for known in (self._SyncObj__raftNextIndex, self._SyncObj__raftMatchIndex):
            for node in [node for node in known if node not in nodes]:
                del known[node]
        if self._SyncObj__raftState == LEADER:
            for node in nodes:
                self._SyncObj__raftNextIndex.setdefault(node, self.log.last_index + 1)
                self._SyncObj__raftMatchIndex.setdefault(node, 0)
                self._SyncObj__lastResponseTime.setdefault(node, self.now)
            if self.me not in membership.voters:
                self._count_out()
        elif self.me not in membership.voters:
            self._SyncObj__raftState = FOLLOWER

    def _count_out(self) -> None:
        """Have this leader, which gave up its vote, not count towards a majority.

        The library counts itself and asks for more than half of its peers and itself; with one
        more peer, which never answers, that is more than half of the voters.
        """
        nobody = Node(0)
        self._SyncObj__otherNodes = self._SyncObj__otherNodes | {nobody}
        self._SyncObj__raftMatchIndex[nobody] = 0
        self._SyncObj__lastResponseTime[nobody] = float("-inf")

    def retire(self) -> None:
        """Lead no longer: the membership without this node is committed.  The best follower may."""
        voters = self.log.membership.voters
        heir = max(voters, key=lambda n: (self._SyncObj__raftMatchIndex.get(Node(n), 0), n))
        self.put(heir, TimeoutNow(self._SyncObj__raftCurrentTerm))
        self._SyncObj__raftLeader = None
        self._SyncObj__setState(FOLLOWER)
        self.adopt()

    def votes(self, node: int) -> bool:
        """Say whether ``node`` is one of the other voters."""
        return node != self.me and node in self.log.membership.voters

    def majority(self, nodes: set[int]) -> bool:
        """Say whether ``nodes`` are a majority of the voters."""
        voters = self.log.membership.voters
        return 2 * len(nodes & set(voters)) > len(voters)

    def _step_down(self, term: int) -> None:
        self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__raftLeader = None
        self._SyncObj__setState(FOLLOWER)

    # --- overrides of the library ---------------------------------------------------------------

    def _SyncObj__connectedToAnyone(self) -> bool:
        """Say whether to stand for election, asked when the leader has been silent for too long.

        As shipped, a node stands as soon as it has a connection to anyone, and again and again, so
        one that was cut off comes back with a high term and deposes a good leader.  Here it stands
        when a majority said that it would vote for it (PreVote).
        """
        if self.me not in self.log.membership.voters:
            return False
        following = self._SyncObj__raftCurrentTerm + 1
        if self._SyncObj__transferInProgress or self.majority({self.me}):
            return True
        if self._asking == following and self.majority(self._promised):
            return True
        self._asking, self._promised = following, {self.me}
        self._SyncObj__raftLeader = None
        timeout: float = self._SyncObj__generateRaftTimeout()
        self._SyncObj__raftElectionDeadline = self.now + timeout
        log = self.log
        for node in sorted(self._SyncObj__otherNodes, key=lambda node: node.id):
            self.put(node.id, RequestVote(following, log.last_index, log[-1][2], ask=True))
        return False

    def _SyncObj__applyLogEntries(self) -> bool:
        """Hand committed entries out; applying them is the engine's, after its ``fsync``.

        As shipped, a command that raises is tried again for ever and nothing after it is applied.
        """
        first, last = self._SyncObj__raftLastApplied + 1, self._SyncObj__raftCommitIndex
        self.committed += [self.log.entry(index) for index in range(first, last + 1)]
        self._SyncObj__raftLastApplied = max(last, first - 1)
        return last >= first

    def _checkCommandsToApply(self) -> None:
        """Do nothing: proposals are appended by the core, checked."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """Do nothing: the engine writes snapshots, with a schema, without a fork."""

    def _SyncObj__setState(self, new: int) -> None:
        if new == CANDIDATE:
            self._granted.clear()
            self._promised.clear()
        super()._SyncObj__setState(new)

    def _SyncObj__onBecomeLeader(self) -> None:
        """Forget what was acknowledged to an earlier leadership of this node."""
        self.acknowledged_round.clear()
        self._snapshot_until.clear()
        self._SyncObj__raftNextIndex.clear()
        self._SyncObj__raftMatchIndex.clear()
        super()._SyncObj__onBecomeLeader()

    def _SyncObj__sendAppendEntries(self) -> None:
        """Send each node what it lacks, within bounds.

        As shipped, everything that a node lacks is queued at once, and long entries go pickled in
        parts, which a reconnection can join wrongly.
        """
        period: float = self._SyncObj__conf.appendEntriesPeriod
        self._SyncObj__newAppendEntriesTime = self.now + period - 0.5
        for node in sorted(self._SyncObj__connectedNodes, key=lambda node: node.id):
            self._send_to(node)

    def _send_to(self, node: Node) -> None:
        following = self._SyncObj__raftNextIndex[node]
        if following <= self.log.base_index:
            self._send_snapshot(node)
            self._put_append(node, self.log.base_index, [])
            return
        ahead = self._SyncObj__raftMatchIndex[node] + MAX_AHEAD
        for batch in range(MAX_BATCHES):
            entries = self.log.entries(following, MAX_BATCH_ENTRIES, self._max_batch_bytes)
            if following > ahead:
                entries = []
            if batch and not entries:
                break
            self._put_append(node, following - 1, entries)
            following += len(entries)
        self._SyncObj__raftNextIndex[node] = following

    def _send_snapshot(self, node: Node) -> None:
        if self._snapshot_until.get(node.id, self.now) > self.now:
            return
        self._snapshot_until[node.id] = self.now + SNAPSHOT_TICKS
        index, snapshot_term, membership, data = self.last_snapshot
        term = self._SyncObj__raftCurrentTerm
        members = (membership.voters, membership.learners)
        self.put(node.id, InstallSnapshot(term, index, snapshot_term, self.round, *members, data))

    def _put_append(self, node: Node, prev: int, entries: list[Entry]) -> None:
        prev_term = self.log.term_at(prev)
        assert prev_term is not None
        commit, term = self._SyncObj__raftCommitIndex, self._SyncObj__raftCurrentTerm
        self.put(node.id, Append(term, prev, prev_term, commit, self.round, entries))
