"""Engines of Raft: electing, committing, restarting, failing over, changing voters."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.consensus.commands import Command, ForgetModel
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.pysyncobj_engine import PYSYNCOBJ
from pyagent_node.consensus.raft_core import RAFT_RS
from pyagent_node.consensus.state import encode_snapshot

from .conftest import Network
from .raft_cluster import Cluster, SlowLog, burn, model


@pytest.fixture(params=[RAFT_RS, PYSYNCOBJ], ids=lambda kind: kind.name)
async def cluster(
    network: Network, nursery: trio.Nursery, request: pytest.FixtureRequest
) -> AsyncIterator[Cluster]:
    cluster = Cluster(network, nursery, kind=request.param)
    yield cluster
    nursery.cancel_scope.cancel()


async def test_a_founder_leads_at_once(cluster: Cluster, autojump_clock: MockClock) -> None:
    engine = await cluster.start("a", founder=True)
    applied = await engine.propose(model(1))
    assert applied.command == model(1)
    assert engine.state.index == applied.index
    await engine.read_barrier()
    status = engine.status()
    assert status.role == "leader"
    assert status.leader == cluster.peer("a")
    assert status.voters == (cluster.peer("a"),)
    assert status.problem is None


async def test_three_nodes_agree(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    for name in "abcabc":
        await cluster.propose(name)
    await cluster.settled()
    engines = [cluster.engine(n) for n in "abc"]
    assert len({encode_snapshot(e.state) for e in engines}) == 1
    assert len(engines[0].state.models) == 6
    index = engines[0].state.index
    assert len({e.chain_at(index) for e in engines}) == 1
    assert engines[0].chain_at(index + 1) is None
    assert {p.peer_id for p in cluster.engine("a").status().progress} == cluster.peers("abc")
    for engine in engines:
        await engine.read_barrier()


async def test_a_refused_command_raises_where_it_was_proposed(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    for name in "abc":
        with pytest.raises(NotFound) as caught:
            await cluster.engine(name).propose(ForgetModel(Digest("0" * 64)))
        assert caught.value.code == "model_not_found"


async def test_another_leads_when_the_leader_dies(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.propose("b")
    begun = trio.current_time()
    await cluster.stop("a")
    leader = await cluster.leader()
    assert leader in "bc"
    assert trio.current_time() - begun <= 2 * cluster.timing.election_seconds
    for name in "bc":
        await cluster.propose(name)
    await cluster.start("a")
    await cluster.settled()
    assert len(cluster.engine("a").state.models) == 3


async def test_a_proposal_outlives_its_leader(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.propose, "b")
        await trio.testing.wait_all_tasks_blocked()
        await cluster.stop("a")
    assert len(cluster.engine("b").state.models) == 1


async def test_nothing_is_decided_without_a_majority(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.propose("a")
    await cluster.stop("b", "c")
    engine = cluster.engine("a")
    await cluster.until(lambda: engine.status().leader is None)
    for attempt in (engine.propose(model(50)), engine.read_barrier()):
        with pytest.raises(Unavailable) as caught:
            await attempt
        assert caught.value.code == "no_leader"
        assert caught.value.facts == {"voters": 3, "reachable": 1, "needed": 2, "missing": 1}
        assert cluster.peer("b") in str(caught.value)
    assert engine.status().problem is not None
    assert len(engine.state.models) == 1
    await cluster.start("b")
    await cluster.propose("a")


async def test_who_asks_without_a_majority_is_told_soon(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    engine = cluster.engine("a")
    await cluster.leader()
    await cluster.stop("b", "c")

    async def refused(number: int) -> tuple[float, str]:
        began = trio.current_time()
        with pytest.raises(Unavailable) as caught:
            await engine.propose(model(number))
        assert caught.value.code == "no_leader"
        return trio.current_time() - began, str(caught.value)

    # it is in the log of the leader that was, who may have made it before the others went
    seconds, why = await refused(50)
    assert seconds < cluster.propose_seconds - 3
    assert "The change may have happened" in why
    seconds, why = await refused(51)
    assert 0.5 < seconds < 2
    assert "may have happened" not in why
    # voters are back: now there is time for an election
    await cluster.start("b")
    await cluster.propose("a")


async def test_all_stop_and_come_back(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    for name in "abc":
        await cluster.propose(name)
    await trio.sleep(1)
    await cluster.stop("a", "b", "c")
    for name in "cba":
        engine = await cluster.start(name)
        assert len(engine.state.models) == 3, "known before anybody is met"
    for name in "abc":
        await cluster.propose(name)
    await cluster.settled()
    assert len(cluster.engine("b").state.models) == 6


async def test_a_cut_off_leader_steps_down_and_cannot_answer(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    cluster.network.simulated.isolate(cluster.peer("a"))
    await cluster.until(lambda: cluster.engine("a").status().leader is None)
    await cluster.until(lambda: any(n in "bc" for n in cluster.leaders()))
    await cluster.propose("b")
    with pytest.raises(Unavailable):
        await cluster.engine("a").read_barrier()
    term = cluster.engine("b").status().term
    await trio.sleep(60)
    cluster.network.simulated.rejoin(cluster.peer("a"))
    assert await cluster.leader() in "bc"
    assert cluster.engine("a").status().term == term, "a node that comes back disturbs nobody"
    await cluster.engine("a").read_barrier()
    assert len(cluster.engine("a").state.models) == 1


async def test_leadership_is_handed_over_from_any_node(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc", "d")
    for by, to in (("a", "b"), ("d", "c"), ("b", "a"), ("a", "a")):
        await cluster.engine(by).transfer(cluster.peer(to))
        assert cluster.engine(to).status().role == "leader"
        await cluster.propose(by)
    with pytest.raises(InvalidRequest) as caught:
        await cluster.engine("a").transfer(cluster.peer("d"))
    assert caught.value.code == "not_a_voter"


async def test_learners_follow_and_ask(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc", "de")
    assert cluster.engine("d").status().role == "learner"
    assert set(cluster.engine("d").status().learners) == cluster.peers("de")
    await cluster.propose("d")
    await cluster.engine("e").read_barrier()
    assert len(cluster.engine("e").state.models) == 1
    await cluster.stop("d", "e")
    await cluster.propose("a")


async def test_voters_change_in_one_step_and_jointly(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc", "de")
    leader = cluster.engine("a")
    await leader.reconfigure(cluster.peers("acde"), cluster.peers("b"))
    assert set(leader.status().voters) == cluster.peers("acde")
    assert set(leader.status().learners) == cluster.peers("b")
    await leader.reconfigure(cluster.peers("ade"), frozenset())
    assert not leader.status().learners
    await cluster.propose("d")
    await cluster.stop("b", "c")
    await cluster.stop("a")
    assert await cluster.leader() in "de"
    await cluster.propose("d")


async def test_a_leader_gives_up_its_own_vote(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    await cluster.engine("a").reconfigure(cluster.peers("bc"), cluster.peers("a"))
    assert await cluster.leader() in "bc"
    await cluster.propose("a")


async def test_reconfigure_refuses_what_makes_no_sense(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    engine = cluster.engine("a")
    with pytest.raises(InvalidRequest) as bad:
        await engine.reconfigure(frozenset(), cluster.peers("a"))
    assert bad.value.code == "bad_voters"
    with pytest.raises(InvalidRequest):
        await engine.reconfigure(cluster.peers("ab"), cluster.peers("b"))
    with pytest.raises(Unavailable) as unknown:
        await engine.reconfigure(cluster.peers("abz"), frozenset())
    assert unknown.value.code == "peer_unreachable"
    with pytest.raises(Refused) as other:
        await cluster.engine("b").reconfigure(cluster.peers("ab"), frozenset())
    assert other.value.code == "not_leader"
    await engine.reconfigure(cluster.peers("abc"), frozenset())

    async def second() -> None:
        with pytest.raises(Conflict) as caught:
            await engine.reconfigure(cluster.peers("ac"), frozenset())
        assert caught.value.code == "change_in_progress"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.reconfigure, cluster.peers("ab"), frozenset())
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(second)


async def test_a_late_node_gets_a_snapshot(cluster: Cluster, autojump_clock: MockClock) -> None:
    cluster.compact_entries = 8
    await cluster.found("abc")
    await cluster.stop("c")
    for n in range(1100):
        await cluster.engine("a").propose(burn(n))
    await cluster.start("c")
    await cluster.start("d")
    await cluster.until(lambda: cluster.peer("d") in cluster.engine("a").members.heard)
    await cluster.engine("a").reconfigure(cluster.peers("abc"), cluster.peers("d"))
    await cluster.settled()
    assert cluster.engine("d").node.applier.counters.snapshots_installed == 1
    assert len(cluster.engine("c").state.burnt) == len(cluster.engine("d").state.burnt) == 1100
    await cluster.stop("d")
    assert len((await cluster.start("d")).state.burnt) == 1100


async def test_compaction_on_demand_keeps_everything(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    for _ in range(10):
        await cluster.propose("b")
    index = await cluster.engine("b").compact()
    assert index == cluster.engine("b").state.index
    assert await cluster.engine("b").compact() == index
    await cluster.stop("b")
    engine = await cluster.start("b")
    assert len(engine.state.models) == 10
    await cluster.propose("b")


async def test_a_node_that_lost_its_disk_is_another_one(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.propose("a")
    old = cluster.engine("c").members.me
    await cluster.stop("c")
    await cluster.start("c", store=MemoryLog())
    assert cluster.engine("c").members.me != old
    leader = cluster.engine("a")
    await cluster.until(lambda: old not in leader.members.peers)
    await cluster.settled()
    assert set(leader.status().voters) == cluster.peers("abc")
    await cluster.propose("c")
    assert len(cluster.engine("c").state.models) == 2
    await cluster.stop("a")
    await cluster.propose("c")


async def test_applied_entries_come_in_order_once(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    seen: list[Command] = []

    async def follow() -> None:
        engine = cluster.engine("c")
        async with engine.applied(engine.state.index) as entries:
            async for entry in entries:
                seen.append(entry.command)
                if len(seen) == 5:
                    return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        for n in range(5):
            await cluster.engine("ab"[n % 2]).propose(model(n))
    assert seen == [model(n) for n in range(5)]


async def test_a_subscriber_from_before_a_snapshot_is_told(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.engine("a").compact()
    await cluster.stop("a")
    engine = await cluster.start("a")
    async with engine.applied(0) as entries:
        with pytest.raises(LimitExceeded) as caught:
            await entries.__anext__()
    assert caught.value.code == "lagging"


async def test_who_may_not_propose_is_refused_by_the_leader(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    asked: list[tuple[PeerId, str | None]] = []

    def authorise(command: Command, proposer: PeerId, role: str | None) -> None:
        asked.append((proposer, role))
        if proposer != cluster.peer("a"):
            raise Refused("No.", code="role_not_allowed")

    cluster.authorise = authorise
    await cluster.propose("a")
    with pytest.raises(Refused) as caught:
        await cluster.propose("b")
    assert caught.value.code == "role_not_allowed"
    assert asked == [(cluster.peer("a"), "voter"), (cluster.peer("b"), "voter")]
    assert cluster.engine("a").node.counters.refused_proposals == 1


async def test_many_proposals_share_writes(cluster: Cluster, autojump_clock: MockClock) -> None:
    cluster.stores["a"] = SlowLog()
    await cluster.found("abc")
    before = cluster.engine("a").node.disk.writes
    async with trio.open_nursery() as nursery:
        for n in range(200):
            nursery.start_soon(cluster.engine("abc"[n % 3]).propose, model(n))
    assert len(cluster.engine("a").state.models) == 200
    assert cluster.engine("a").node.disk.writes - before < 40


async def test_too_many_proposals_of_one_node(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    await cluster.stop("b", "c")
    refused: list[PyAgentError] = []

    async def one(n: int) -> None:
        try:
            await cluster.engine("a").propose(model(n))
        except PyAgentError as error:
            refused.append(error)

    async with trio.open_nursery() as nursery:
        for n in range(300):
            nursery.start_soon(one, n)
    assert sum(error.code == "too_many_proposals" for error in refused) == 44
    assert len(refused) == 300


async def test_a_node_without_the_log_says_so(cluster: Cluster, autojump_clock: MockClock) -> None:
    engine = await cluster.start("a")
    with pytest.raises(Unavailable) as caught:
        await engine.propose(model(1))
    assert caught.value.code == "no_leader"
    assert "not been given" in str(caught.value)
    assert engine.status().role == "learner"
    assert engine.status().voters == ()


async def test_a_founder_founds_once(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    await cluster.propose("a")
    await cluster.stop("a")
    engine = await cluster.start("a", founder=True)
    await cluster.leader()
    await engine.read_barrier()
    assert len(engine.state.models) == 1
    await cluster.propose("a")


async def test_a_learner_misses_its_leader(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("a", "b")
    await cluster.stop("a")
    engine = cluster.engine("b")
    await cluster.until(lambda: engine.status().leader is None, 3)
    with pytest.raises(Unavailable) as caught:
        await cluster.propose("b")
    assert caught.value.facts == {"voters": 1, "reachable": 0, "needed": 1, "missing": 1}
    await cluster.start("a")
    await cluster.propose("b")


async def test_a_leader_that_ends_in_order_is_not_missed(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    begun = trio.current_time()
    await cluster.finish("a")
    assert await cluster.leader() in "bc"
    assert trio.current_time() - begun < 0.5
    await cluster.propose("b")
    await cluster.finish("b")
    await cluster.stop("c")
    assert len((await cluster.start("c")).state.models) == 1


async def test_only_voters_say_who_leads(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    await cluster.found("abc", "d")
    monkeypatch.setattr(cluster.engine("a")._courier, "role_of", lambda peer: "client")
    with pytest.raises(Refused) as caught:
        await cluster.engine("d").transfer(cluster.peer("b"))
    assert caught.value.code == "role_not_allowed"
    await cluster.engine("c").transfer(cluster.peer("b"))


async def test_what_is_counted(cluster: Cluster, autojump_clock: MockClock) -> None:
    await cluster.found("abc")
    await cluster.propose("b")
    with pytest.raises(NotFound):
        await cluster.engine("a").propose(ForgetModel(Digest("0" * 64)))
    counted = cluster.engine("a").counters()
    assert counted["commits"] == 2
    assert counted["elections"] >= 1
    assert counted["streams"] == 2
    assert counted["bytes_sent"] > 0 < counted["bytes_received"]
    assert {"refused_messages", "refused_proposals", "writes", "dropped_messages"} <= set(counted)
