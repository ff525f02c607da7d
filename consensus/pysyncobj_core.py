"""PySyncObj as a Raft core without I/O: what :class:`pyagent_node.native.RaftCore` is for raft-rs.

It has the same methods under the same contract, so that one shell drives both (that class says
what each method promises).  Where they differ:

- Voters come and go **one at a time**.  A larger change goes step by step, led on by whoever leads;
  its first steps hold even if its last ones never come.  A newcomer votes once it has caught up.  A
  leader that loses its vote does so last, and names an heir.

Pure: time is counted in ticks, and what is random is drawn by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyagent_node.base.errors import PyAgentError
from pyagent_node.consensus.pysyncobj_leader import Leadership
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
    to_raft_entry,
)
from pyagent_node.consensus.pysyncobj_quiet import CANDIDATE, LEADER
from pyagent_node.consensus.pysyncobj_raft import HardenedSyncObj
from pyagent_node.consensus.pysyncobj_steps import Ready, Status
from pyagent_node.native import RaftConf, RaftDropped, RaftEntry, RaftRefused

MAX_TERM_STEP = 1 << 32
"""A message of a term further ahead is refused: it would use the terms up."""

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
        self._leadership = Leadership(self._raft, election_ticks)
        self._conf = conf
        self._applied = snapshot_index
        self._election_ticks = self._ticks = election_ticks
        self._max_message_bytes = max_message_bytes
        self._max_uncommitted_bytes = max_uncommitted_bytes
        self.set_election_ticks(election_ticks)
        self._look()

    # --- what it is -----------------------------------------------------------------------------

    @property
    def node_id(self) -> int:
        """This node's Raft id."""
        return self._raft.me

    @property
    def term(self) -> int:
        """The current term."""
        return self._raft.term

    @property
    def role(self) -> str:
        """``"leader"``, ``"follower"``, ``"candidate"`` or ``"learner"``."""
        if self._raft.state == LEADER:
            return "leader"
        if self.node_id not in self._raft.log.membership.voters:
            return "learner"
        return "candidate" if self._raft.state == CANDIDATE else "follower"

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""
        return self._raft.leader

    @property
    def snapshot_wanted(self) -> bool:
        """Never: a snapshot of any age will do, the entries after it are kept."""
        return False

    @property
    def stale(self) -> int:
        """Messages that came too late or twice, and were dropped."""
        return self._raft.stale

    def status(self) -> Status:
        """Return the core's view of itself."""
        raft, log = self._raft, self._raft.log
        leads = self._leadership.leads
        nodes = sorted(log.membership.voters + log.membership.learners) if leads else []
        return Status(
            term=raft.term,
            vote=log.hard[1],
            leader=raft.leader,
            role=self.role,
            commit=raft.commit,
            applied=self._applied,
            last_index=log.last_index,
            first_index=log.base_index + 1,
            conf=self._conf,
            pending_conf=leads and log.membership_index > self._applied,
            transferee=self._leadership.transferee,
            uncommitted_bytes=log.bytes_after(raft.commit) if leads else 0,
            progress=[raft.progress(node) for node in nodes],
        )

    # --- what is fed ----------------------------------------------------------------------------

    def tick(self) -> None:
        """Let one tick pass."""
        self._raft.tick()
        self._look()

    def set_election_ticks(self, ticks: int) -> None:
        """Set the election timeout; the one that runs is moved accordingly."""
        if not self._election_ticks <= ticks < 2 * self._election_ticks:
            raise ValueError(f"{ticks} ticks are no election timeout")
        self._raft.wait_longer(ticks - self._ticks)
        self._raft.draw(ticks)
        self._ticks = ticks

    def campaign(self) -> None:
        """Stand for election now; nothing on a leader or a node without a vote."""
        self._raft.stand()
        self._look()

    def step(self, sender: int, message: bytes, trust: int = 2) -> None:
        """Take a message of node ``sender``; see :class:`pyagent_node.native.RaftCore`.

        Raises ``RaftRefused`` for a malformed or impossible one; nothing has changed then.
        """
        try:
            decoded = MESSAGES.decode(message)
            if decoded.term > self.term + MAX_TERM_STEP:
                raise RaftRefused(f"node {sender:x} names a term far ahead")
            if sender == self.node_id:
                raise RaftRefused("a message of this node to itself")
            _check_trust(decoded, trust, self.term)
            _guarded(lambda: self._dispatch(sender, decoded))
        except PyAgentError as error:
            raise RaftRefused(str(error)) from None
        self._look()

    def _dispatch(self, sender: int, message: Message) -> None:
        raft = self._raft
        match message:
            case Append():
                for entry in message.entries:
                    check_content(entry.content)
                raft.take_append(sender, message)
            case NextIndex():
                raft.take_next_index(sender, message)
                self._leadership.settle_reads()
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
                self._asked(sender, message)
            case ToldIndex():
                if message.term == self.term and sender == self.leader:
                    self._leadership.read_states.append((message.index, message.context))
                else:
                    raft.stale += 1

    def _asked(self, sender: int, message: AskIndex) -> None:
        try:
            if message.term != self.term:
                raise RaftDropped("the question is of another term")
            self._leadership.begin_read(sender, message.context)
        except RaftDropped:  # it will be asked again
            self._raft.stale += 1

    def propose(self, data: bytes, context: bytes = b"") -> tuple[int, int]:
        """Append a command on the leader; returns the ``(index, term)`` that it got."""
        if not data or len(data) > self._max_message_bytes or context:
            raise RaftRefused("a command must have data, not too much of it, and no context")
        if not self._leadership.leads or self._leadership.transferee:
            raise RaftDropped("this node does not lead, or is handing over")
        if self._raft.log.bytes_after(self._raft.commit) > self._max_uncommitted_bytes:
            raise RaftDropped("too much is not committed yet")
        return self._leadership.append(REGULAR + data)

    def propose_conf(
        self, voters: Sequence[int], learners: Sequence[int], context: bytes = b""
    ) -> tuple[int, int] | None:
        """Begin the change to these voters and learners; returns where its first step is."""
        return self._leadership.propose_conf(voters, learners, context)

    def read_index(self, context: bytes) -> None:
        """Ask for a linearizable read; the answer comes in ``read_states``."""
        if not 0 < len(context) <= MAX_CONTEXT:
            raise RaftRefused("the context of a read has 1 to 64 bytes")
        if self._leadership.leads:
            self._leadership.begin_read(self.node_id, context)
        elif not self.leader:
            raise RaftDropped("there is no leader who could answer")
        else:
            self._raft.put(self.leader, AskIndex(self.term, context))

    def transfer(self, to: int) -> None:
        """Begin to hand the leadership to a voter; given up after an election timeout."""
        self._leadership.transfer(to)

    def report_unreachable(self, node_id: int) -> None:
        """Note that messages to a node were lost: what it has not acknowledged is sent again."""
        self._raft.lost(node_id)

    def report_snapshot(self, node_id: int, ok: bool) -> None:
        """Note how sending a snapshot ended."""
        if not ok:
            self._raft.snapshot_lost(node_id)

    def _look(self) -> None:
        _guarded(self._raft.look)
        self._leadership.look()

    # --- what comes of it -----------------------------------------------------------------------

    def _flush(self) -> None:
        if self._leadership.unsent:
            self._leadership.unsent = False
            if self._leadership.leads:
                _guarded(self._raft.broadcast)
            self._look()

    def has_ready(self) -> bool:
        """Whether :meth:`ready` has something."""
        self._flush()
        raft = self._raft
        return bool(
            raft.outbox
            or raft.committed
            or raft.installed is not None
            or self._leadership.read_states
            or raft.log.dirty
        )

    def ready(self) -> Ready:
        """Take what has to be done; a leader's entries may be sent before they are durable."""
        self._flush()
        raft = self._raft
        entries, hard, must_sync = raft.log.unsaved()
        snapshot = None
        if raft.installed is not None:
            index, term, membership, data = raft.installed
            self._conf = RaftConf(membership.voters, membership.learners)
            self._applied = index
            snapshot = (index, term, self._conf, data)
        # A leader may not count what it has not written itself.  It does not: whose acknowledgement
        # it counts was sent the entry in an earlier turn, at the end of which it was written here.
        early = not raft.majority({self.node_id})
        now: list[tuple[int, str, bytes]] = []
        later: list[tuple[int, str, bytes]] = []
        for to, message in raft.outbox:
            chosen = now if early and isinstance(message, Append) else later
            chosen.append((to, _KINDS[type(message)], MESSAGES.encode(message)))
        ready = Ready(
            messages=now,
            persisted_messages=later,
            entries=[to_raft_entry(e.index, e.term, e.content) for e in entries],
            hard_state=hard,
            must_sync=must_sync or snapshot is not None,
            snapshot=snapshot,
            committed=[to_raft_entry(e.index, e.term, e.content) for e in raft.committed],
            read_states=self._leadership.read_states,
        )
        raft.outbox, raft.committed, raft.installed = [], [], None
        self._leadership.read_states = []
        return ready

    def advance(self) -> Ready:
        """Say that what :meth:`ready` gave is durable; nothing follows from that at once."""
        return Ready([], [], [], None, False, None, [], [])

    def advance_apply(self, index: int) -> None:
        """Say that all entries up to ``index`` are applied."""
        if not self._applied <= index <= self._raft.handed_out:
            raise ValueError(f"entry {index} was not handed out, or is applied already")
        self._applied = index
        self._leadership.retire(index)

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


def _check_trust(message: Message, trust: int, term: int) -> None:
    """Raise ``RaftRefused`` for what a node without a vote does not say."""
    if trust < 2 and not isinstance(message, Vote | NextIndex | AskIndex):
        raise RaftRefused("only a voter says such a thing")
    if trust < 1 and message.term > term:
        raise RaftRefused("only a voter ends a term")


def _guarded(work: Callable[[], None]) -> None:
    """Run the library's code; a failure inside it is the end of this core.

    Raises ``RuntimeError``, which the shell takes for that.
    """
    try:
        work()
    except (AssertionError, LookupError, AttributeError, TypeError) as error:
        raise RuntimeError(f"PySyncObj failed with {type(error).__name__}: {error}") from error
