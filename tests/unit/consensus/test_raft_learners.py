"""Members without a vote: they follow the log, and cannot lead, elect or depose anybody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ
from pyagent_node.consensus.raft_core import RAFT_RS, Core, Kind
from pyagent_node.consensus.raft_messages import Hello, frame, pieces
from pyagent_node.consensus.replica import Record
from pyagent_node.native import RaftConf

from .conftest import Network
from .raft_cluster import Cluster, model


@pytest.fixture(params=[RAFT_RS, PYSYNCOBJ], ids=["raft-rs", "pysyncobj"])
async def cluster(
    request: pytest.FixtureRequest, network: Network, nursery: trio.Nursery
) -> AsyncIterator[Cluster]:
    cluster = Cluster(network, nursery, kind=request.param)
    yield cluster
    nursery.cancel_scope.cancel()


def core_of(kind: Kind, node_id: int, voters: Sequence[int], term: int, learners=()) -> Core:
    return kind.new_core(
        node_id,
        conf=RaftConf(voters, learners),
        term=term,
        vote=0,
        commit=1,
        snapshot_index=1,
        snapshot_term=1,
        snapshot_data=b"",
        entries=[],
        heartbeat_ticks=1,
        election_ticks=5,
        max_message_bytes=1 << 20,
        max_inflight=16,
        max_uncommitted_bytes=1 << 20,
    )


def drain(core: Core) -> list[tuple[int, bytes]]:
    """Do what a core has to do, and return what it sends."""
    messages = []
    while core.has_ready():
        ready = core.ready()
        light = core.advance()
        for entry in (*ready.committed, *light.committed):
            if entry.kind == 1:
                core.apply_conf(entry)
            core.advance_apply(entry.index)
        sent = (*ready.messages, *ready.persisted_messages, *light.messages)
        messages += [(to, data) for to, _, data in sent]
    return messages


def orders(kind: Kind, liar: int, victim: int, term: int, forged: bytes) -> list[bytes]:
    """Return what a node says to another one as its leader in a term after ``term``."""
    core = core_of(kind, liar, [liar], term)
    core.campaign()
    drain(core)
    assert core.role == "leader"
    core.propose(forged)
    core.propose_conf([liar], [victim])
    said = []
    for _ in range(10):
        said += [data for to, data in drain(core) if to == victim]
        core.tick()
    assert said
    return said


def candidacies(kind: Kind, liar: int, victim: int, term: int) -> list[bytes]:
    """Return the questions before an election, and those of one."""
    core = core_of(kind, liar, [liar, victim], term)
    core.campaign()
    asked = [data for _, data in drain(core)]
    friend = core_of(kind, victim, [liar, victim], term)
    for data in asked:
        friend.step(liar, data)
    for _, data in drain(friend):
        core.step(victim, data)
    asked += [data for _, data in drain(core)]
    assert len(asked) > 1
    return asked


def answers(kind: Kind, liar: int, leader: int, term: int) -> list[bytes]:
    """Return what a follower in a later term answers the leader of ``term``."""
    core = core_of(kind, liar, [leader], term + 7, [liar])
    said = []
    for data in orders(kind, leader, liar, term, b"x"):
        core.step(leader, data)
        said += [answer for _, answer in drain(core)]
    assert said
    return said


@pytest.mark.parametrize("ahead", [0, 1, 1000])
@pytest.mark.parametrize("claims", [False, True])
async def test_a_learner_makes_nobody_follow_it(
    cluster: Cluster, ahead: int, claims: bool, autojump_clock: MockClock
) -> None:
    await cluster.found("abc", "d")
    liar = cluster.engine("d")
    own = liar.members.me
    term = cluster.engine("a").status().term
    record = Record(b"f" * 16, cluster.peer("a"), encode_command(model(666)), 1)
    forged = msgspec.msgpack.encode(record)
    for name in "abc":
        victim = cluster.engine(name)
        refused = victim.counters()["refused_messages"]
        if claims:  # that it votes, and leads
            said = Hello(own, liar._incarnation, True, 1 << 40, own, cluster.peer("d"))
            assert liar.links.put(cluster.peer(name), [frame(said)])
        me = victim.members.me
        messages = orders(cluster.kind, own, me, term - 1 + ahead, forged)
        messages += candidacies(cluster.kind, own, me, term - 1 + ahead)
        for data in messages:
            assert liar.links.put(cluster.peer(name), pieces(me, data))
        await trio.sleep(0.3)
        assert victim.counters()["refused_messages"] > refused
        assert victim.status().term == term
        assert cluster.leaders() == ["a"]
    for name in "abcd":
        await cluster.propose(name)
    await cluster.settled()
    assert cluster.engine("a").status().term == term
    for name in "abcd":
        assert all(m.name != "m666" for m in cluster.engine(name).state.models.values())


async def test_a_learner_ends_a_term_once_in_a_while_at_most(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc", "d")
    liar = cluster.engine("d")
    elections = 0
    for _ in range(5):  # one that did vote in a later term, and learns now, is believed once
        leader = await cluster.leader()
        engine = cluster.engine(leader)
        term, refused = engine.status().term, engine.counters()["refused_messages"]
        for data in answers(cluster.kind, liar.members.me, engine.members.me, term):
            assert liar.links.put(cluster.peer(leader), pieces(engine.members.me, data))
        await trio.sleep(3)
        elections += cluster.engine(await cluster.leader()).status().term > term
        assert elections <= 1
    assert not elections or engine.counters()["refused_messages"] > refused
    for name in "abcd":
        await cluster.propose(name)
