"""Which backend computes what: names, what is missing, and what is said of it."""

from __future__ import annotations

import msgspec
import pytest

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Unsupported
from pyagent_node.base.types import (
    ACTIVATIONS,
    PeerId,
    Placement,
    Prepared,
    Rank,
    Slice,
    backend_of,
)
from pyagent_node.inference.backend_names import AUTO, CHOICES, BackendState, choose
from pyagent_node.inference.backends import open_backend, survey
from pyagent_node.inference.pipeline.plan_types import NodeFacts
from pyagent_node.node.backend_choice import explain_backends, with_activations, with_backends
from pyagent_node.node.holdings import runner_key, wanted

LLAMA = BackendState("llama.cpp", "0.3", "cpu")
NO_TORCH = BackendState("torch", "", "cpu")
TORCH = BackendState("torch", "2.9", "cuda")
MLX = BackendState("mlx", "0.32", "metal")
MLX_CPU = BackendState("mlx", "0.32", "cpu")


def node(name: str, *states: BackendState) -> NodeFacts:
    return NodeFacts(PeerId(f"peer-{name}"), name, 1 << 30, 1, 1e9, 1e9, (), states)


OLD, PC, MAC = node("old"), node("pc", LLAMA, TORCH), node("mac", LLAMA, NO_TORCH, MLX)
NODES = [OLD, PC, MAC]


def test_auto_takes_what_has_an_accelerator() -> None:
    assert choose(AUTO, [LLAMA, TORCH, MLX]).name == "mlx"
    assert choose(AUTO, [LLAMA, TORCH]).name == "torch"
    assert choose(AUTO, [LLAMA, NO_TORCH, MLX_CPU]).name == "llama.cpp"
    assert choose(AUTO, []).name == "llama.cpp"
    assert choose("mlx", [LLAMA, MLX_CPU]).name == "mlx"


def test_what_is_not_installed_is_one_line_that_says_what_to_install() -> None:
    with pytest.raises(Unsupported) as caught:
        choose("torch", [LLAMA, NO_TORCH])
    assert caught.value.code == "backend_missing"
    assert caught.value.remedy == "Install it: pip install 'pyagent-node[torch]'"
    with pytest.raises(InvalidRequest) as wrong:
        choose("cuda", [LLAMA])
    assert all(name in (wrong.value.remedy or "") for name in CHOICES)


def test_every_node_that_has_it_is_taken() -> None:
    assert with_backends(NODES, None, "llama") == (NODES, ())
    assert with_backends(NODES, "auto", "gemma") == (NODES, ())
    assert with_backends(NODES, "mlx", "llama") == ([MAC], ((MAC.peer_id, "mlx"),))
    able, chosen = with_backends(NODES, "llama.cpp", "gemma")
    assert able == NODES
    assert dict(chosen) == {n.peer_id: "llama.cpp" for n in NODES}


def test_nodes_are_named_one_by_one() -> None:
    able, chosen = with_backends(NODES, f"pc=torch, {MAC.peer_id}=llama.cpp,old=auto", "qwen2")
    assert able == NODES
    assert dict(chosen) == {PC.peer_id: "torch", MAC.peer_id: "llama.cpp"}


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("vulkan", "bad_backend"),
        ("pc=", "bad_backend"),
        ("=mlx", "unknown_node"),
        ("nobody=mlx", "unknown_node"),
        ("pc=torch,pc=torch", "bad_backend"),
        ("old=torch", "backend_missing"),
        ("mac=torch", "backend_missing"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: str, code: str) -> None:
    with pytest.raises(PyAgentError) as caught:
        with_backends(NODES, asked, "llama")
    assert caught.value.code == code
    assert caught.value.remedy or code == "bad_backend"


def test_a_node_without_a_rank_may_be_named_and_one_that_is_away_keeps_its_choice() -> None:
    able, chosen = with_backends([OLD], "mac=mlx,old=llama.cpp", "llama", swarm=NODES)
    assert able == [OLD]
    assert chosen == tuple(sorted([(MAC.peer_id, "mlx"), (OLD.peer_id, "llama.cpp")]))
    _, everywhere = with_backends([OLD], "llama.cpp", "llama", swarm=NODES)
    assert len(everywhere) == len(NODES)
    said = f"{MAC.peer_id}=mlx"
    assert with_backends([OLD], said, "llama", before=((MAC.peer_id, "mlx"),)) == (
        [OLD],
        ((MAC.peer_id, "mlx"),),
    )
    with pytest.raises(InvalidRequest):
        with_backends([OLD], said, "llama")


