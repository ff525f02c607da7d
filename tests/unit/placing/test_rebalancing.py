"""When a better plan is worth moving layers for, and which nodes are slower than they say."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank, Slice
from pyagent_node.consensus.cluster import State
from pyagent_node.inference.pipeline.plan_types import MEMORY_SHARE, ModelShape, NodeFacts
from pyagent_node.inference.pipeline.stage_types import StageView
from pyagent_node.node.drafts import gain, lacking, slowed
from pyagent_node.node.placement_messages import PlacementReports, RankReport
from pyagent_node.node.planning import Swarm
from pyagent_node.node.rebalancing import (
    LOOK_SECONDS,
    LOOKS,
    REST_SECONDS,
    Improvement,
    Patience,
    Rebalancer,
    Speeds,
)
from pyagent_node.node.resharding import given_up

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
MODEL = Digest("1" * 64)
SHAPE = ModelShape("m", (100 * MIB,) * 10, (1000,) * 10, 10 * MIB, 100, 0, 1)


def placement(*cuts: int, peers: tuple[PeerId, ...] = (A, B), **changes: object) -> Placement:
    edges = (0, *cuts, 10)
    ranks = tuple(
        Rank(i, Slice(edges[i], edges[i + 1], i == len(edges) - 2), peers[i])
        for i in range(len(edges) - 1)
    )
    return msgspec.structs.replace(Placement(MODEL, 1, ranks, 64, 2), **changes)


def node(peer: PeerId, speed: float = 1e10, memory: int = 1 << 40) -> NodeFacts:
    return NodeFacts(peer, peer, memory, 1, speed, 1e15)


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


def offer(share: float, *, needed: bool = False) -> Improvement:
    return Improvement(share, needed, "it is faster", nothing)


# ---- patience ----------------------------------------------------------------------------------


def test_a_better_plan_must_be_better_for_a_while() -> None:
    patience, now = Patience(), 1000.0

    def accepts(found: Improvement | None, seconds: float = LOOK_SECONDS, epoch: int = 1) -> bool:
        nonlocal now
        now += seconds
        return patience.accepts(epoch, found, least=0.25, now=now)

    assert not accepts(offer(0.5))
    assert not accepts(offer(0.5)), "the epoch is young"
    assert accepts(offer(0.5), REST_SECONDS)
    assert not accepts(offer(0.2)), "too little"
    assert not accepts(offer(0.5)), "once"
    assert not accepts(None)
    assert [accepts(offer(0.5)) for _ in range(LOOKS)] == [False, True]
    patience.tried(now)
    looks = [accepts(offer(0.5)) for _ in range(5)]
    assert looks == [False, False, False, True, True]
    assert not accepts(offer(0.5), epoch=2), "somebody has changed it"


def test_what_must_move_does_not_wait_for_the_rest() -> None:
    patience = Patience()
    found = offer(0.0, needed=True)
    looks = [patience.accepts(1, found, least=0.25, now=float(at)) for at in range(LOOKS)]
    assert looks == [False] * (LOOKS - 1) + [True]


class FakeConsensus:
    def __init__(self, state: State) -> None:
        self.state = state
        self.leads = True


class FakeImprover:
    def __init__(self, found: Improvement | None) -> None:
        self.found = found
        self.asked: list[Mapping[PeerId, float]] = []

    async def improve(self, model: Digest, slowness: Mapping[PeerId, float]) -> Improvement | None:
        self.asked.append(slowness)
        await trio.lowlevel.checkpoint()
        return self.found


async def slow_b(_: Placement) -> dict[PeerId, float]:
    await trio.lowlevel.checkpoint()
    return {B: 3.0}


def rebalancer(state: State, improver: FakeImprover) -> tuple[Rebalancer, FakeConsensus]:
    consensus = FakeConsensus(state)
    return Rebalancer(consensus, improver, slow_b), consensus  # type: ignore[arg-type]


async def test_the_leader_moves_layers_once_and_rests(autojump_clock: MockClock) -> None:
    improver = FakeImprover(offer(0.5))
    made, _ = rebalancer(State(placements={MODEL: placement(5)}), improver)
    with trio.move_on_after(2 * REST_SECONDS + LOOK_SECONDS / 2):
        await made.run()
    assert made.moves == 1
    assert improver.asked[0] == {B: 3.0}


@pytest.mark.parametrize("why", ["follows", "off", "fixed", "busy"])
async def test_reasons_to_leave_it_alone(why: str, autojump_clock: MockClock) -> None:
    now = placement(5)
    state = State(placements={MODEL: now})
    if why == "off":
        state = msgspec.structs.replace(state, changed_settings={"rebalance": 0})
    if why == "fixed":
        state = State(placements={MODEL: placement(5, fixed=True)})
    if why == "busy":
        prepared = Prepared(MODEL, 7, 1, now.ranks, 64, 2, A)
        state = msgspec.structs.replace(state, prepared={MODEL: prepared})
    improver = FakeImprover(offer(0.9, needed=True))
    made, consensus = rebalancer(state, improver)
    consensus.leads = why != "follows"
    with trio.move_on_after(10 * LOOK_SECONDS):
        await made.run()
    assert (made.moves, improver.asked) == (0, [])


async def test_a_change_that_fails_is_tried_again_after_a_rest(autojump_clock: MockClock) -> None:
    tried: list[float] = []

    async def fail() -> None:
        tried.append(trio.current_time())
        raise Unavailable("not now", code="peer_lost")

    made, _ = rebalancer(
        State(placements={MODEL: placement(5)}), FakeImprover(Improvement(0.5, False, "", fail))
    )
    with trio.move_on_after(3 * REST_SECONDS):
        await made.run()
    assert len(tried) == 2
    assert tried[1] - tried[0] >= REST_SECONDS


# ---- what nodes really do ----------------------------------------------------------------------


def told(
    busy: Mapping[PeerId, tuple[float, int]], now: Placement
) -> dict[PeerId, PlacementReports]:
    found = {}
    for rank in now.ranks:
        seconds, tokens = busy[rank.peer_id]
        load = StageView(MODEL, 1, rank.rank, rank.slice, 1, 0, 0, tokens, tokens, seconds, 0)
        report = RankReport(MODEL, 1, rank.rank, "ready", load=load)
        found[rank.peer_id] = PlacementReports((report,), ())
    return found


def test_a_stage_that_is_slower_than_its_figures_shows() -> None:
    speeds, now = Speeds(), placement(5)
    facts = {A: node(A), B: node(B)}
    assert speeds.slowness(now, SHAPE, facts, told({A: (1.0, 100), B: (1.0, 100)}, now)) == {}
    assert speeds.slowness(now, SHAPE, facts, told({A: (2.0, 200), B: (2.2, 200)}, now)) == {}
    found = speeds.slowness(now, SHAPE, facts, told({A: (3.0, 300), B: (6.2, 300)}, now))
    assert found.keys() == {B}
    assert 3 < found[B] < 4.1
    assert speeds.slowness(now, SHAPE, facts, told({A: (3.1, 310), B: (99.0, 310)}, now)) == {}
    speeds.forget({})
    assert speeds.slowness(now, SHAPE, facts, told({A: (9.0, 900), B: (9.0, 900)}, now)) == {}


def test_plans_are_made_with_what_nodes_really_do() -> None:
    swarm = Swarm([node(A), node(B)], {})
    assert [n.bandwidth for n in slowed(swarm, {B: 4.0}).nodes] == [1e10, 2.5e9]


def test_a_gain_holds_whoever_asks() -> None:
    rtt = {(A, B): 2.0, (A, C): 2.0, (B, C): 2.0}
    swarm = Swarm([node(A), node(B), node(C, 4e10)], rtt)
    before = placement(5)
    better = gain(SHAPE, before, placement(5, peers=(A, C)).ranks, swarm)
    worse = gain(SHAPE, placement(5, peers=(A, C)), before.ranks, swarm)
    assert better is not None
    assert worse is not None
    assert 0.2 < better < 0.5
    assert worse < 0
    assert gain(SHAPE, None, before.ranks, swarm) is None
    assert gain(SHAPE, before, before.ranks, Swarm([node(A)], {})) is None


def test_what_nodes_lack_to_hold_both() -> None:
    need = SHAPE.needs(Slice(4, 10, True), n_ctx=64, n_seq=2)
    before = placement(5)
    next_ranks = placement(4).ranks
    free = {A: 1 << 40, B: need // 2}
    found = lacking(SHAPE, next_ranks, before, free, n_ctx=64, n_seq=2)
    assert found == {B: need - int((need // 2) * MEMORY_SHARE)}
    assert lacking(SHAPE, before.ranks, before, {}, n_ctx=64, n_seq=2) == {}, "they have it"
    assert lacking(SHAPE, before.ranks, before, {}, n_ctx=65, n_seq=2).keys() == {A, B}
    assert lacking(SHAPE, next_ranks, None, {}, n_ctx=64, n_seq=2) == {}


# ---- preparations that cannot succeed ----------------------------------------------------------


def test_who_is_gone_ends_a_preparation() -> None:
    prepared = Prepared(MODEL, 7, 1, placement(5).ranks, 64, 2, C)
    assert given_up(prepared, health=lambda _: "alive") is None
    assert given_up(prepared, health=lambda p: "dead" if p == B else "alive") is not None
    dead = lambda p: "dead" if p == C else "alive"  # noqa: E731
    assert given_up(prepared, health=dead, silent={C: 5.0}) is None, "it may be restarting"
    assert given_up(prepared, health=dead, silent={C: 60.0}) is not None
    assert given_up(prepared, health=lambda _: "alive", expelled=[C]) is not None
    assert given_up(prepared, health=lambda _: "alive", expelled=[A]) is not None
