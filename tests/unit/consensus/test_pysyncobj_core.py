"""The PySyncObj core by itself: many nodes, and a seeded network that does its worst.

The same world runs over tikv's core, so what is asked here is what both engines promise.
"""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.consensus.pysyncobj_core import PySyncCore
from pyagent_node.consensus.pysyncobj_messages import content_of, decode_membership
from pyagent_node.native import RaftConf, RaftCore, RaftDropped, RaftEntry, RaftRefused

HEARTBEAT, ELECTION = 2, 10
Core = PySyncCore | RaftCore
Stored = tuple[int, int, RaftConf, bytes]


class Node:
    """A core, its disk, and what it applied."""

    def __init__(self, world: World, me: int, snapshot: Stored | None) -> None:
        self.world = world
        self.me = me
        self.log: list[RaftEntry] = []
        self.snapshot = snapshot or (0, 0, RaftConf(), b"")
        self.hard = (1, 0, 1) if snapshot else (0, 0, 0)
        self.view = (0, "")
        self.start()

    def start(self) -> None:
        index, term, conf, data = self.snapshot
        self.core: Core = self.world.kind(
            self.me,
            conf=conf,
            term=max(term, self.hard[0]),
            vote=self.hard[1] if self.hard[0] >= term else 0,
            commit=max(index, self.hard[2]),
            snapshot_index=index,
            snapshot_term=term,
            snapshot_data=data,
            entries=self.log,
            heartbeat_ticks=HEARTBEAT,
            election_ticks=ELECTION,
            max_message_bytes=1 << 16,
            max_inflight=16,
            max_uncommitted_bytes=1 << 20,
        )
        self.applied = index
        self.state = data
        self.reads: list[tuple[int, bytes]] = []

    def work_off(self, *, crash: bool = False) -> None:
        """Do what the core asks for; ``crash`` before it is written."""
        while self.core.has_ready():
            ready = self.core.ready()
            for to, kind, data in ready.messages:
                self.send(to, kind, data)
            if crash:
                self.start()
                return
            self.write(ready)
            for to, kind, data in ready.persisted_messages:
                self.send(to, kind, data)
            light = self.core.advance()
            for to, kind, data in light.messages:
                self.send(to, kind, data)
            self.hard = light.hard_state or self.hard
            if ready.snapshot is not None:
                self.applied, _, _, self.state = ready.snapshot
            self.apply([*ready.committed, *light.committed])
            self.reads += [*ready.read_states, *light.read_states]
        view = (self.core.term, self.core.role)
        if view != self.view:
            self.view = view
            self.core.set_election_ticks(self.world.rng.randrange(ELECTION, 2 * ELECTION))

    def write(self, ready: object) -> None:
        if ready.snapshot is not None:
            self.snapshot, self.log = ready.snapshot, []
        if ready.entries:
            keep = ready.entries[0].index - self.snapshot[0] - 1
            assert keep <= len(self.log)
            self.log = [*self.log[:keep], *ready.entries]
        self.hard = ready.hard_state or self.hard

    def send(self, to: int, kind: str, data: bytes) -> None:
        self.world.send(self.me, to, data)
        if kind == "snapshot":
            self.world.snapshots.append((self.me, to))

    def apply(self, entries: list[RaftEntry]) -> None:
        """Committed entries come in order, once, and are the same everywhere."""
        for entry in entries:
            assert entry.index == self.applied + 1
            assert self.world.truth.setdefault(entry.index, entry) == entry
            if entry.kind == 1:
                self.core.apply_conf(entry)
            self.applied = entry.index
            self.state += entry.data
        if entries:
            self.core.advance_apply(self.applied)

    def compact(self) -> None:
        if self.applied > self.snapshot[0]:
            self.snapshot = self.core.snapshot(self.applied, self.state)
            self.log = [entry for entry in self.log if entry.index > self.applied]
            self.core.compact(self.applied)


