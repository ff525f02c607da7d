"""PySyncObj's ``SyncObj``, hardened.

Its elections, its counting of what is committed and its leader's fallback are used as they are.
What was found wanting is overridden, each with the reason beside it; the tests show for each that
the class as shipped does fail.  All names that begin with ``_SyncObj__`` are the library's.  Pure.
"""
# ruff: noqa: N802

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from pyagent_node.base.errors import CorruptData, Refused
from pyagent_node.consensus.pysyncobj_log import CoreLog
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
from pyagent_node.consensus.pysyncobj_stock import Seams, stock
from pyagent_node.consensus.segments import LogEntry

_SyncObj: Any = stock().SyncObj
_BaseNode: Any = stock().Node
_Conf: Any = stock().SyncObjConf

MAX_BATCH_ENTRIES = 512
MAX_BATCH_BYTES = 256 * 1024
MAX_BATCHES = 4
"""Frames of entries to one peer at a time; the next follow on its acknowledgement."""
MAX_AHEAD = 4096
"""Entries sent to a peer that it has not acknowledged."""
SNAPSHOT_SECONDS = 10.0
"""A snapshot that is not acknowledged is sent again after this long."""

FOLLOWER, CANDIDATE, LEADER = 0, 1, 2
T = TypeVar("T")


class Timing(Protocol):
    """The engine's clockwork, in ticks; :class:`RaftTiming` fits."""

    @property
    def tick_ms(self) -> int:
        """Milliseconds in a tick."""
        ...

    @property
    def heartbeat_ticks(self) -> int:
        """Ticks between a leader's messages."""
        ...

    @property
    def election_ticks(self) -> int:
        """Election timeouts are drawn from [this, twice this)."""
        ...


class Outgoing(NamedTuple):
    """A message to send, with the entries that go into its tail."""

    to: Member
    message: RaftMessage
    entries: Sequence[LogEntry] = ()


class Node(_BaseNode):  # type: ignore[misc]
    """PySyncObj's ``Node``; its sets of nodes have the same order in every process."""

    member: Member

    def __hash__(self) -> int:
        return int.from_bytes(self.member.incarnation[:7], "big")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.member == other.member


def node_of(member: Member) -> Node:
    """Return the library's node for ``member``."""
    return Node(member.id, member=member)


