"""PySyncObj as a Raft core without I/O: what :class:`pyagent_node.native.RaftCore` is for raft-rs.

It has the same methods under the same contract, so that one shell drives both (that class says
what each method promises).  Where they differ:

- Voters come and go **one at a time**.  A larger change goes step by step, led on by whoever leads;
  its first steps hold even if its last ones never come.  A newcomer votes once it has caught up.  A
  leader that loses its vote does so last, and names an heir.
- An election takes one more round than it would need: the question whether it would be won.
- Everything is sent only when it is durable; the leader's own write delays its followers'.

Pure: time is counted in ticks, and what is random is drawn by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pyagent_node.base.errors import PyAgentError
from pyagent_node.consensus.pysyncobj_log import CoreLog
from pyagent_node.consensus.pysyncobj_messages import (
    MAX_CONTEXT,
    MESSAGES,
    REGULAR,
    Append,
    AskIndex,
    Entry,
    InstallSnapshot,
    Membership,
    Message,
    NextIndex,
    RequestVote,
    TimeoutNow,
    ToldIndex,
    Vote,
    check_content,
    check_members,
    content_of,
    decode_membership,
    encode_membership,
    to_raft_entry,
)
from pyagent_node.consensus.pysyncobj_quiet import CANDIDATE, LEADER, Node
from pyagent_node.consensus.pysyncobj_raft import HardenedSyncObj
from pyagent_node.consensus.pysyncobj_steps import Ready, Status, next_step
from pyagent_node.native import RaftConf, RaftDropped, RaftEntry, RaftRefused

MAX_TERM_STEP = 1 << 32
"""A message of a term further ahead is refused: it would use the terms up."""
MAX_READS = 1024

_KINDS: dict[type[Message], str] = {
    Append: "append",
    NextIndex: "append_response",
    RequestVote: "vote",
    Vote: "vote_response",
    InstallSnapshot: "snapshot",
    TimeoutNow: "timeout_now",
    AskIndex: "read_index",
    ToldIndex: "read_index_response",
}


class _Read(msgspec.Struct, frozen=True):
    """A read that waits for a majority to acknowledge the leader in ``round``."""

    round: int
    index: int
    asker: int
    context: bytes


class PySyncCore:
    """One node of a Raft group; see the module and :class:`pyagent_node.native.RaftCore`."""

    def __init__(
        self,
        node_id: int,
        *,
        conf: RaftConf,
        term: int,
        vote: int,
        commit: int,
        snapshot_index: int,
        snapshot_term: int,
        snapshot_data: bytes,
        entries: Sequence[RaftEntry],
        heartbeat_ticks: int,
        election_ticks: int,
        max_message_bytes: int,
        max_inflight: int,
        max_uncommitted_bytes: int,
    ) -> None:
        """Go on from what is durable.

        Raises :class:`CorruptData` (``bad_entry``), :class:`ConfigError` (``bad_timing``).
        ``max_inflight`` is not used: what is on its way is bounded by entries.
        """
        membership = Membership(conf.voters, conf.learners, conf.voters, conf.learners)
        later = [
            Entry(entry.index, entry.term, content_of(entry))
            for entry in entries
            if entry.index > snapshot_index
        ]
        log = CoreLog((snapshot_index, snapshot_term), membership, later, (term, vote, commit))
        self._raft = HardenedSyncObj(
            node_id,
            log,
            (snapshot_index, snapshot_term, membership, snapshot_data),
            heartbeat_ticks=heartbeat_ticks,
            election_ticks=election_ticks,
            max_batch_bytes=max_message_bytes,
        )
        self._conf = conf
        self._applied = snapshot_index
        self._election_ticks = election_ticks
        self._max_message_bytes = max_message_bytes
        self._max_uncommitted_bytes = max_uncommitted_bytes
        self._ticks = election_ticks
        self._unsent = False
        self._reads: list[_Read] = []
        self._read_states: list[tuple[int, bytes]] = []
        self._transferee = 0
        self._transfer_sent = False
        self._transfer_until = 0.0
        self.set_election_ticks(election_ticks)
        self._poll()

    # --- what it is -----------------------------------------------------------------------------

    @property
    def node_id(self) -> int:
        """This node's Raft id."""
        return self._raft.me

    @property
    def term(self) -> int:
        """The current term."""
        return self._raft._SyncObj__raftCurrentTerm

    @property
    def role(self) -> str:
        """``"leader"``, ``"follower"``, ``"candidate"`` or ``"learner"``."""
        state = self._raft._SyncObj__raftState
        if state == LEADER:
            return "leader"
        if self._raft.me not in self._raft.log.membership.voters:
            return "learner"
        return "candidate" if state == CANDIDATE else "follower"

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""
        node = self._raft._SyncObj__raftLeader
        return node.id if node is not None else 0

    @property
    def snapshot_wanted(self) -> bool:
        """Never: a snapshot of any age will do, the entries after it are kept."""
        return False

    @property
    def _commit(self) -> int:
        return self._raft._SyncObj__raftCommitIndex

    @property
    def _leads(self) -> bool:
        return self._raft._SyncObj__raftState == LEADER

    @property
    def _settled(self) -> bool:
        """Whether this leader has committed an entry of its own term, so knows what is committed.

        Before that it may neither answer a read nor change the voters.
        """
        noop = self._raft._SyncObj__noopIDx
        return self._leads and noop is not None and self._commit >= noop

    def _matched(self, node: int) -> int:
        if node == self._raft.me:
            return self._raft.log.last_index
        return self._raft._SyncObj__raftMatchIndex.get(Node(node), 0)

    def status(self) -> Status:
        """Return the core's view of itself."""
        log = self._raft.log
        return Status(
            term=self.term,
            vote=log.hard[1],
            leader=self.leader,
            role=self.role,
            commit=self._commit,
            applied=self._applied,
            last_index=log.last_index,
            first_index=log.base_index + 1,
            conf=self._conf,
            pending_conf=self._leads and log.membership_index > self._applied,
            transferee=self._transferee,
            uncommitted_bytes=log.bytes_after(self._commit) if self._leads else 0,
            progress=self._progress() if self._leads else [],
        )

    def _progress(self) -> list[tuple[int, int, bool, str]]:
        raft, membership = self._raft, self._raft.log.membership
        found = []
        for node in sorted(membership.voters + membership.learners):
            last = raft._SyncObj__lastResponseTime.get(Node(node), 0.0)
            active = node == raft.me or raft.now - last < self._election_ticks
            following = raft._SyncObj__raftNextIndex.get(Node(node), raft.log.last_index + 1)
            state = "snapshot" if following <= raft.log.base_index else "replicate"
            found.append((node, self._matched(node), active, state))
        return found

    # --- what is fed ----------------------------------------------------------------------------

    def tick(self) -> None:
        """Let one tick pass."""
        self._raft._seams.now += 1.0
        self._poll()

    def set_election_ticks(self, ticks: int) -> None:
        """Set the election timeout; the one that runs is moved accordingly."""
        if not self._election_ticks <= ticks < 2 * self._election_ticks:
            raise ValueError(f"{ticks} ticks are no election timeout")
        self._raft._SyncObj__raftElectionDeadline += ticks - self._ticks
        self._ticks = ticks
        # the library draws low + (high - low) * random(), and acts when that has passed
        self._raft._seams.draw = (ticks - 0.5) / self._election_ticks - 1.0

    def campaign(self) -> None:
        """Stand for election now; nothing on a leader or a node without a vote."""
        self._raft._SyncObj__raftElectionDeadline = self._raft.now - 1
        self._poll()

    def step(self, sender: int, message: bytes) -> None:
        """Take a message of node ``sender``.

        Raises ``RaftRefused`` for a malformed or impossible one; nothing has changed then.
        """
        try:
            decoded = MESSAGES.decode(message)
            if decoded.term > self.term + MAX_TERM_STEP:
                raise RaftRefused(f"node {sender:x} names a term far ahead")
            if sender == self.node_id:
                raise RaftRefused("a message of this node to itself")
            self._dispatch(sender, decoded)
        except PyAgentError as error:
            raise RaftRefused(str(error)) from None
        except (AssertionError, LookupError, AttributeError, TypeError) as error:
            raise _broken(error) from error
        self._poll()

    def _dispatch(self, sender: int, message: Message) -> None:
        raft = self._raft
        match message:
            case Append():
                for entry in message.entries:
                    check_content(entry.content)
                raft.take_append(sender, message)
            case NextIndex():
                raft.take_next_index(sender, message)
                self._settle_reads()
            case RequestVote():
                raft.take_request_vote(sender, message)
            case Vote():
                raft.take_vote(sender, message)
            case TimeoutNow():
                raft.take_timeout_now(sender, message)
            case InstallSnapshot():
                try:
                    check_members(message.voters, message.learners)
                except ValueError as error:
                    raise RaftRefused(f"a snapshot with bad members: {error}") from None
                raft.take_snapshot(sender, message)
            case AskIndex():
                if message.term == self.term and self._settled and len(self._reads) < MAX_READS:
                    self._begin_read(sender, message.context)
            case ToldIndex():
                if message.term == self.term and sender == self.leader:
                    self._read_states.append((message.index, message.context))
                else:
                    raft.stale += 1

    def propose(self, data: bytes, context: bytes = b"") -> tuple[int, int]:
        """Append a command on the leader; returns the ``(index, term)`` that it got."""
        if not data or len(data) > self._max_message_bytes or context:
            raise RaftRefused("a command must have data, not too much of it, and no context")
        if not self._leads or self._transferee:
            raise RaftDropped("this node does not lead, or is handing over")
        if self._raft.log.bytes_after(self._commit) > self._max_uncommitted_bytes:
            raise RaftDropped("too much is not committed yet")
        return self._append(REGULAR + data)

    def _append(self, content: bytes) -> tuple[int, int]:
        log = self._raft.log
        index = log.last_index + 1
        log.add(content, index, self.term)
        self._unsent = True
        return index, self.term

    def propose_conf(
        self, voters: Sequence[int], learners: Sequence[int], context: bytes = b""
    ) -> tuple[int, int] | None:
        """Begin the change to these voters and learners; returns where its first step is."""
        target_voters, target_learners = tuple(sorted(voters)), tuple(sorted(learners))
        try:
            check_members(target_voters, target_learners)
        except ValueError as error:
            raise RaftRefused(str(error)) from None
        now = self._raft.log.membership
        target = Membership(now.voters, now.learners, target_voters, target_learners, context)
        if not self._settled or self._transferee or self._raft.log.membership_index > self._commit:
            raise RaftDropped("this node does not lead, or changes the voters already")
        if target.complete:
            if now.complete:
                return None
        elif (target_voters, target_learners) == (now.target_voters, now.target_learners):
            raise RaftDropped("that change is under way")
        return self._change(self._next_step(target) or target)

    def _next_step(self, now: Membership) -> Membership | None:
        return next_step(now, self.node_id, self._raft.log.last_index, self._matched)

    def _change(self, membership: Membership) -> tuple[int, int]:
        placed = self._append(encode_membership(membership))
        self._raft.adopt()
        return placed

    def _advance_change(self) -> None:
        """Take the next step of a change, as the leader, when the last one is committed."""
        log = self._raft.log
        now = log.membership
        if now.complete or not self._settled or log.membership_index > self._commit:
            return
        step = self._next_step(now)
        if step is not None:
            self._change(step)

    def read_index(self, context: bytes) -> None:
        """Ask for a linearizable read; the answer comes in ``read_states``."""
        if not 0 < len(context) <= MAX_CONTEXT:
            raise RaftRefused("the context of a read has 1 to 64 bytes")
        if self._settled:
            if len(self._reads) >= MAX_READS:
                raise RaftDropped("too many reads wait")
            self._begin_read(self.node_id, context)
        elif self._leads or not self.leader:
            raise RaftDropped("there is no leader who could answer")
        else:
            self._raft.put(self.leader, AskIndex(self.term, context))

    def _begin_read(self, asker: int, context: bytes) -> None:
        """Note what is committed, and ask the voters whether this node still leads.

        PySyncObj has no such reads: a leader deposed without knowing would answer with old state.
        """
        self._raft.round += 1
        self._reads.append(_Read(self._raft.round, self._commit, asker, context))
        self._unsent = True
        self._settle_reads()

    def _settle_reads(self) -> None:
        raft = self._raft
        if not self._leads:
            self._reads.clear()
        while self._reads:
            read = self._reads[0]
            acknowledged = {
                node for node, known in raft.acknowledged_round.items() if known >= read.round
            }
            if not raft.majority({raft.me, *acknowledged}):
                return
            del self._reads[0]
            if read.asker == raft.me:
                self._read_states.append((read.index, read.context))
            else:
                raft.put(read.asker, ToldIndex(self.term, read.index, read.context))

    def transfer(self, to: int) -> None:
        """Begin to hand the leadership to a voter; given up after an election timeout."""
        if to not in self._raft.log.membership.voters:
            raise RaftRefused(f"node {to:x} has no vote")
        if not self._leads:
            raise RaftDropped("this node does not lead")
        if to not in (self.node_id, self._transferee):
            self._transferee, self._transfer_sent = to, False
            self._transfer_until = self._raft.now + self._election_ticks
            self._hand_over()

    def _hand_over(self) -> None:
        if not self._transferee:
            return
        if not self._leads or self._raft.now > self._transfer_until:
            self._transferee = 0
        elif not self._transfer_sent and self._matched(self._transferee) == (
            self._raft.log.last_index
        ):
            self._transfer_sent = True
            self._raft.run(lambda: self._raft.transferLeadership(Node(self._transferee)))

    def report_unreachable(self, node_id: int) -> None:
        """Note that messages to a node were lost: what it has not acknowledged is sent again."""
        matched = self._matched(node_id)
        known = self._raft._SyncObj__raftNextIndex
        if self._leads and matched and Node(node_id) in known:
            known[Node(node_id)] = matched + 1

    def report_snapshot(self, node_id: int, ok: bool) -> None:
        """Note how sending a snapshot ended."""
        if not ok:
            self._raft._snapshot_until.pop(node_id, None)

    def _poll(self) -> None:
        """Let the library look at what changed: elections, commitment, messages that are due."""
        raft = self._raft
        try:
            raft.run(lambda: raft.doTick(0.0))
        except (AssertionError, LookupError, AttributeError, TypeError) as error:
            raise _broken(error) from error
        if self._leads:
            self._advance_change()
        elif self._reads:
            self._reads.clear()
        self._hand_over()

    # --- what comes of it -----------------------------------------------------------------------

    def _flush(self) -> None:
        if self._unsent:
            self._unsent = False
            if self._leads:
                self._raft.run(self._raft._SyncObj__sendAppendEntries)
            self._poll()

    def has_ready(self) -> bool:
        """Whether :meth:`ready` has something."""
        self._flush()
        raft = self._raft
        return bool(
            raft.outbox
            or raft.committed
            or raft.installed is not None
            or self._read_states
            or raft.log.dirty
        )

    def ready(self) -> Ready:
        """Take what has to be done; everything is to be sent only when it is durable."""
        self._flush()
        raft = self._raft
        entries, hard, must_sync = raft.log.unsaved()
        snapshot = None
        if raft.installed is not None:
            index, term, membership, data = raft.installed
            self._conf = RaftConf(membership.voters, membership.learners)
            self._applied = index
            snapshot = (index, term, self._conf, data)
        ready = Ready(
            messages=[],
            persisted_messages=[(to, _KINDS[type(m)], MESSAGES.encode(m)) for to, m in raft.outbox],
            entries=[to_raft_entry(e.index, e.term, e.content) for e in entries],
            hard_state=hard,
            must_sync=must_sync or snapshot is not None,
            snapshot=snapshot,
            committed=[to_raft_entry(e.index, e.term, e.content) for e in raft.committed],
            read_states=self._read_states,
        )
        raft.outbox, raft.committed, raft.installed, self._read_states = [], [], None, []
        return ready

    def advance(self) -> Ready:
        """Say that what :meth:`ready` gave is durable; nothing follows from that at once."""
        return Ready([], [], [], None, False, None, [], [])

    def advance_apply(self, index: int) -> None:
        """Say that all entries up to ``index`` are applied."""
        if not self._applied <= index <= self._raft._SyncObj__raftLastApplied:
            raise ValueError(f"entry {index} was not handed out, or is applied already")
        self._applied = index
        membership = self._raft.log.membership
        gone = self._leads and self.node_id not in membership.voters
        if gone and index >= self._raft.log.membership_index:
            self._raft.retire()

    def apply_conf(self, entry: RaftEntry) -> RaftConf:
        """Return the configuration that holds after a committed entry of kind 1."""
        membership = decode_membership(content_of(entry))
        self._conf = RaftConf(membership.voters, membership.learners)
        return self._conf

    def snapshot(self, index: int, data: bytes) -> tuple[int, int, RaftConf, bytes]:
        """Keep ``data`` as the state after entry ``index``, for followers that lag behind."""
        log = self._raft.log
        term = log.term_at(index)
        if term is None or not self._raft.last_snapshot[0] <= index <= self._applied:
            raise ValueError(f"there can be no snapshot of entry {index}")
        membership = log.membership_at(index)
        self._raft.last_snapshot = (index, term, membership, data)
        return index, term, RaftConf(membership.voters, membership.learners), data

    def compact(self, index: int) -> None:
        """Drop the entries up to ``index`` (at most the snapshot's) from memory."""
        index = min(index, self._raft.last_snapshot[0])
        if index > self._raft.log.base_index:
            self._raft.log.forget(index)

    def take_log(self) -> list[tuple[str, str]]:
        """Return nothing: PySyncObj has nothing to say that the shell does not see."""
        return []


def _broken(error: Exception) -> RuntimeError:
    """Return what the shell takes for the end of this node's core."""
    return RuntimeError(f"PySyncObj failed with {type(error).__name__}: {error}")