class World:
    """The network, and the promises of Raft checked at every step."""

    def __init__(
        self, seed: int, count: int, *, kind: type[Core] = PySyncCore, harsh: bool = False
    ) -> None:
        self.kind = kind
        self.rng = random.Random(seed)
        self.harsh = harsh
        self.now = 0
        self.wire: list[tuple[int, int, int, int, bytes]] = []
        self.sent = 0
        self.refused: list[str] = []
        self.nodes: dict[int, Node] = {}
        self.cut: set[tuple[int, int]] = set()
        self.snapshots: list[tuple[int, int]] = []
        self.truth: dict[int, RaftEntry] = {}
        self.leaders: dict[int, int] = {}
        voters = range(1, count + 1)
        for me in voters:
            self.nodes[me] = Node(self, me, (1, 1, RaftConf(voters), b"begin"))

    def send(self, sender: int, to: int, data: bytes) -> None:
        if (sender, to) in self.cut or to not in self.nodes:
            return
        if self.harsh and self.rng.random() < 0.1:
            return
        for _ in range(2 if self.harsh and self.rng.random() < 0.2 else 1):
            self.sent += 1
            due = self.now + 1
            if self.harsh:  # some come when elections have passed
                due += self.rng.randrange(60 if self.rng.random() < 0.1 else 6)
            self.wire.append((due, self.sent, sender, to, data))

    def tick(self) -> None:
        self.now += 1
        due = sorted(parcel for parcel in self.wire if parcel[0] <= self.now)
        self.wire = [parcel for parcel in self.wire if parcel[0] > self.now]
        for _, _, sender, to, data in due:
            if to not in self.nodes:
                continue
            try:
                self.nodes[to].core.step(sender, data)
            except RaftRefused as error:
                self.refused.append(str(error))
            if self.rng.random() < 0.5:
                self.nodes[to].work_off()
        for sender, to in self.snapshots:
            self.nodes[sender].core.report_snapshot(to, self.rng.random() < 0.8)
        self.snapshots.clear()
        for node in self.nodes.values():
            node.core.tick()
            node.work_off(crash=self.harsh and self.rng.random() < 0.002)
            if node.core.role == "leader":
                assert self.leaders.setdefault(node.core.term, node.me) == node.me

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.tick()

    def leader(self) -> Node | None:
        leading = [node for node in self.nodes.values() if node.core.role == "leader"]
        return max(leading, key=lambda node: node.core.term, default=None)

    def calm(self) -> Node:
        """Mend everything and wait until all have applied what the leader has."""
        self.harsh = False
        self.cut.clear()
        for _ in range(500):
            self.tick()
            leader = self.leader()
            if leader is None:
                continue
            status = leader.core.status()
            known = {*status.conf.voters, *status.conf.learners}
            ends = {self.nodes[n].applied for n in known if n in self.nodes}
            if ends == {status.last_index} and not status.pending_conf:
                return leader
        raise AssertionError("the nodes did not agree")

    def propose(self, data: bytes) -> bool:
        leader = self.leader()
        if leader is None:
            return False
        try:
            leader.core.propose(data)
        except RaftDropped:
            return False
        return True

    def propose_everywhere(self, data: bytes) -> None:
        """Propose on everyone who believes to lead, also where that is in vain."""
        for node in self.nodes.values():
            if node.core.role == "leader":
                with contextlib.suppress(RaftDropped):
                    node.core.propose(data + bytes([node.me]))

    def isolate(self, one: int) -> None:
        for other in self.nodes:
            self.cut |= {(one, other), (other, one)}


KINDS = pytest.mark.parametrize("kind", [PySyncCore, RaftCore])


@KINDS
def test_three_nodes_find_a_leader_and_commit(kind: type[Core]) -> None:
    world = World(1, 3, kind=kind)
    world.calm()
    assert world.propose(b"a")
    assert world.propose(b"b")
    world.calm()
    assert {node.state for node in world.nodes.values()} == {b"beginab"}
    assert world.refused == []


SEEDED = pytest.mark.parametrize(
    ("kind", "seed"), [*((PySyncCore, n) for n in range(10)), *((RaftCore, n) for n in range(3))]
)


@pytest.mark.slow
@SEEDED
def test_storm(seed: int, kind: type[Core]) -> None:
    """Loss, doubles, delays out of order, one-way cuts, crashes before the write, compaction."""
    rng = random.Random(seed)
    world = World(seed, rng.choice([3, 5]), harsh=True, kind=kind)
    for n in range(1200):
        world.tick()
        nodes = list(world.nodes.values())
        if rng.random() < 0.4:
            world.propose_everywhere(n.to_bytes(4, "big"))
        if rng.random() < 0.05:
            a, b = rng.sample(sorted(world.nodes), 2)
            world.cut.add((a, b))
        if rng.random() < 0.03 and (leader := world.leader()):
            world.isolate(leader.me)
        if rng.random() < 0.03:
            world.cut.clear()
        if rng.random() < 0.01:
            rng.choice(nodes).start()
        if rng.random() < 0.02:
            rng.choice(nodes).compact()
        if rng.random() < 0.01 and (leader := world.leader()):
            leader.core.transfer(rng.choice(nodes).me)
    world.calm()
    assert len({node.state for node in world.nodes.values()}) == 1
    assert len(world.truth) > 100
    assert len(world.leaders) > 1
    assert world.refused == []


