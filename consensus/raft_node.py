"""The loop around the Raft core: clock and messages in, disk and messages out.

One task drives the core.  Everything else only queues something and wakes it.  A turn feeds the
core with all that waits and then works off what it asks for, in the order that makes it safe: what
may be sent at once, then the disk (everything that waited shares one ``fsync``), then what may only
be said when it is durable, then what is committed is applied.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable

import msgspec
import trio

from pyagent_node.base.errors import (
    CorruptData,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.raft_applier import Applier
from pyagent_node.consensus.raft_core import Core, NewCore, Ready
from pyagent_node.consensus.raft_disk import Disk
from pyagent_node.consensus.raft_members import ANSWERS, LATER_ANSWERS, Members, voters_of
from pyagent_node.consensus.raft_messages import Hello
from pyagent_node.consensus.raft_storage import (
    Loaded,
    decode_content,
    encode_content,
)
from pyagent_node.consensus.replica import Outcome, Replica
from pyagent_node.native import (
    RaftConf,
    RaftRefused,
)

log = logging.getLogger("pyagent_node.consensus.raft")

MAX_MESSAGE_BYTES = MIB
MAX_INFLIGHT = 64
MAX_UNCOMMITTED_BYTES = 16 * MIB
STEPS_A_TURN = 256
COMPACT_BYTES = 16 * MIB
KEPT_BEHIND = 1024
"""Entries that stay in memory behind a snapshot, for followers that are a little late."""
SAVE_TICKS = 2
"""How often a commit index is written that came with nothing else to write."""
LATER_TICKS = 300
"""How long one later term that a node without a vote tells of is enough: it may be one that voted
before, or one that wants the leader to step down again and again."""
LONELY_TIMEOUTS = 4
"""Election timeouts without a leader after which strangers are listened to."""

_LEVELS = {"critical": logging.ERROR, "error": logging.ERROR, "warning": logging.INFO}


class RaftTiming(msgspec.Struct, frozen=True):
    """The clock of the engine: an election begins after ``election_ticks`` to twice as many."""

    tick_ms: float = 100.0
    heartbeat_ticks: int = 2
    election_ticks: int = 10

    @property
    def tick_seconds(self) -> float:
        """One tick."""
        return self.tick_ms / 1000

    @property
    def election_seconds(self) -> float:
        """The longest wait for a sign of the leader before an election."""
        return 2 * self.election_ticks * self.tick_seconds


class RaftCounters(msgspec.Struct):
    """What the engine counts, for ``/metrics``."""

    entries: int = 0
    elections: int = 0
    snapshots_made: int = 0
    refused_messages: int = 0
    refused_proposals: int = 0


class Inbound(msgspec.Struct, frozen=True):
    """A Raft message that waits for its turn."""

    peer: PeerId
    hello: Hello
    data: bytes
    done: Callable[[], None]


class Compaction:
    """Somebody waits for a snapshot."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: PyAgentError | None = None


class Hooks(msgspec.Struct):
    """What the engine around the loop does at certain moments; none of them blocks."""

    send: Callable[[int, str, bytes], None]
    feed: Callable[[], None]
    changed: Callable[[], None]
    applied: Callable[[Outcome], None]
    installed: Callable[[Replica], None]
    advanced: Callable[[], None]
    read: Callable[[int, bytes], None]
    disk_refused: Callable[[PyAgentError], None]
    may_vote: Callable[[PeerId], bool]


