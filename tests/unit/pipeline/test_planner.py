"""The planner against brute force, and what it says when there is no plan."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest, PeerId, Placement, Slice
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts, Plan, PlanOptions
from pyagent_node.inference.pipeline.planner import (
    FETCH_SECONDS,
    MEMORY_SHARE,
    RUNNER_BYTES,
    STAGE_SECONDS,
    RttMatrix,
    plan,
)

GB = 1_000_000_000


def node(
    name: str,
    *,
    memory: float = 8 * GB,
    bandwidth: float = 20 * GB,
    compute: float = 200 * GB,
    held: tuple[Slice, ...] = (),
) -> NodeFacts:
    """Return a node that is called what its peer id is."""
    return NodeFacts(PeerId(name), name, int(memory), 4, bandwidth, compute, held)


def model(layers: int = 30, layer_bytes: int = 3_000_000) -> ModelShape:
    """Return a model of equal layers."""
    return ModelShape(
        name="toy",
        layer_bytes=(layer_bytes,) * layers,
        layer_flops=(2 * layer_bytes,) * layers,
        head_bytes=10 * layer_bytes,
        head_flops=20 * layer_bytes,
        embedding_bytes=0,
        kv_bytes=768,
    )


def options(
    ranks: int | None = None,
    boundaries: tuple[int, ...] | None = None,
    nodes: tuple[str, ...] | None = None,
) -> PlanOptions:
    """Return options with small reservations."""
    peers = None if nodes is None else tuple(PeerId(n) for n in nodes)
    return PlanOptions(n_ctx=512, n_seq=2, ranks=ranks, boundaries=boundaries, nodes=peers)


def uniform(names: str, rtt: float = 1.0) -> RttMatrix:
    """Return the same round trip between all."""
    return {(PeerId(a), PeerId(b)): rtt for a, b in itertools.combinations(names, 2)}


def layers(found: Plan) -> list[tuple[str, int, int]]:
    """Return (node, first, last) of each rank."""
    return [(str(r.peer_id), r.slice.first, r.slice.last) for r in found.ranks]


# ---- against brute force ---------------------------------------------------------------------


def cost_of(
    shape: ModelShape,
    nodes: list[NodeFacts],
    rtt: RttMatrix,
    opts: PlanOptions,
    head: str,
    ranks: list[tuple[int, int, int]],
) -> tuple[float, float]:
    """Return (cost, latency) of ranks given as (node, first, last), as the module defines them."""
    total_bytes = sum(shape.layer_bytes) + shape.head_bytes
    total_flops = sum(shape.layer_flops) + shape.head_flops
    typical = max(
        total_bytes / (sum(n.bandwidth for n in nodes) / len(nodes)),
        total_flops / (sum(n.compute for n in nodes) / len(nodes)),
    )

    def hop(a: str, b: str) -> float:
        pair = (PeerId(a), PeerId(b))
        return 0.0 if a == b else rtt.get(pair, rtt.get((pair[1], pair[0]), 50.0)) / 2000

    cost = latency = 0.0
    at = head
    for index, first, last in ranks:
        n, tail = nodes[index], last == shape.n_layers
        weights = sum(shape.layer_bytes[first:last]) + (shape.head_bytes if tail else 0)
        flops = sum(shape.layer_flops[first:last]) + (shape.head_flops if tail else 0)
        kv = (last - first) * shape.kv_bytes * opts.n_ctx * opts.n_seq
        extra = shape.embedding_bytes if (first, last) == (0, shape.n_layers) else 0
        if weights + kv + extra > n.memory_bytes * MEMORY_SHARE - RUNNER_BYTES:
            return math.inf, math.inf
        s = max(weights / n.bandwidth, flops / n.compute) + STAGE_SECONDS
        held = any(p.first <= first and last <= p.last for p in n.held)
        cost += s + s * s / (2 * typical) + (0 if held else FETCH_SECONDS) + hop(at, n.peer_id)
        latency += s + hop(at, n.peer_id)
        at = n.peer_id
    return cost + hop(at, head), latency + hop(at, head)


def all_plans(n_layers: int, n_nodes: int, count: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield every way to cut the layers into ``count`` ranks on different nodes."""
    for cuts in itertools.combinations(range(1, n_layers), count - 1):
        ends = (0, *cuts, n_layers)
        for order in itertools.permutations(range(n_nodes), count):
            yield [(o, a, b) for o, (a, b) in zip(order, itertools.pairwise(ends), strict=True)]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[ModelShape, list[NodeFacts], RttMatrix, PlanOptions]:
    """Draw a model, up to four nodes that may be too small, and their distances."""
    n_layers = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 40), min_size=n_layers, max_size=n_layers))
    flops = draw(st.lists(st.integers(1, 40), min_size=n_layers, max_size=n_layers))
    shape = ModelShape(
        "drawn",
        tuple(s * MIB for s in sizes),
        tuple(f * 10_000_000 for f in flops),
        draw(st.integers(0, 40)) * MIB,
        draw(st.integers(0, 40)) * 10_000_000,
        draw(st.integers(0, 40)) * MIB,
        draw(st.integers(0, 2000)),
    )
    names = "abcd"[: draw(st.integers(1, 4))]
    nodes = [
        node(
            name,
            memory=draw(st.integers(100, 400)) * MIB,
            bandwidth=draw(st.integers(1, 40)) * GB,
            compute=draw(st.integers(1, 40)) * GB,
            held=draw(st.sampled_from([(), (Slice(0, 3, False),)])),
        )
        for name in names
    ]
    rtt = {pair: draw(st.floats(0, 100)) for pair in uniform(names + "h")}
    return shape, nodes, rtt, options()


