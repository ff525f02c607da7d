"""From a request and a header to what the planner is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import ACTIVATIONS, Digest, PeerId, Slice
from pyagent_node.inference.backends import survey
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.pipeline.plan_types import NodeFacts
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.facts import FactsProvider, Speed, best_time, measure_speed
from pyagent_node.node.planning import Swarm, choose_nodes, planner_shape


def facts(peer: str, name: str) -> NodeFacts:
    """Return a node."""
    return NodeFacts(PeerId(peer), name, 1, 1, 1.0, 1.0)


SWARM = Swarm([facts("p1", "ann"), facts("p2", "bob"), facts("p3", "bob")], {})


def choose(**kwargs: object) -> tuple[list[str], tuple[str, ...] | None]:
    """Return the nodes to plan with, and the nodes of the ranks if they are fixed."""
    request = LoadRequest(model="m", **kwargs)  # type: ignore[arg-type]
    nodes, options = choose_nodes(request, SWARM, n_ctx=8, n_seq=1)
    assert (options.ranks, options.boundaries) == (request.ranks, request.layers)
    return [str(n.peer_id) for n in nodes], options.nodes


def test_without_nodes_all_take_part() -> None:
    assert choose(ranks=2) == (["p1", "p2", "p3"], None)


def test_as_many_nodes_as_ranks_are_their_order() -> None:
    assert choose(ranks=2, nodes=("p2", "ann")) == (["p2", "p1"], ("p2", "p1"))
    assert choose(layers=(3, 5), nodes=("ann", "p2", "ann")) == (
        ["p1", "p2"],
        ("p1", "p2", "p1"),
    )


def test_any_other_number_of_nodes_restricts_the_choice() -> None:
    assert choose(nodes=("p2", "ann")) == (["p2", "p1"], None)
    assert choose(ranks=1, nodes=("p2", "ann")) == (["p2", "p1"], None)


@pytest.mark.parametrize(("name", "code"), [("eve", "unknown_node"), ("bob", "ambiguous_node")])
def test_a_name_must_mean_one_node(name: str, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        choose(nodes=(name,))
    assert caught.value.code == code


@pytest.mark.model
def test_sizes_are_those_of_the_tensors(bundled_model: Path) -> None:
    header = read_header(bundled_model)
    shape = planner_shape(header, "small")
    assert (shape.n_layers, shape.name) == (30, "small")
    tensors = sum(t.nbytes for t in header.tensors.values())
    assert sum(shape.layer_bytes) + shape.head_bytes + shape.embedding_bytes == tensors
    assert shape.kv_bytes * 30 == 23_040
    # Two operations a weight; the embedding table is the output head here.
    assert sum(shape.layer_flops) + shape.head_flops == pytest.approx(2 * 134.5e6, rel=0.01)


def test_the_best_of_several_runs_counts() -> None:
    times = iter([0, 0, 5, 5, 7, 7, 7, 12, 12])
    assert best_time(lambda: None, 10, lambda: float(next(times))) == 2.0


async def test_a_measurement_gives_sensible_figures() -> None:
    speed = await measure_speed(1)
    assert 1e8 < speed.bandwidth < 1e13
    assert 1e8 < speed.compute < 1e14


async def test_the_speed_is_measured_once_and_the_memory_every_time(
    mock_clock: MockClock,
) -> None:
    measured: list[int] = []
    memory = iter([10, 20])

    async def measure(threads: int) -> Speed:
        measured.append(threads)
        return Speed(1.0, 2.0)

    provider = FactsProvider(
        PeerId("p"),
        "me",
        lambda digest: (Slice(0, 3, False),) if digest == "a" else (),
        threads=3,
        measure=measure,
        memory=lambda: next(memory),
    )
    first = await provider.facts(Digest("a"))
    second = await provider.facts(Digest("b"))
    assert first == NodeFacts(
        PeerId("p"), "me", 10, 3, 1.0, 2.0, (Slice(0, 3, False),), survey(), ACTIVATIONS
    )
    assert second == NodeFacts(PeerId("p"), "me", 20, 3, 1.0, 2.0, (), survey(), ACTIVATIONS)
    assert measured == [3]