class RaftNode:
    """Core, log and state of one node."""

    def __init__(
        self,
        store: LogStore,
        loaded: Loaded,
        incarnation: bytes,
        members: Members,
        *,
        timing: RaftTiming,
        rng: random.Random,
        compact_entries: int,
        hooks: Hooks,
        new_core: NewCore,
    ) -> None:
        self.counters = RaftCounters()
        self.applier = Applier(loaded, members, hooks.applied)
        self.history = self.applier.history
        self.members = members
        self.timing = timing
        self.tick = 0
        self.disk = Disk(store, loaded, incarnation, hooks.disk_refused)
        self.lost: set[int] = set()
        self.snapshots_sent: list[tuple[int, bool]] = []
        self._rng = rng
        self._hooks = hooks
        self._kind = new_core
        self._compact_entries = compact_entries
        self._compacted_bytes = 0
        self._inbound: deque[Inbound] = deque()
        self._compactions: list[Compaction] = []
        self._compact_at = loaded.snapshot_index + compact_entries
        self._wake = trio.Event()
        self._tick_due = False
        self._leader_seen = 0
        self._leader_heard = 0
        self._later_at = 0
        self._view = (0, "", 0)
        self.core = self._new_core()

    def _new_core(self) -> Core:
        core = self._kind(
            self.members.me,
            **self.disk.core_state(),
            heartbeat_ticks=self.timing.heartbeat_ticks,
            election_ticks=self.timing.election_ticks,
            max_message_bytes=MAX_MESSAGE_BYTES,
            max_inflight=MAX_INFLIGHT,
            max_uncommitted_bytes=MAX_UNCOMMITTED_BYTES,
        )
        core.set_election_ticks(self._draw())
        return core

    def _draw(self) -> int:
        ticks = self.timing.election_ticks
        return self._rng.randrange(ticks, 2 * ticks)

    @property
    def leads(self) -> bool:
        """Whether this node is the leader."""
        return self.core.role == "leader"

    @property
    def leader(self) -> int:
        """Raft id of the leader, 0 while there is none.

        A node without a vote never misses its leader by itself, so its silence is measured here.
        """
        leader = self.core.leader
        silent = self.tick - self._leader_heard > 2 * self.timing.election_ticks
        return 0 if silent and self.core.role == "learner" else leader

    @property
    def leaderless(self) -> int:
        """For how many ticks there has been no leader."""
        return 0 if self.leader else self.tick - self._leader_seen

    @property
    def lonely(self) -> bool:
        """Whether there has been no leader for so long that the configuration may be an old one."""
        return self.tick - self._leader_seen > LONELY_TIMEOUTS * self.timing.election_ticks

    def trust(self, peer: PeerId, hello: Hello) -> int | None:
        """How much Raft messages of a peer count at present; see :meth:`Members.trust`."""
        return self.members.trust(
            peer,
            hello,
            leader=self.core.leader,
            lonely=self.lonely,
            may_vote=self._hooks.may_vote,
        )

    def poke(self) -> None:
        """Have the loop take a turn."""
        self._wake.set()

    def take(self, message: Inbound) -> None:
        """Queue a Raft message for the next turn."""
        self._inbound.append(message)
        self.poke()

    async def compact(self) -> int:
        """Have a snapshot written; see ``Consensus.compact``."""
        wanted = Compaction()
        self._compactions.append(wanted)
        self.poke()
        await wanted.done.wait()
        if wanted.error is not None:
            raise wanted.error
        return self.disk.snapshot_index

    async def start(self) -> None:
        """Bring the state to where the log is known to be committed; campaign if alone."""
        if self.members.conf == RaftConf([self.members.me]):
            self.core.campaign()
        await self._work_off()
        self._look()

    async def clock(self) -> None:
        """Let ticks pass, for ever.  Ticks that come while the loop is busy are one."""
        while True:
            await trio.sleep(self.timing.tick_seconds)
            self._tick_due = True
            self.poke()

    async def run(self) -> None:
        """Take turns, for ever.  Raises when the disk or the core has failed for good."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._turn()

    async def _turn(self) -> None:
        core = self.core
        for node_id in sorted(self.lost):
            core.report_unreachable(node_id)
        self.lost.clear()
        for node_id, ok in self.snapshots_sent:
            core.report_snapshot(node_id, ok)
        self.snapshots_sent.clear()
        if self._tick_due:
            self._tick_due = False
            self.tick += 1
            core.tick()
            if self.tick % SAVE_TICKS == 0:
                await self.disk.save()
        for _ in range(min(STEPS_A_TURN, len(self._inbound))):
            self._step(self._inbound.popleft())
        if self._inbound:
            self.poke()
        self._look()
        self._hooks.feed()
        await self._work_off()
        self._look()
        if self._compactions:
            await self._compact()
        self._drain_core_log()

    def _step(self, message: Inbound) -> None:
        message.done()
        sender = message.hello.raft_id
        trust = self.trust(message.peer, message.hello)
        if trust is None:
            self.counters.refused_messages += 1
            log.debug("a raft message of %s was refused: it is no member", message.peer)
            return
        if trust == ANSWERS and self.tick >= self._later_at:
            trust = LATER_ANSWERS
        term = self.core.term
        try:
            self.core.step(sender, message.data, trust)
            if trust == LATER_ANSWERS and self.core.term > term:
                self._later_at = self.tick + LATER_TICKS
            if sender == self.core.leader:
                self._leader_heard = self.tick
        except RaftRefused as error:
            self.counters.refused_messages += 1
            log.info("a raft message of %s was refused: %s", message.peer, error)

    def _look(self) -> None:
        """Notice a new term, role or leader."""
        view = (self.core.term, self.core.role, self.leader)
        if view[2]:
            self._leader_seen = self.tick
        if view == self._view:
            return
        term, role, leader = self._view
        if view[:2] != (term, role):
            self.core.set_election_ticks(self._draw())
            self.counters.elections += view[0] != term and view[1] in ("candidate", "leader")
        if view[2] != leader and view[2]:
            log.info("%s leads the log in term %d", self.members.peer_of(view[2]), view[0])
        self._view = view
        self._hooks.changed()

    async def _work_off(self) -> None:
        while self.core.has_ready():
            ready = self.core.ready()
            try:
                content = self._check_snapshot(ready)
            except (CorruptData, Unsupported) as error:
                self.counters.refused_messages += 1
                log.error("a snapshot of the leader was refused: %s", error)
                self.core = self._new_core()
                continue
            self._send(ready)
            await self.disk.persist(ready)
            self.counters.entries += len(ready.entries)
            for to, kind, data in ready.persisted_messages:
                self._hooks.send(to, kind, data)
            light = self.core.advance()
            self._send(light)
            self.disk.note(light)
            self._apply(ready, light, content)
            for index, context in (*ready.read_states, *light.read_states):
                self._hooks.read(index, context)
            self._hooks.advanced()
            if self.core.snapshot_wanted and self.applier.held is None:
                self.core.snapshot(self.history.index, self._content())
            fresh_bytes = self.applier.bytes_applied - self._compacted_bytes
            if fresh_bytes >= COMPACT_BYTES or self.history.index >= self._compact_at:
                await self._compact()

    def _send(self, ready: Ready) -> None:
        for to, kind, data in ready.messages:
            self._hooks.send(to, kind, data)

    def _check_snapshot(self, ready: Ready) -> tuple[dict[int, PeerId], Replica] | None:
        if ready.snapshot is None:
            return None
        index, _, _, data = ready.snapshot
        return decode_content(data, index)

    def _apply(
        self, ready: Ready, light: Ready, content: tuple[dict[int, PeerId], Replica] | None
    ) -> None:
        if ready.snapshot is not None and content is not None:
            self.applier.install(ready.snapshot, *content)
            self._compact_at = self.history.index + self._compact_entries
            self._hooks.installed(content[1])
            self._hooks.changed()
        if self.applier.apply(self.core, [*ready.committed, *light.committed]):
            self._hooks.changed()

    async def _compact(self) -> None:
        """Write a snapshot of what is applied and drop the log before it, or try later."""
        wanted, self._compactions = self._compactions, []
        error: PyAgentError | None = None
        try:
            await self._write_snapshot()
        except Unavailable as trouble:
            if trouble.code != "disk_full":
                raise
            log.warning("the log could not be compacted, and will be later: %s", trouble)
            error = trouble
        self._compact_at = self.history.index + self._compact_entries
        self._compacted_bytes = self.applier.bytes_applied
        for each in wanted:
            each.error = error
            each.done.set()

    def _content(self) -> bytes:
        return encode_content(self.members.peers, self.history.replica)

    async def _write_snapshot(self) -> None:
        index = self.history.index
        if index > self.disk.snapshot_index and self.applier.held is None:
            await self.disk.compact(self.core.snapshot(index, self._content()))
            self.core.compact(max(0, index - KEPT_BEHIND))
            self.counters.snapshots_made += 1

    def _drain_core_log(self) -> None:
        for level, message in self.core.take_log():
            log.log(_LEVELS.get(level, logging.DEBUG), "raft: %s", message)

    def is_voter(self) -> bool:
        """Whether this node's vote counts."""
        return self.members.me in voters_of(self.members.conf)