@settings(max_examples=150)
@given(worlds(), st.integers(1, 4))
def test_a_given_number_of_ranks_costs_no_more_than_any_other_plan(
    world: tuple[ModelShape, list[NodeFacts], RttMatrix, PlanOptions], count: int
) -> None:
    shape, nodes, rtt, opts = world
    count = min(count, shape.n_layers, len(nodes))
    opts = PlanOptions(opts.n_ctx, opts.n_seq, ranks=count)
    best = min(
        cost_of(shape, nodes, rtt, opts, "h", ranks)[0]
        for ranks in all_plans(shape.n_layers, len(nodes), count)
    )
    if math.isinf(best):
        with pytest.raises(Unavailable) as caught:
            plan(shape, nodes, rtt, opts, head=PeerId("h"))
        assert caught.value.code == "not_enough_memory"
        return
    found = plan(shape, nodes, rtt, opts, head=PeerId("h"))
    index = {n.peer_id: i for i, n in enumerate(nodes)}
    ranks = [(index[r.peer_id], r.slice.first, r.slice.last) for r in found.ranks]
    cost, latency = cost_of(shape, nodes, rtt, opts, "h", ranks)
    assert cost == pytest.approx(best)
    assert found.token_seconds == pytest.approx(latency)
    Placement(Digest("d"), 1, found.ranks, 1, 1).check(shape.n_layers)


@settings(max_examples=50)
@given(worlds())
def test_an_open_number_of_ranks_is_the_fastest_one(
    world: tuple[ModelShape, list[NodeFacts], RttMatrix, PlanOptions],
) -> None:
    shape, nodes, rtt, opts = world
    times = {}
    for count in range(1, min(len(nodes), shape.n_layers) + 1):
        try:
            each = PlanOptions(opts.n_ctx, opts.n_seq, ranks=count)
            times[count] = plan(shape, nodes, rtt, each, head=PeerId("h")).token_seconds
        except Unavailable:
            continue
    if not times:
        with pytest.raises(Unavailable):
            plan(shape, nodes, rtt, opts, head=PeerId("h"))
        return
    found = plan(shape, nodes, rtt, opts, head=PeerId("h"))
    assert found.token_seconds == min(times.values())
    assert len(found.ranks) == min(times, key=lambda c: (times[c], c))


# ---- by example ------------------------------------------------------------------------------


def test_one_node_is_enough_for_a_model_that_fits() -> None:
    found = plan(model(), [node(n) for n in "abc"], uniform("abc"), options(), head=PeerId("b"))
    assert layers(found) == [("b", 0, 30)]


def test_equal_nodes_get_equal_shares_even_when_measurements_are_noisy() -> None:
    nodes = [node("a", bandwidth=20 * GB), node("b", bandwidth=21 * GB), node("c")]
    found = plan(model(), nodes, uniform("abc"), options(ranks=3), head=PeerId("a"))
    sizes = [r.slice.last - r.slice.first for r in found.ranks]
    # The output head weighs as much as ten layers here.
    assert sizes[-1] == min(sizes)
    assert all(2 <= size <= 17 for size in sizes), sizes


def test_a_model_too_large_for_one_node_is_spread() -> None:
    small = [node(n, memory=1.0 * GB) for n in "abcd"]
    found = plan(model(30, 60_000_000), small, uniform("abcd"), options(), head=PeerId("a"))
    assert len(found.ranks) == 4
    assert "of weights" in found.explanation[0]
    assert found.explanation[-1].startswith("predicted")


def test_a_far_node_is_avoided_when_near_ones_do() -> None:
    rtt = dict(uniform("ab", 1.0)) | {
        (PeerId("a"), PeerId("c")): 80.0,
        (PeerId("b"), PeerId("c")): 80.0,
    }
    nodes = [node("a"), node("b"), node("c", bandwidth=100 * GB)]
    found = plan(model(), nodes, rtt, options(ranks=2), head=PeerId("a"))
    assert {r.peer_id for r in found.ranks} == {"a", "b"}