def test_a_backend_that_a_planner_chose_and_that_is_gone_is_forgotten() -> None:
    before = ((MAC.peer_id, "mlx"), (PC.peer_id, "torch"))
    said = ",".join(f"{peer}={name}" for peer, name in before)
    bare = node("mac", LLAMA)
    able, chosen = with_backends([OLD, PC, bare], said, "llama", before=before)
    assert able == [OLD, PC, bare]
    assert chosen == ((PC.peer_id, "torch"),)
    with pytest.raises(Unsupported):  # a person says so now
        with_backends([OLD, PC, bare], "mac=mlx", "llama", before=before)


def test_nobody_has_it_or_nothing_can_compute_it() -> None:
    with pytest.raises(Unsupported) as caught:
        with_backends([OLD], "mlx", "llama")
    assert caught.value.code == "backend_missing"
    assert "old" in caught.value.message
    with pytest.raises(Unsupported) as foreign:
        with_backends(NODES, "mac=mlx", "gemma")
    assert foreign.value.code == "unsupported_architecture"


def test_the_plan_says_who_computes_with_what_and_why() -> None:
    ranks = [
        Rank(i, Slice(i, i + 1, i == 2), each.peer_id) for i, each in enumerate((OLD, PC, MAC))
    ]
    lines = explain_backends(ranks, NODES, (), "llama")
    assert lines == (
        "rank 0: old computes with llama.cpp (the fastest on a processor)",
        "rank 1: pc computes with torch 2.9 (it computes on cuda)",
        "rank 2: mac computes with mlx 0.32 (it computes on metal)",
    )
    assert (
        "as asked for" in explain_backends(ranks, NODES, ((PC.peer_id, "llama.cpp"),), "llama")[1]
    )
    assert explain_backends(ranks, NODES, (), "gemma") == ()
    assert explain_backends(ranks[:1], NODES, (), "llama") == ()


def test_a_runner_is_named_by_its_backend_too() -> None:
    ranks = (Rank(0, Slice(0, 2, True), PC.peer_id, (MAC.peer_id,)),)
    placement = Placement("m", 1, ranks, 64, 1, backends=((PC.peer_id, "torch"),))  # type: ignore[arg-type]
    assert runner_key(placement, ranks[0], PC.peer_id).backend == "torch"
    assert runner_key(placement, ranks[0], MAC.peer_id).backend == AUTO
    later = Prepared("m", 1, 1, ranks, 64, 1, PC.peer_id)  # type: ignore[arg-type]
    found = {key.backend for key in wanted([placement], PC.peer_id, [later]).runners}
    assert found == {"torch", AUTO}
    assert backend_of((), PC.peer_id) == AUTO


def test_activations_cross_only_between_nodes_that_can() -> None:
    new = [msgspec.structs.replace(node, activations=ACTIVATIONS) for node in (MAC, PC)]
    mixed = [*new, OLD]
    assert with_activations(mixed, None) == with_activations(mixed, "f32") == (mixed, "")
    assert with_activations(mixed, "bf16") == (new, "bf16")
    with pytest.raises(InvalidRequest) as bad:
        with_activations(mixed, "f8")
    assert bad.value.code == "bad_parameter"
    with pytest.raises(Unsupported) as old:
        with_activations([OLD], "f16")
    assert old.value.code == "unsupported_activations"


def test_this_machine_has_llama_cpp() -> None:
    states = {state.name: state for state in survey()}
    assert states["llama.cpp"].installed
    missing = [name for name, state in states.items() if not state.installed]
    for name in missing:
        with pytest.raises(Unsupported):
            open_backend(name, None, Slice(0, 1, True), n_ctx=1, n_seq=1, threads=1)  # type: ignore[arg-type]
