"""The hardened PySyncObj core by itself: many nodes, a seeded network that does its worst."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.pysyncobj_core import Core
from pyagent_node.consensus.pysyncobj_log import CoreLog
from pyagent_node.consensus.pysyncobj_messages import (
    REGULAR,
    HardState,
    InstallSnapshot,
    Member,
    Members,
    RaftMessage,
    encode_members,
)
from pyagent_node.consensus.segments import LogEntry


class Timing:
    tick_ms = 100
    heartbeat_ticks = 2
    election_ticks = 10


def member(n: int, life: int = 0) -> Member:
    return Member(PeerId(f"peer{n}"), bytes([n, life]) * 8)


def hard_state(me: Member, *, term: int = 0, commit: int = 0) -> HardState:
    return HardState(1, me.incarnation, 1, term, None, commit)


class Node:
    """A core, its disk, and what it applied."""

    def __init__(self, world: World, me: Member) -> None:
        self.world = world
        self.me = me
        self.disk: list[LogEntry] = []
        self.hard = hard_state(me)
        self.base: tuple[int, int, Members] = (0, 0, Members())
        self.start()

    def start(self, log: CoreLog | None = None) -> None:
        """Begin a life: from the disk, or with the ``log`` that the disk would not take."""
        index, term, members = self.base
        applied = index if log is None else self.world.applied_to[self.me]
        log = log or CoreLog((index, term), members, self.disk, self.hard)
        self.core = Core(
            self.me, log, applied=applied, timing=Timing(), rng=self.world.rng, now=self.world.now
        )
        for other in self.world.nodes.values():
            if other.me != self.me:
                self.core.link_up(other.me, self.world.now)
                other.core.link_up(self.me, self.world.now)

    def run(self, *, refuse: bool = False) -> None:
        """Tick, write, then send and apply; or the disk refuses the write."""
        self.core.tick(self.world.now)
        if refuse:
            self.core.log.rollback(self.world.applied_to[self.me])
            self.start(self.core.log)
            return
        self.persist()
        taken = self.core.take()
        for entry in taken.committed:
            self.world.apply(self, entry)
        for outgoing in taken.messages:
            self.world.send(self.me, outgoing.to, outgoing.message, list(outgoing.entries))
        for needy in taken.snapshots:
            index = self.world.applied_to[self.me]
            log = self.core.log
            term = log.term_at(index)
            assert term is not None
            snapshot = InstallSnapshot(self.core.term, index, term, 0)
            self.world.send(self.me, needy, snapshot, [], log.members_at(index))

    def persist(self) -> None:
        log = self.core.log
        entries, hard = log.unsaved()
        if entries:
            keep = entries[0].index - self.base[0] - 1
            assert keep <= len(self.disk)
            self.disk = [*self.disk[:keep], *entries]
        if hard is not None:
            self.hard = hard
        log.saved()

    def compact(self) -> None:
        index = self.world.applied_to[self.me]
        log = self.core.log
        if index <= self.base[0]:
            return
        term = log.term_at(index)
        assert term is not None
        self.disk = [entry for entry in self.disk if entry.index > index]
        self.base = (index, term, log.members_at(index))
        log.forget(index)


class World:
    """The network, and the promises of Raft checked at every step."""

    def __init__(self, seed: int, count: int, *, drop: float, double: float, delay: float) -> None:
        self.rng = random.Random(seed)
        self.now = 1.0
        self.drop, self.double, self.delay = drop, double, delay
        self.wire: list[
            tuple[float, int, Member, Member, RaftMessage, list[LogEntry], Members]
        ] = []
        self.sent = 0
        self.refused = 0
        self.nodes: dict[Member, Node] = {}
        self.cut: set[frozenset[Member]] = set()
        self.applied_to: dict[Member, int] = defaultdict(int)
        self.truth: dict[int, LogEntry] = {}
        self.leaders: dict[int, Member] = {}
        self.acknowledged: list[bytes] = []
        members = [member(n) for n in range(count)]
        first = LogEntry(1, 1, encode_members(Members(tuple(members))))
        for one in members:
            node = Node(self, one)
            node.disk, node.hard = [first], hard_state(one, term=1, commit=1)
            self.nodes[one] = node
            node.start()

    def send(
        self,
        sender: Member,
        to: Member,
        message: RaftMessage,
        entries: list[LogEntry],
        members: Members | None = None,
    ) -> None:
        if frozenset((sender, to)) in self.cut or self.rng.random() < self.drop:
            return
        for _ in range(2 if self.rng.random() < self.double else 1):
            self.sent += 1
            due = self.now + self.rng.random() * self.delay
            self.wire.append((due, self.sent, sender, to, message, entries, members or Members()))

    def apply(self, node: Node, entry: LogEntry) -> None:
        """Committed entries are applied in order, once, and never differ."""
        assert entry.index == self.applied_to[node.me] + 1
        assert self.truth.setdefault(entry.index, entry) == entry
        self.applied_to[node.me] = entry.index

    def restart(self, node: Node) -> None:
        self.applied_to[node.me] = node.base[0]
        node.start()

    def step(self, seconds: float = 0.05) -> None:
        self.now += seconds
        due = [parcel for parcel in self.wire if parcel[0] <= self.now]
        self.wire = [parcel for parcel in self.wire if parcel[0] > self.now]
        for _, _, sender, to, message, entries, members in sorted(due, key=lambda p: p[:2]):
            node = self.nodes[to]
            try:
                core = node.core
                fresh = core.step(sender, message, self.now, entries=entries, members=members)
            except PyAgentError as error:
                self.refused += 1
                assert error.code != "log_diverged", error
                continue
            if fresh:
                assert isinstance(message, InstallSnapshot)
                node.hard = core.log.hard
                node.base = (message.index, message.snapshot_term, members)
                log = core.log
                node.disk = log.entries(message.index + 1, 1 << 30, 1 << 60)
                log.saved()
                self.applied_to[to] = message.index
        for node in self.nodes.values():
            node.run(refuse=self.rng.random() < 0.002)
            if node.core.leads:
                known = self.leaders.setdefault(node.core.term, node.me)
                assert known == node.me, "two leaders in a term"

    def leader(self) -> Node | None:
        leading = [node for node in self.nodes.values() if node.core.leads]
        return max(leading, key=lambda node: node.core.term, default=None)

    def settle(self) -> Node:
        """Mend everything and wait for a leader whom all follow."""
        self.drop = self.double = 0.0
        self.cut.clear()
        for _ in range(2000):
            self.step()
            leader = self.leader()
            if leader and len({self.applied_to[m] for m in self.nodes}) == 1:
                if leader.core.ready_to_lead and leader.core.commit == leader.core.log.last_index:
                    if self.applied_to[leader.me] == leader.core.commit:
                        return leader
        raise AssertionError("no leader was found")


def test_three_nodes_find_a_leader_and_commit() -> None:
    world = World(1, 3, drop=0, double=0, delay=0.02)
    leader = world.settle()
    leader.core.append([REGULAR + b"a", REGULAR + b"b"], world.now)
    for _ in range(10):
        world.step()
    assert [entry.data for entry in world.truth.values()][-2:] == [REGULAR + b"a", REGULAR + b"b"]
    assert set(world.applied_to.values()) == {leader.core.commit}


@pytest.mark.parametrize("seed", range(40))
def test_storm(seed: int) -> None:
    """Loss, doubles, delays out of order, cut links, crashes before the write, compaction."""
    rng = random.Random(seed)
    world = World(seed, rng.choice([3, 5]), drop=0.1, double=0.2, delay=0.3)
    for n in range(1200):
        world.step()
        nodes = list(world.nodes.values())
        leader = world.leader()
        if leader and rng.random() < 0.3:
            leader.core.append([REGULAR + n.to_bytes(4, "big")], world.now)
        if rng.random() < 0.02:
            world.cut.add(frozenset(m.me for m in rng.sample(nodes, 2)))
        if rng.random() < 0.02:
            world.cut.clear()
        if rng.random() < 0.01:
            world.restart(rng.choice(nodes))
        if rng.random() < 0.01:
            rng.choice(nodes).compact()
        if leader and rng.random() < 0.01:
            leader.core.hand_over(rng.choice(nodes).me, world.now)
    world.settle()
    assert len(world.truth) > 50
    assert len(world.leaders) > 1
