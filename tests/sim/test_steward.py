"""The steward on a simulated network: who votes and who follows, as nodes come and go."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import PyAgentError, Unavailable
from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.consensus.commands import (
    AdmitMember,
    Checkpoint,
    Command,
    PutCheckpoints,
    RemoveMember,
    RevokeMember,
    SetDraining,
    SetMeshSetting,
    SetVote,
)
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.port import Applied, AppliedStream, ConsensusStatus, PeerProgress
from pyagent_node.consensus.single import open_single
from pyagent_node.consensus.state import State, apply
from pyagent_node.consensus.voters import DOWN_SECONDS, SETTLE_SECONDS
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.steward import (
    FORGET_SECONDS,
    LOOK_SECONDS,
    MAX_FOLLOWERS,
    RETRY_SECONDS,
    TIDY_SECONDS,
    Sightings,
    Steward,
    Transfer,
    plan,
)
from pyagent_node.simulations.mesh import SimulatedNetwork, open_network

NAMES = "abcde"
PEERS = {name: NodeKey(hashlib.sha256(name.encode()).digest()).peer_id for name in NAMES}
SHORT = {peer: name for name, peer in PEERS.items()}
A, B, C, D, E, *_ = PEERS.values()
NOW = 1_800_000_000
ROUND = SETTLE_SECONDS + 3 * LOOK_SECONDS


def short(peers: Iterable[PeerId]) -> str:
    return "".join(sorted(SHORT[peer] for peer in peers))


class Cluster:
    """A consensus of one process: it notes what the steward asks for and does it."""

    def __init__(self, leader: PeerId) -> None:
        self.state = State()
        self.leader = leader
        self.me = leader
        self.voters: frozenset[PeerId] = frozenset({leader})
        self.learners: frozenset[PeerId] = frozenset()
        self.progress: tuple[PeerProgress, ...] = ()
        self.error: PyAgentError | None = None
        self.asked: list[tuple[str, str]] = []
        self.transfers: list[PeerId] = []

    def apply(self, *commands: Command) -> None:
        for command in commands:
            self.state, error = apply(self.state, command)
            assert error is None

    @property
    def leads(self) -> bool:
        return self.leader == self.me

    def status(self) -> ConsensusStatus:
        return ConsensusStatus(
            "fake",
            "leader" if self.leader == self.me else "follower",
            self.leader,
            self.state.index,
            commit=2000,
            voters=tuple(sorted(self.voters)),
            learners=tuple(sorted(self.learners)),
            progress=self.progress,
        )

    async def propose(self, command: Command) -> Applied:
        await trio.lowlevel.checkpoint()
        self.apply(command)
        return Applied(self.state.index, command)

    async def read_barrier(self) -> None:
        await trio.lowlevel.checkpoint()

    def applied(self, after: int) -> AbstractAsyncContextManager[AppliedStream]:
        raise AssertionError

    async def reconfigure(self, voters: frozenset[PeerId], learners: frozenset[PeerId]) -> None:
        await trio.sleep(0.01)
        self.asked.append((short(voters), short(learners)))
        if self.error is not None:
            raise self.error
        self.voters, self.learners = voters, learners

    async def transfer(self, to: PeerId) -> None:
        await trio.sleep(0.01)
        self.transfers.append(to)
        self.leader = to

    async def compact(self) -> int:
        raise AssertionError

    def chain_at(self, index: int) -> bytes | None:
        raise AssertionError

    @property
    def who(self) -> tuple[str, str]:
        return short(self.voters), short(self.learners)


class Town:
    """A network of named nodes, with the steward of ``a`` at work."""

    def __init__(self, network: SimulatedNetwork, cluster: Cluster) -> None:
        self.network = network
        self.cluster = cluster
        self.mesh = network.node(A)
        self.steward = Steward(self.mesh, cluster, clock=lambda: NOW + trio.current_time())
        cluster.apply(AdmitMember(A, "a", "voter", b"c", 1))

    async def come(self, names: str, *, role: str = "voter", member: bool = True) -> None:
        for name in names:
            peer = PEERS[name]
            if member and peer not in self.cluster.state.members:
                self.cluster.apply(AdmitMember(peer, name, role, b"c", 1))
            node = self.network.node(peer, name=name, role=role)
            await node.connect(self.mesh.addresses[0])

    def go(self, names: str) -> None:
        for name in names:
            self.network.crash(PEERS[name])


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    async with open_town() as town:
        yield town


@asynccontextmanager
async def open_town() -> AsyncIterator[Town]:
    async with open_network(latency=0.01) as network, trio.open_nursery() as nursery:
        town = Town(network, Cluster(A))
        nursery.start_soon(town.steward.run)
        yield town
        nursery.cancel_scope.cancel()


async def test_who_comes_follows_at_once_and_votes_when_settled(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("b")
    await trio.sleep(0.5)
    assert town.cluster.who == ("a", "b")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("a", "b")
    await town.come("c")
    await trio.sleep(0.5)
    assert town.cluster.who == ("a", "bc")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abc", "")
    await town.come("d")
    await town.come("e", role="client")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abc", "de")
    assert town.steward.failures == 0
    asked = len(town.cluster.asked)
    await trio.sleep(3600)
    assert len(town.cluster.asked) == asked


async def test_a_voter_that_stays_away_is_replaced_and_one_that_flaps_is_not(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("bcd")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abc", "d")
    for _ in range(5):
        town.go("c")
        await trio.sleep(DOWN_SECONDS / 2)
        await town.come("c")
        await trio.sleep(1)
    assert town.cluster.who == ("abc", "d")
    town.go("c")
    await trio.sleep(DOWN_SECONDS + 2)
    assert town.cluster.who == ("abd", "c")
    await town.come("c")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abd", "c")


async def test_only_members_keep_their_place_when_they_are_away(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("b", role="learner")
    await town.come("c", role="learner", member=False)
    await trio.sleep(1)
    assert town.cluster.who == ("a", "bc")
    town.go("bc")
    await trio.sleep(FORGET_SECONDS - 10)
    assert town.cluster.who == ("a", "bc")
    await trio.sleep(20)
    assert town.cluster.who == ("a", "b")


async def test_the_words_of_operators(autojump_clock: MockClock, town: Town) -> None:
    await town.come("bcd")
    await town.come("e", role="learner")
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abc", "de")
    town.cluster.apply(SetVote(E, "always"))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abcde", "")
    town.cluster.apply(SetMeshSetting("voters_max", 3))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("abe", "cd")
    town.cluster.apply(SetVote(B, "never"))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("ace", "bd")
    town.cluster.apply(SetDraining(C, True))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("ade", "bc")
    town.cluster.apply(RevokeMember(D, "stolen"), RemoveMember(B, 5))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("ade", "bc")
    assert town.cluster.transfers == [E]  # of two that are left one votes: the one that must


async def test_a_leader_that_is_to_vote_no_more_hands_over_first(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("bcd")
    await trio.sleep(ROUND)
    town.network.set_latency(A, C, 0.001)
    town.cluster.apply(SetDraining(A, True))
    await trio.sleep(ROUND)
    assert len(town.cluster.transfers) == 1
    assert town.cluster.transfers[0] in {B, C}
    assert town.cluster.who == ("abc", "d")
    before = len(town.cluster.asked)
    await trio.sleep(60)
    assert len(town.cluster.asked) == before


async def test_a_lone_leader_that_is_to_vote_no_more_first_finds_an_heir(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("b")
    await trio.sleep(ROUND)
    town.cluster.apply(SetVote(A, "never"))
    await trio.sleep(ROUND)
    assert town.cluster.who == ("ab", "")
    assert town.cluster.transfers == [B]


async def test_a_node_that_was_not_heard_of_is_left_alone_for_a_while(
    autojump_clock: MockClock, town: Town
) -> None:
    town.cluster.error = Unavailable("Who?", code="peer_unreachable", peer_id=B)
    await town.come("b")
    await trio.sleep(0.5)
    assert town.cluster.asked == [("a", "b")]
    await town.come("c")
    town.cluster.error = None
    await trio.sleep(2 * LOOK_SECONDS)
    assert town.cluster.who == ("a", "c")
    await trio.sleep(RETRY_SECONDS + LOOK_SECONDS)
    assert town.cluster.who == ("abc", "")


async def test_errors_without_a_culprit_are_tried_again(
    autojump_clock: MockClock, town: Town
) -> None:
    town.cluster.error = Unavailable("Not now.", code="no_leader")
    await town.come("b")
    await trio.sleep(3 * LOOK_SECONDS)
    assert town.steward.failures >= 2
    town.cluster.error = None
    await trio.sleep(2 * LOOK_SECONDS)
    assert town.cluster.who == ("a", "b")


async def test_a_learner_far_behind_does_not_vote_yet(
    autojump_clock: MockClock, town: Town
) -> None:
    await town.come("bc")
    town.cluster.progress = (PeerProgress(C, voter=False, matched=900, active=True),)
    await trio.sleep(60)
    assert town.cluster.who == ("a", "bc")
    town.cluster.progress = (PeerProgress(C, voter=False, matched=1001, active=True),)
    await trio.sleep(LOOK_SECONDS * 2)
    assert town.cluster.who == ("abc", "")


async def test_followers_only_watch(autojump_clock: MockClock, town: Town) -> None:
    town.cluster.leader = B
    await town.come("bcd")
    await trio.sleep(60)
    assert town.cluster.asked == []
    town.cluster.leader = A
    await trio.sleep(4 * LOOK_SECONDS)
    assert len(town.cluster.asked) == 2  # learners, and voters at once: they were watched


async def test_expired_checkpoints_are_forgotten(autojump_clock: MockClock, town: Town) -> None:
    def checkpoint(digit: str, expires: int) -> Checkpoint:
        return Checkpoint(SessionId(digit * 32), Digest("1" * 64), A, 1, (), expires)

    now = int(NOW + trio.current_time())
    town.cluster.apply(PutCheckpoints((checkpoint("1", now + 5), checkpoint("2", now + 3600)), now))
    await trio.sleep(TIDY_SECONDS + 10)
    assert list(town.cluster.state.checkpoints) == ["2" * 32]
    index = town.cluster.state.index
    await trio.sleep(10 * TIDY_SECONDS)
    assert town.cluster.state.index == index


async def test_an_engine_of_one_writer_is_asked_once(autojump_clock: MockClock) -> None:
    async with open_network() as network, trio.open_nursery() as nursery:
        mesh = network.node(A)
        async with open_single(mesh, MemoryLog(), leader=A) as consensus:
            steward = Steward(mesh, consensus, clock=lambda: NOW)
            nursery.start_soon(steward.run)
            await network.node(B).connect(mesh.addresses[0])
            await trio.sleep(60)
            assert (steward.changes, steward.failures) == (0, 0)
            nursery.cancel_scope.cancel()


def info(peer: PeerId, rtt: float | None = 10.0) -> PeerInfo:
    return PeerInfo(peer, peer, "voter", (), rtt, outbound=True)


def status(voters: Sequence[PeerId], learners: Sequence[PeerId] = ()) -> ConsensusStatus:
    return ConsensusStatus("f", "leader", A, 1, voters=tuple(voters), learners=tuple(learners))


def test_the_nearest_heir_leads() -> None:
    sightings = Sightings(A, 0.0)
    for now in (0.0, 100.0):
        sightings.look([info(B, 30.0), info(C, 5.0), info(D, None)], (), now)
    state, _ = apply(State(), AdmitMember(A, "a", "voter", b"c", 1))
    state, _ = apply(state, SetVote(A, "never"))
    assert plan(status([A, B, C, D]), state, sightings) == Transfer(C)


def test_there_are_never_too_many_followers() -> None:
    sightings = Sightings(A, 0.0)
    crowd = [info(PeerId(f"n{i:03}")) for i in range(MAX_FOLLOWERS + 50)]
    sightings.look(crowd[: MAX_FOLLOWERS - 1], (), 0.0)
    action = plan(status([A]), State(), sightings)
    assert not isinstance(action, Transfer)
    assert action is not None
    first = action.learners
    assert len(first) == MAX_FOLLOWERS - 1
    sightings.look(crowd[1:], first, 1.0)
    again = plan(status([A], sorted(first)), State(), sightings)
    assert not isinstance(again, Transfer)
    assert again is not None
    assert len(again.learners) == MAX_FOLLOWERS - 1
    assert first - again.learners == {"n000"}
    assert len(msgspec.msgpack.encode(sorted(again.learners))) < 64 * 1024


def test_a_stranger_that_is_gone_is_forgotten() -> None:
    sightings = Sightings(A, 0.0)
    sightings.look([info(B)], (), 0.0)
    sightings.look([], (), 1.0)
    assert sightings.up(B) == 0.0
    sightings.look([], (), 11.0)
    assert sightings.up(B) == -10.0
    sightings.look([], (), FORGET_SECONDS + 2)
    assert not sightings.known()
    assert sightings.info(B) is None
