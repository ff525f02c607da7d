"""Rebuilding the log of a mesh that lost most of its voters."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import NotFound
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.raft_recovery import GAP, recover
from pyagent_node.consensus.state import encode_snapshot

from .conftest import Network
from .raft_cluster import Cluster


async def test_a_survivor_goes_on_alone_and_takes_the_others_in(
    network: Network, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    cluster = Cluster(network, nursery)
    await cluster.found("abc", "d")
    for name in "abcd":
        await cluster.propose(name)
    await cluster.settled()
    index = cluster.engine("b").state.index
    await cluster.stop("a", "b", "c", "d")
    report = await recover(cluster.stores["b"], cluster.peer("b"), incarnation=b"i" * 16)
    assert report.applied == index
    assert report.index == index + GAP
    assert report.committed <= index
    assert set(report.lost) == cluster.peers("acd")
    engine = await cluster.start("b")
    assert engine.status().voters == (cluster.peer("b"),)
    assert len(engine.state.models) == 4
    await cluster.propose("b")
    await cluster.start("d")
    await cluster.until(lambda: cluster.peer("d") in engine.members.heard)
    await engine.reconfigure(cluster.peers("b"), cluster.peers("d"))
    await cluster.settled()
    await cluster.propose("d")
    follower = cluster.engine("d")
    assert encode_snapshot(follower.state) == encode_snapshot(engine.state)
    assert follower.chain_at(follower.state.index) == engine.chain_at(engine.state.index)
    nursery.cancel_scope.cancel()


async def test_what_no_other_survivor_had_is_kept_and_what_this_one_lacks_is_lost(
    network: Network, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    cluster = Cluster(network, nursery)
    await cluster.found("abc")
    await cluster.propose("a")
    await cluster.stop("c")
    for _ in range(3):
        await cluster.propose("a")
    await cluster.stop("a", "b")
    await recover(cluster.stores["c"], cluster.peer("c"), incarnation=b"i" * 16)
    engine = await cluster.start("c")
    await cluster.propose("c")
    await cluster.start("b")
    await cluster.until(lambda: cluster.peer("b") in engine.members.heard)
    await engine.reconfigure(cluster.peers("c"), cluster.peers("b"))
    await cluster.settled()
    assert len(cluster.engine("b").state.models) == 2
    nursery.cancel_scope.cancel()


async def test_recovery_twice_and_of_nothing(
    network: Network, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    cluster = Cluster(network, nursery)
    await cluster.found("a")
    await cluster.propose("a")
    await cluster.stop("a")
    first = await recover(cluster.stores["a"], cluster.peer("a"))
    second = await recover(cluster.stores["a"], cluster.peer("a"))
    assert second.index == first.index + GAP
    assert second.term > first.term
    assert second.lost == ()
    engine = await cluster.start("a")
    assert len(engine.state.models) == 1
    await cluster.propose("a")
    with pytest.raises(NotFound) as caught:
        await recover(MemoryLog(), cluster.peer("a"))
    assert caught.value.code == "no_log"
    nursery.cancel_scope.cancel()