@pytest.mark.slow
@SEEDED
def test_storm_of_members(seed: int, kind: type[Core]) -> None:
    """Voters and learners change all the time, the leader among them, under loss and crashes."""
    rng = random.Random(seed)
    world = World(seed, 3, harsh=True, kind=kind)
    for me in range(4, 8):
        world.nodes[me] = Node(world, me, None)
    changes = 0
    for n in range(2500):
        world.tick()
        if rng.random() < 0.2:
            world.propose(n.to_bytes(4, "big"))
        leader = world.leader()
        if leader and rng.random() < 0.03:
            everyone = rng.sample(sorted(world.nodes), 7)
            count = rng.choice([1, 2, 3, 4, 5])
            try:
                placed = leader.core.propose_conf(everyone[:count], everyone[count:], b"who")
                changes += placed is not None
            except (RaftDropped, RaftRefused):
                pass
        if rng.random() < 0.01:
            rng.choice(list(world.nodes.values())).start()
        if rng.random() < 0.02:
            rng.choice(list(world.nodes.values())).compact()
        if rng.random() < 0.02:
            a, b = rng.sample(sorted(world.nodes), 2)
            world.cut.add((a, b))
        if rng.random() < 0.05:
            world.cut.clear()
    world.calm()
    assert changes > 5
    assert len(world.truth) > 100
    late = [why for why in world.refused if "does not vote" not in why]
    assert late == []
    if kind is PySyncCore:
        voters = {1, 2, 3}
        for index in sorted(world.truth):
            if world.truth[index].kind == 1:
                after = set(decode_membership(content_of(world.truth[index])).voters)
                assert len(voters ^ after) <= 1, "two voters changed at once"
                voters = after


@KINDS
def test_a_leader_that_is_cut_off_answers_no_read(kind: type[Core]) -> None:
    world = World(3, 3, kind=kind)
    old = world.calm()
    old.core.read_index(b"before")
    world.ticks(4)
    assert [context for _, context in old.reads] == [b"before"]
    world.isolate(old.me)
    old.core.read_index(b"old")
    world.ticks(60)
    new = world.leader()
    assert new is not None
    assert new is not old
    world.propose(b"new")
    world.ticks(4)
    follower = next(n for n in world.nodes.values() if n not in (old, new))
    for node in (new, follower):
        node.core.read_index(b"read")
    world.ticks(10)
    for node in (new, follower):
        assert [context for _, context in node.reads] == [b"read"]
        assert node.reads[0][0] >= new.core.status().commit
    assert len(old.reads) == 1
    world.calm()
    assert len(old.reads) == 1


@KINDS
def test_one_that_was_cut_off_disturbs_nobody(kind: type[Core]) -> None:
    world = World(4, 3, kind=kind)
    leader = world.calm()
    away = next(n for n in world.nodes if n != leader.me)
    world.isolate(away)
    world.ticks(300)
    term = leader.core.term
    world.calm()
    world.ticks(100)
    assert (leader.core.role, leader.core.term) == ("leader", term)


class Tap(World):
    """Keeps what was sent."""

    def __init__(self, seed: int) -> None:
        self.seen: list[tuple[int, int, bytes]] = []
        super().__init__(seed, 3)

    def send(self, sender: int, to: int, data: bytes) -> None:
        self.seen.append((sender, to, data))
        super().send(sender, to, data)


def true_messages() -> list[tuple[int, int, bytes]]:
    world = Tap(5)
    world.calm()
    for n in range(20):
        world.propose(bytes([n]) * 20)
        world.tick()
    leader = world.leader()
    assert leader is not None
    leader.compact()
    leader.core.read_index(b"r")
    world.nodes[9] = Node(world, 9, None)
    leader.core.propose_conf([1, 2, 3], [9], b"")
    world.ticks(10)
    leader.core.transfer(next(n for n in (1, 2, 3) if n != leader.me))
    world.ticks(30)
    return sorted(set(world.seen))


MESSAGES = true_messages()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_comes_is_taken_or_refused(data: st.DataObject) -> None:
    """Bits of true messages are flipped, messages come from others and in any order."""
    world = World(data.draw(st.integers(0, 3)), 3)
    world.ticks(data.draw(st.integers(0, 60)))
    for _ in range(data.draw(st.integers(1, 8))):
        sender, to, message = data.draw(st.sampled_from(MESSAGES))
        spoilt = bytearray(message)
        for _ in range(data.draw(st.integers(0, 3))):
            spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        node = world.nodes.get(to, world.nodes[1])
        with contextlib.suppress(RaftRefused):
            node.core.step(data.draw(st.sampled_from([sender, sender, 1, 2, 3, 77])), bytes(spoilt))
        while node.core.has_ready():  # what is made of it is not looked at: somebody lied
            node.core.ready()
            node.core.advance()
        node.core.tick()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    world = World(0, 3)
    with pytest.raises(RaftRefused):
        world.nodes[1].core.step(2, data)