def test_between_equals_the_one_that_holds_the_bytes_is_taken() -> None:
    nodes = [node("a"), node("b", held=(Slice(0, 30, True),)), node("c")]
    found = plan(model(), nodes, uniform("abcz"), options(ranks=1), head=PeerId("z"))
    assert layers(found) == [("b", 0, 30)]


def test_the_users_boundaries_and_nodes_hold() -> None:
    nodes = [node(n) for n in "abc"]
    found = plan(
        model(),
        nodes,
        uniform("abc"),
        options(boundaries=(3, 17), nodes=("c", "a", "c")),
        head=PeerId("a"),
    )
    assert layers(found) == [("c", 0, 3), ("a", 3, 17), ("c", 17, 30)]


def test_one_node_may_hold_every_rank_when_it_is_named() -> None:
    found = plan(
        model(), [node("a")], {}, options(ranks=3, nodes=("a", "a", "a")), head=PeerId("a")
    )
    assert [r.peer_id for r in found.ranks] == ["a"] * 3


def test_boundaries_alone_leave_the_nodes_open() -> None:
    nodes = [node("a", memory=0.4 * GB), node("b", memory=4 * GB)]
    found = plan(
        model(30, 20_000_000), nodes, uniform("ab"), options(boundaries=(5,)), head=PeerId("a")
    )
    assert layers(found) == [("a", 0, 5), ("b", 5, 30)]


def test_beyond_eight_nodes_a_plan_is_still_found() -> None:
    names = "abcdefghijkl"
    nodes = [node(n, memory=(0.4 + 0.05 * i) * GB) for i, n in enumerate(names)]
    found = plan(model(40, 60_000_000), nodes, uniform(names), options(), head=PeerId("a"))
    Placement(Digest("d"), 1, found.ranks, 1, 1).check(40)
    assert len(found.ranks) >= 5


def test_a_model_larger_than_all_nodes_together_names_what_is_missing() -> None:
    nodes = [node(n, memory=1 * GB) for n in "ab"]
    with pytest.raises(Unavailable) as caught:
        plan(model(30, 200_000_000), nodes, uniform("ab"), options(), head=PeerId("a"))
    error = caught.value
    assert error.code == "not_enough_memory"
    facts = error.facts
    assert isinstance(facts["needed_bytes"], int)
    assert isinstance(facts["available_bytes"], int)
    assert facts["missing_bytes"] == facts["needed_bytes"] - facts["available_bytes"]
    assert "a 900 MB, b 900 MB" in str(error)


def test_two_ranks_on_one_node_must_fit_it_together() -> None:
    with pytest.raises(Unavailable) as caught:
        plan(
            model(30, 60_000_000),
            [node("a", memory=1.6 * GB)],
            {},
            options(ranks=2, nodes=("a", "a")),
            head=PeerId("a"),
        )
    assert caught.value.code == "not_enough_memory"


@pytest.mark.parametrize(
    ("opts", "code"),
    [
        (options(boundaries=(0, 10)), "bad_boundaries"),
        (options(boundaries=(10, 10)), "bad_boundaries"),
        (options(boundaries=(20, 10)), "bad_boundaries"),
        (options(boundaries=(30,)), "bad_boundaries"),
        (options(boundaries=(-1,)), "bad_boundaries"),
        (options(ranks=0), "bad_ranks"),
        (options(ranks=-1), "bad_ranks"),
        (options(ranks=4), "bad_ranks"),
        (options(ranks=31, nodes=("a",) * 31), "bad_ranks"),
        (options(ranks=2, boundaries=(10, 20)), "bad_ranks"),
        (options(nodes=("a", "b"), boundaries=(10, 20)), "bad_ranks"),
        (options(nodes=()), "bad_ranks"),
        (options(nodes=("a", "x")), "unknown_node"),
        (PlanOptions(n_ctx=0, n_seq=1), "bad_parameter"),
        (PlanOptions(n_ctx=1, n_seq=0), "bad_parameter"),
    ],
)
def test_options_that_can_never_hold_are_refused(opts: PlanOptions, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(model(), [node(n) for n in "abc"], uniform("abc"), opts, head=PeerId("a"))
    assert caught.value.code == code


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1e30])
def test_a_node_with_senseless_figures_is_left_out(value: float) -> None:
    nodes = [node("a"), node("b", bandwidth=value), node("c", compute=value)]
    found = plan(model(), nodes, uniform("abc"), options(), head=PeerId("b"))
    assert layers(found) == [("a", 0, 30)]
    with pytest.raises(Unavailable) as caught:
        plan(model(), nodes[1:], uniform("abc"), options(), head=PeerId("b"))
    assert caught.value.code == "no_nodes"
