"""What decides a plan: speeds, memory, power and prompts, and how it says why."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.inference.machine import Power
from pyagent_node.inference.pipeline.plan_types import (
    MEMORY_SHARE,
    ModelShape,
    NodeFacts,
    Plan,
    PlanOptions,
)
from pyagent_node.inference.pipeline.planner import RttMatrix, plan

GB = 1_000_000_000


def node(name: str, speed: float = 20.0, memory: float = 8.0, **kwargs: object) -> NodeFacts:
    """Return a node; ``speed`` is in GB a second, ``memory`` in GB."""
    made = NodeFacts(PeerId(name), name, int(memory * GB), 4, speed * GB, 10 * speed * GB)
    return msgspec.structs.replace(made, **kwargs)


def model(layers: int = 24, head: int = 0) -> ModelShape:
    """Return a model of equal layers of 20 MB; its head weighs as much as so many of them."""
    each = 20_000_000
    return ModelShape(
        "toy", (each,) * layers, (2 * each,) * layers, head * each, 2 * head * each, 0, 1024
    )


def near(nodes: list[NodeFacts]) -> RttMatrix:
    """Return the same short way between all."""
    peers = [each.peer_id for each in nodes]
    return dict.fromkeys(itertools.combinations(peers, 2), 1.0)


def options(**kwargs: object) -> PlanOptions:
    """Return options with small reservations and some prompts."""
    made = PlanOptions(n_ctx=512, n_seq=1, prompt_tokens=2.0)
    return msgspec.structs.replace(made, **kwargs)


def layers_of(found: Plan) -> dict[str, int]:
    """Return how many layers each node has."""
    return {each.name: sum(p.last - p.first for p in each.slices) for each in found.nodes}


speeds = st.lists(st.floats(1.0, 100.0), min_size=2, max_size=4)


@settings(max_examples=60)
@given(speeds, st.floats(0.0, 8.0))
def test_a_faster_node_never_gets_fewer_layers_than_a_slower_one(
    figures: list[float], prompts: float
) -> None:
    nodes = [node("abcd"[i], speed) for i, speed in enumerate(figures)]
    wish = options(ranks=len(nodes), prompt_tokens=prompts)
    found = layers_of(plan(model(), nodes, near(nodes), wish, head=PeerId("h")))
    for one, other in itertools.permutations(nodes, 2):
        if one.bandwidth > other.bandwidth * 1.001:
            assert found[one.name] >= found[other.name]


@settings(max_examples=60)
@given(speeds, st.integers(0, 8), st.data())
def test_what_is_minimised_is_never_more_than_for_an_equal_split(
    figures: list[float], head: int, data: st.DataObject
) -> None:
    shares = [data.draw(st.sampled_from([0.5, 1.0])) for _ in figures]
    nodes = [
        node("abcd"[i], speed, share=shares[i], head_bandwidth=2 * speed * GB)
        for i, speed in enumerate(figures)
    ]
    shape, count = model(head=head), len(nodes)
    ends = tuple(shape.n_layers * i // count for i in range(1, count))
    free = plan(shape, nodes, near(nodes), options(ranks=count), head=PeerId("h"))
    equal = plan(shape, nodes, near(nodes), options(boundaries=ends), head=PeerId("h"))
    assert free.cost_seconds <= equal.cost_seconds * (1 + 1e-9)
    assert math.isfinite(free.cost_seconds)


@settings(max_examples=60)
@given(st.lists(st.floats(0.1, 0.6), min_size=1, max_size=5), st.data())
def test_no_plan_takes_more_than_is_free_less_a_margin(
    memories: list[float], data: st.DataObject
) -> None:
    nodes = [
        node("abcde"[i], data.draw(st.floats(1, 50)), memory) for i, memory in enumerate(memories)
    ]
    try:
        found = plan(model(head=2), nodes, near(nodes), options(), head=PeerId("a"))
    except Unavailable:
        return
    for each in found.nodes:
        facts = next(n for n in nodes if n.peer_id == each.peer_id)
        assert each.usable_bytes == int(facts.memory_bytes * MEMORY_SHARE)
        assert each.need_bytes <= each.usable_bytes
    again = plan(model(head=2), nodes[::-1], near(nodes), options(), head=PeerId("a"))
    assert again == found


def test_a_node_on_battery_gets_less_or_nothing() -> None:
    power = Power("battery", 80.0)
    nodes = [node("a"), node("b", share=0.5, power=power)]
    found = plan(model(), nodes, near(nodes), options(ranks=2), head=PeerId("a"))
    assert layers_of(found)["b"] < layers_of(found)["a"]
    assert "50% of its speed (battery at 80%)" in found.nodes[-1].why or any(
        "50% of its speed (battery at 80%)" in each.why for each in found.nodes
    )
    # what is predicted is what it takes, not what it counts for
    mains = [node("a"), node("b")]
    same = tuple(rank.slice.last for rank in found.ranks[:-1])
    peers = tuple(rank.peer_id for rank in found.ranks)
    wish = options(boundaries=same, nodes=peers)
    judged = plan(model(), mains, near(mains), wish, head=PeerId("a"))
    assert judged.token_seconds == pytest.approx(found.token_seconds)
    assert judged.weighed_seconds < found.weighed_seconds


def test_a_node_that_wants_nothing_is_taken_only_where_it_must_be() -> None:
    power = Power("battery", 9.0)
    nodes = [node("a", 2.0), node("b", 90.0, share=0.0, power=power)]
    found = plan(model(), nodes, near(nodes), options(), head=PeerId("b"))
    assert layers_of(found) == {"a": 24, "b": 0}
    assert found.nodes[-1].why == "takes no work (battery at 9%)"
    small = [node("a", memory=0.4), nodes[1]]
    needed = plan(model(), small, near(small), options(), head=PeerId("b"))
    assert layers_of(needed)["b"] > 0
    assert any("it does not work without it" in each.why for each in needed.nodes)
    alone = plan(model(), nodes[1:], {}, options(), head=PeerId("b"))
    assert layers_of(alone) == {"b": 24}


def test_a_slow_head_sends_the_last_rank_elsewhere_and_prompts_count() -> None:
    nodes = [node("a", head_bandwidth=1 * GB), node("b", head_bandwidth=80 * GB)]
    found = plan(model(head=12), nodes, near(nodes), options(ranks=2), head=PeerId("h"))
    assert found.ranks[-1].peer_id == "b"
    fast = node("b", prompt_compute=1000 * GB)
    slow = node("a", prompt_compute=2 * GB)
    without = plan(model(), [slow, fast], near(nodes), options(prompt_tokens=0.0), head=PeerId("h"))
    assert layers_of(without)["a"] == 24
    weighed = plan(model(), [slow, fast], near(nodes), options(), head=PeerId("h"))
    assert layers_of(weighed)["b"] == 24
    assert weighed.prompt_seconds < without.prompt_seconds


def test_why_says_what_one_layer_would_change() -> None:
    nodes = [node("a"), node("b", 15.0), node("c", memory=0.05)]
    found = plan(model(), nodes, near(nodes), options(ranks=2), head=PeerId("a"))
    why = {each.name: each.why for each in found.nodes}
    assert "a layer more would cost +" in why["a"]
    assert "a layer less would cost +" in why["b"]
    assert why["c"].startswith("no room: a layer needs")
    alone = plan(model(), nodes, near(nodes), options(), head=PeerId("a"))
    why = {each.name: each.why for each in alone.nodes}
    assert why["a"].startswith("holds all of it: two ranks would take")
    assert why["b"].startswith("not needed: 2 ranks would take")
    cut = plan(model(), nodes, near(nodes), options(boundaries=(9,)), head=PeerId("a"))
    assert "the cut was asked for" in cut.nodes[0].why
    full = [node("a", memory=0.4), node("b", 5.0)]
    tight = plan(model(), full, near(full), options(), head=PeerId("a"))
    assert "no room for a layer more" in next(n.why for n in tight.nodes if n.name == "a")


def test_a_full_search_is_not_asked_of_nodes_that_lie() -> None:
    nodes = [node("a"), node("b", share=math.nan), node("c", share=7.0)]
    found = plan(model(), nodes, near(nodes), options(), head=PeerId("a"))
    assert [each.name for each in found.nodes] == ["a"]
