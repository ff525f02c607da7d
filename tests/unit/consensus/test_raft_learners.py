"""Members without a vote: they follow the log, and cannot lead, elect or depose anybody."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ
from pyagent_node.consensus.raft_core import RAFT_RS
from pyagent_node.consensus.raft_messages import Hello, frame, pieces
from pyagent_node.consensus.replica import Record

from .conftest import Network
from .raft_cluster import Cluster, model
from .raft_lies import answers, candidacies, orders


@pytest.fixture(params=[RAFT_RS, PYSYNCOBJ], ids=["raft-rs", "pysyncobj"])
async def cluster(
    request: pytest.FixtureRequest, network: Network, nursery: trio.Nursery
) -> AsyncIterator[Cluster]:
    cluster = Cluster(network, nursery, kind=request.param)
    yield cluster
    nursery.cancel_scope.cancel()


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