class _Wire:
    """PySyncObj's ``Transport``: turns the dictionaries that it sends into messages."""

    ready = True

    def __init__(self, send: Callable[[Member, RaftMessage], None]) -> None:
        self._send = send

    def send(self, node: Node, message: dict[str, Any]) -> None:
        """Queue a message; any but these three types is a path that must not be reached."""
        match message["type"]:
            case "request_vote":
                ask = RequestVote(
                    message["term"], message["last_log_index"], message["last_log_term"]
                )
                self._send(node.member, ask)
            case "response_vote":
                self._send(node.member, Vote(message["term"]))
            case "timeout_now":
                self._send(node.member, TimeoutNow(message["term"]))
            case other:
                raise AssertionError(other)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Take the callbacks that PySyncObj sets; the core calls its methods itself."""
        if not name.startswith("setOn"):
            raise AttributeError(name)
        return lambda *_callback: None


def _conf(log: CoreLog, timing: Timing) -> object:
    tick = timing.tick_ms / 1000
    low = tick * timing.election_ticks
    return _Conf(
        autoTick=False,
        useFork=False,
        journalFile=log,
        dynamicMembershipChange=False,
        appendEntriesUseBatch=False,
        raftMinTimeout=low,
        raftMaxTimeout=2 * low,
        appendEntriesPeriod=tick * timing.heartbeat_ticks,
        leaderFallbackTimeout=low,
        connectionTimeout=2 * low,
    )


class HardenedSyncObj(_SyncObj):  # type: ignore[misc]
    """One node of PySyncObj that neither a late nor a false message can damage."""

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
    _SyncObj__selfNode: Node | None
    _SyncObj__otherNodes: set[Node]
    _SyncObj__readonlyNodes: set[Node]
    _SyncObj__connectedNodes: set[Node]
    _SyncObj__noopIDx: int | None
    _SyncObj__newAppendEntriesTime: float
    _SyncObj__leaderCommitIndex: int | None
    _SyncObj__transferInProgress: bool

    def __init__(
        self,
        me: Member,
        log: CoreLog,
        *,
        applied: int,
        timing: Timing,
        rng: random.Random,
        now: float,
    ) -> None:
        self.me = me
        self.log = log
        self.stale = 0
        self.elections = 0
        self._seams = Seams(rng)
        self._outbox: list[Outgoing] = []
        self._committed: list[LogEntry] = []
        self._snapshots: list[Member] = []
        self._linked: set[Member] = set()
        self._granted: set[Member] = set()
        self._round = 0
        self._rounds: dict[Member, int] = {}
        self._snapshot_until: dict[Member, float] = {}
        self._heard = now
        self._patience = 2 * timing.election_ticks * timing.tick_ms / 1000
        self._seams.now = now
        with self._seams.active():
            super().__init__(node_of(me), (), conf=_conf(log, timing), transport=_Wire(self._put))
        self._SyncObj__raftLastApplied = applied
        self._SyncObj__raftCommitIndex = max(applied, log.hard.commit)
        self._adopt()

    # --- plumbing ---------------------------------------------------------------------------------

    def _run(self, now: float, work: Callable[[], T]) -> T:
        self._seams.now = now
        with self._seams.active():
            return work()

    def _put(self, to: Member, message: RaftMessage, entries: Sequence[LogEntry] = ()) -> None:
        if to in self._linked:
            self._outbox.append(Outgoing(to, message, entries))

    def _adopt(self) -> None:
        """Bring the library's sets of nodes in line with the membership in the log.

        PySyncObj replays pickled "add" and "rem" entries, in reverse when it truncates; an entry
        that holds the whole membership cannot get out of step.
        """
        members = self.log.members
        self._SyncObj__selfNode = node_of(self.me) if self.me in members.voters else None
        self._SyncObj__otherNodes = {node_of(m) for m in members.voters if m != self.me}
        self._SyncObj__readonlyNodes = {node_of(m) for m in members.learners if m != self.me}
        nodes = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        for known in (self._SyncObj__raftNextIndex, self._SyncObj__raftMatchIndex):
            for node in [node for node in known if node not in nodes]:
                del known[node]
        if self._SyncObj__raftState == LEADER:
            for node in nodes:
                self._SyncObj__raftNextIndex.setdefault(node, self.log.last_index + 1)
                self._SyncObj__raftMatchIndex.setdefault(node, 0)
                self._SyncObj__lastResponseTime.setdefault(node, self._seams.now)
        elif self._SyncObj__selfNode is None:
            self._SyncObj__raftState = FOLLOWER
        self._adopt_links()

    def _adopt_links(self) -> None:
        nodes = self._SyncObj__otherNodes | self._SyncObj__readonlyNodes
        self._SyncObj__connectedNodes = {node for node in nodes if node.member in self._linked}

    def _voter(self, member: Member) -> bool:
        return member != self.me and member in self.log.members.voters

    def _step_down(self, term: int) -> None:
        if term > self._SyncObj__raftCurrentTerm:
            self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__raftLeader = None
        self._SyncObj__setState(FOLLOWER)

    # --- overrides of the library -----------------------------------------------------------------

    def _SyncObj__connectedToAnyone(self) -> bool:
        """Stand for election only with a majority in reach.

        With one peer in reach, or none, a node as shipped counts its term up all the time that it
        is cut off, and deposes a good leader when it is back; there is no PreVote to stop it.
        """
        voters = len(self._SyncObj__otherNodes) + 1
        reached = sum(1 for node in self._SyncObj__otherNodes if node.member in self._linked) + 1
        return 2 * reached > voters

    def _SyncObj__applyLogEntries(self) -> bool:
        """Hand committed entries out; applying them is the engine's, after its ``fsync``.

        As shipped, a command that raises is tried again for ever and nothing after it is applied.
        """
        first, last = self._SyncObj__raftLastApplied + 1, self._SyncObj__raftCommitIndex
        for index in range(first, last + 1):
            self._committed.append(self.log.entry(index))
        self._SyncObj__raftLastApplied = max(last, first - 1)
        return last >= first

    def _checkCommandsToApply(self) -> None:
        """Do nothing: proposals come through ``append``, checked."""

    def _SyncObj__tryLogCompaction(self) -> None:
        """Do nothing: the engine writes snapshots, with a schema, without a fork."""

    def _SyncObj__setState(self, new: int) -> None:
        if new == CANDIDATE:
            self.elections += 1
            self._granted.clear()
        super()._SyncObj__setState(new)

    def _SyncObj__onBecomeLeader(self) -> None:
        """Forget what was acknowledged to an earlier leadership of this node."""
        self._rounds.clear()
        self._snapshot_until.clear()
        self._SyncObj__raftNextIndex.clear()
        self._SyncObj__raftMatchIndex.clear()
        super()._SyncObj__onBecomeLeader()

    def _SyncObj__sendAppendEntries(self) -> None:
        """Send each peer what it lacks, within bounds; snapshots are the engine's.

        As shipped, everything a peer lacks is queued at once, long entries go pickled in parts that
        a reconnection can join wrongly, and the snapshot is a pickle.
        """
        self._SyncObj__newAppendEntriesTime = (
            self._seams.now + self._SyncObj__conf.appendEntriesPeriod
        )
        for node in sorted(self._SyncObj__connectedNodes, key=lambda node: node.member):
            self._send_to(node)

    def _send_to(self, node: Node) -> None:
        following = self._SyncObj__raftNextIndex[node]
        if following <= self.log.base_index:
            until = self._snapshot_until.get(node.member)
            if until is None or until < self._seams.now:
                self._snapshot_until[node.member] = self._seams.now + SNAPSHOT_SECONDS
                self._snapshots.append(node.member)
            self._put_append(node, self.log.base_index, ())
            return
        ahead = self._SyncObj__raftMatchIndex[node] + MAX_AHEAD
        for batch in range(MAX_BATCHES):
            entries = self.log.entries(following, MAX_BATCH_ENTRIES, MAX_BATCH_BYTES)
            if batch and (not entries or following > ahead):
                break
            self._put_append(node, following - 1, entries if following <= ahead else ())
            if following <= ahead:
                following += len(entries)
        self._SyncObj__raftNextIndex[node] = following

    def _put_append(self, node: Node, prev: int, entries: Sequence[LogEntry]) -> None:
        prev_term = self.log.term_at(prev)
        assert prev_term is not None
        commit, term = self._SyncObj__raftCommitIndex, self._SyncObj__raftCurrentTerm
        message = Append(term, prev, prev_term, commit, self._round, len(entries))
        self._put(node.member, message, entries)

    # --- messages ---------------------------------------------------------------------------------

    def _library(self, sender: Member, message: dict[str, Any], now: float) -> None:
        self._run(now, lambda: self._SyncObj__onMessageReceived(node_of(sender), message))

    def _asked_for_vote(self, sender: Member, ask: RequestVote, now: float) -> None:
        if not self._voter(sender):
            raise Refused(f"{sender.peer} does not vote.", code="not_a_voter")
        fields = {
            "type": "request_vote",
            "term": ask.term,
            "last_log_index": ask.last_index,
            "last_log_term": ask.last_term,
        }
        self._library(sender, fields, now)

    def _got_vote(self, sender: Member, vote: Vote, now: float) -> None:
        """Count a vote once: as shipped, one that comes twice counts twice."""
        if not self._voter(sender):
            raise Refused(f"{sender.peer} does not vote.", code="not_a_voter")
        late = vote.term != self._SyncObj__raftCurrentTerm
        if late or self._SyncObj__raftState != CANDIDATE or sender in self._granted:
            self.stale += 1
            return
        self._granted.add(sender)
        self._library(sender, {"type": "response_vote", "term": vote.term}, now)

    def _told_to_stand(self, sender: Member, message: TimeoutNow, now: float) -> None:
        if not self._voter(sender):
            raise Refused(f"{sender.peer} does not vote.", code="not_a_voter")
        if message.term != self._SyncObj__raftCurrentTerm:
            self.stale += 1
            return
        self._library(sender, {"type": "timeout_now", "term": message.term}, now)

    def _acknowledged(self, sender: Member, reply: NextIndex, now: float) -> None:
        """Take a follower's word for what it holds.

        As shipped an acknowledgement names no term, so one for an earlier leadership counts for
        this one, and none is checked against the log: it may say more than there is.
        """
        term = self._SyncObj__raftCurrentTerm
        if reply.term > term:
            if self._voter(sender):
                self._step_down(reply.term)
            return
        node = node_of(sender)
        known = node in self._SyncObj__raftMatchIndex
        if reply.term < term or self._SyncObj__raftState != LEADER or not known:
            self.stale += 1
            return
        last = self.log.last_index
        wrong = reply.next_index - 1 > last or reply.round > self._round
        if reply.success and (wrong or reply.reset or reply.next_index == 0):
            raise CorruptData(
                f"{sender.peer} acknowledged entry {reply.next_index - 1} of {last}.",
                code="protocol_error",
            )
        matched = self._SyncObj__raftMatchIndex[node]
        sent = self._SyncObj__raftNextIndex[node]
        following = min(max(reply.next_index, matched + 1), last + 1)
        fields = {
            "type": "next_node_idx",
            "next_node_idx": following,
            "reset": reply.reset,
            "success": reply.success,
        }
        self._library(sender, fields, now)
        self._rounds[sender] = max(self._rounds.get(sender, 0), min(reply.round, self._round))
        if reply.success:
            if reply.next_index > self.log.base_index:
                self._snapshot_until.pop(sender, None)
            # as shipped, entries that are on their way already are sent again
            following = max(following, sent)
            self._SyncObj__raftNextIndex[node] = following
        if self.log.base_index < following <= last and sender in self._linked:
            self._run(now, lambda: self._send_to(node))

    def _check_leader(self, sender: Member, term: int) -> None:
        """Refuse to be led by just anybody.

        A voter of the last membership known here may lead, and so may the leader followed now.
        Somebody else only when no leader was heard of for long: then the membership may have moved
        on while this node was away (or it is new and knows none).
        """
        leader = self._SyncObj__raftLeader
        known = self._voter(sender) or (leader is not None and leader.member == sender)
        silent = self._seams.now - self._heard > self._patience or not self.log.members.voters
        if sender == self.me or not (known or silent):
            raise Refused(f"{sender.peer} is no voter known here.", code="not_a_voter")
        if (
            term == self._SyncObj__raftCurrentTerm
            and leader is not None
            and leader.member != sender
        ):
            raise Refused(f"{sender.peer} leads no term of this log.", code="not_the_leader")

    def _follow(self, sender: Member, term: int, now: float) -> None:
        if term > self._SyncObj__raftCurrentTerm:
            self._SyncObj__transferInProgress = False
            self._SyncObj__setCurrentTerm(term, None)
        if not self._SyncObj__transferInProgress:
            timeout = self._run(now, self._SyncObj__generateRaftTimeout)
            self._SyncObj__raftElectionDeadline = now + timeout
        self._SyncObj__raftLeader = node_of(sender)
        self._SyncObj__setState(FOLLOWER)
        self._heard = now

    def _late_leader(self, sender: Member, term: int, round_: int) -> bool:
        """Tell a leader of an earlier term of the later one; as shipped it hears nothing."""
        current = self._SyncObj__raftCurrentTerm
        if term >= current:
            return False
        self.stale += 1
        self._put(sender, NextIndex(current, 0, reset=False, success=False, round=round_))
        return True

    def _appended(
        self, sender: Member, message: Append, entries: Sequence[LogEntry], now: float
    ) -> None:
        """Take entries from the leader.

        As shipped, everything behind ``prev_index`` is cut off before the entries are added, so a
        late or repeated message takes away entries that were acknowledged, committed and applied;
        and what a leader says is committed is believed of entries that were never compared.
        """
        self._seams.now = now
        if self._late_leader(sender, message.term, message.round):
            return
        self._check_leader(sender, message.term)
        self._check_entries(sender, message, entries)
        differs = self._first_difference(sender, message, entries)
        self._follow(sender, message.term, now)
        reply = NextIndex(message.term, 0, reset=True, success=False, round=message.round)
        mine = self.log.term_at(message.prev_index)
        if message.prev_index > self.log.last_index:
            self._put(sender, msgspec.structs.replace(reply, next_index=self.log.last_index + 1))
            return
        if message.prev_index > self.log.base_index and mine != message.prev_term:
            self._put(sender, msgspec.structs.replace(reply, next_index=self._retreat(message)))
            return
        if differs <= self.log.last_index:
            self.log.truncate(differs)
        for entry in entries:
            if entry.index > self.log.last_index:
                self.log.add(entry.data, entry.index, entry.term)
        if entries:
            self._adopt()
        verified = max(message.prev_index + len(entries), self.log.base_index)
        self._advance_commit(min(message.commit, verified))
        self._put(
            sender,
            NextIndex(message.term, verified + 1, reset=False, success=True, round=message.round),
        )

    def _check_entries(self, sender: Member, message: Append, entries: Sequence[LogEntry]) -> None:
        index, term = message.prev_index, message.prev_term
        for entry in entries:
            index += 1
            if entry.index != index or not term <= entry.term <= message.term:
                raise CorruptData(
                    f"{sender.peer} sent entry {entry.index} of term {entry.term} after"
                    f" {index - 1} of term {term}.",
                    code="protocol_error",
                )
            term = entry.term

    def _first_difference(
        self, sender: Member, message: Append, entries: Sequence[LogEntry]
    ) -> int:
        """Return the index from which the log differs from ``entries``; past its end if nowhere.

        Raises :class:`CorruptData` (``log_diverged``) if that is committed here.
        """
        commit = self._SyncObj__raftCommitIndex
        log = self.log
        mine = log.term_at(message.prev_index)
        if mine is not None and mine != message.prev_term and message.prev_index <= commit:
            raise _diverged(sender, message.prev_index)
        for entry in entries:
            if not log.base_index < entry.index <= log.last_index:
                continue
            if log.entry(entry.index) == entry:
                continue
            if entry.index <= commit or log.term_at(entry.index) == entry.term:
                raise _diverged(sender, entry.index)
            return entry.index
        return log.last_index + 1

    def _retreat(self, message: Append) -> int:
        """Return where to try next: the first entry of the term that does not agree."""
        index = message.prev_index
        term = self.log.term_at(index)
        while index - 1 > self._SyncObj__raftCommitIndex and self.log.term_at(index - 1) == term:
            index -= 1
        return index

    def _advance_commit(self, commit: int) -> None:
        if commit > self._SyncObj__raftCommitIndex:
            self._SyncObj__raftCommitIndex = commit
            self._SyncObj__leaderCommitIndex = commit
            self.log.setRaftCommitIndex(commit)

    def _snapshot(
        self, sender: Member, message: InstallSnapshot, members: Members, now: float
    ) -> bool:
        """Take a snapshot unless all it holds is committed here; entries after it stay."""
        self._seams.now = now
        if self._late_leader(sender, message.term, message.round):
            return False
        self._check_leader(sender, message.term)
        if message.snapshot_term > message.term:
            raise CorruptData(
                f"{sender.peer} sent a snapshot of the future.", code="protocol_error"
            )
        self._follow(sender, message.term, now)
        ahead = message.index > self._SyncObj__raftCommitIndex
        if ahead:
            self.log.install(message.index, message.snapshot_term, members)
            self._SyncObj__raftCommitIndex = message.index
            self._SyncObj__raftLastApplied = message.index
            self._adopt()
        self._put(
            sender,
            NextIndex(
                message.term, message.index + 1, reset=False, success=True, round=message.round
            ),
        )
        return ahead


def _diverged(sender: Member, index: int) -> CorruptData:
    return CorruptData(
        f"{sender.peer} sent another entry {index} than the one that is committed here.",
        code="log_diverged",
        remedy="One of the two logs was restored from an old backup; compare them on every node.",
        index=index,
    )
