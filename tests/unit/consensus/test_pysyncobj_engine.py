"""The engine pysyncobj in the shell: what it does in another way than raft-rs."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import ConfigError
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ, open_pysyncobj
from pyagent_node.consensus.raft import RaftTiming
from pyagent_node.consensus.raft_recovery import recover
from pyagent_node.consensus.state import encode_snapshot

from .conftest import Network
from .raft_cluster import Cluster, allow


@pytest.fixture
async def cluster(network: Network, nursery: trio.Nursery) -> AsyncIterator[Cluster]:
    cluster = Cluster(network, nursery, kind=PYSYNCOBJ)
    yield cluster
    nursery.cancel_scope.cancel()


async def test_it_says_which_engine_it_is(cluster: Cluster, autojump_clock: MockClock) -> None:
    engine = await cluster.start("a", founder=True)
    assert engine.status().engine == "pysyncobj"


async def test_voters_change_one_at_a_time(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("a", "bcde")
    seen: list[frozenset[PeerId]] = []

    async def watch() -> None:
        while True:
            seen.append(frozenset(cluster.engine("a").status().voters))
            await trio.sleep(0.005)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await cluster.engine("a").reconfigure(cluster.peers("abcde"), frozenset())
        await cluster.engine("a").reconfigure(cluster.peers("ab"), cluster.peers("cde"))
        await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    steps = [len(before ^ after) for before, after in itertools.pairwise(seen)]
    assert set(steps) <= {0, 1}
    assert sum(steps) == 7
    assert seen[-1] == cluster.peers("ab")
    assert set(cluster.engine("a").status().learners) == cluster.peers("cde")


async def test_a_leader_replaced_with_all_its_fellows(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    """The change outlives the leader that began it: its last step is the leader's own vote."""
    await cluster.found("abc", "def")
    await cluster.engine("a").reconfigure(cluster.peers("def"), cluster.peers("abc"))
    await cluster.propose("a")
    await cluster.settled()
    leader = cluster.engine("d").status().leader
    assert leader in cluster.peers("def")
    assert cluster.engine("a").status().role == "learner"


async def test_a_survivor_is_rebuilt(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc", "d")
    for name in "abcd":
        await cluster.propose(name)
    await cluster.settled()
    await cluster.stop("a", "b", "c", "d")
    await recover(cluster.stores["b"], cluster.peer("b"), incarnation=b"i" * 16)
    engine = await cluster.start("b")
    assert len(engine.state.models) == 4
    await cluster.start("d")
    await cluster.until(lambda: cluster.peer("d") in engine.members.heard)
    await engine.reconfigure(cluster.peers("b"), cluster.peers("d"))
    await cluster.propose("d")
    await cluster.settled()
    assert encode_snapshot(cluster.engine("d").state) == encode_snapshot(engine.state)


async def test_a_timing_that_cannot_work_is_refused(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    cluster.timing = RaftTiming(heartbeat_ticks=5, election_ticks=10)
    with pytest.raises(ConfigError) as caught:
        await cluster.start("a", founder=True)
    assert caught.value.code == "bad_timing"


async def test_it_can_be_opened_by_name(
    cluster: Cluster, network: Network, autojump_clock: MockClock
) -> None:
    place = cluster.place("z")

    async with (
        network.started(place) as mesh,
        open_pysyncobj(mesh, MemoryLog(), founder=True, role="voter", authorise=allow) as engine,
    ):
        await engine.read_barrier()
        assert engine.status().leader == place.peer_id
