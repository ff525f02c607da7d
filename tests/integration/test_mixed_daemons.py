"""Daemons that compute one model with several backends, and take over from each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyagent_node.base.errors import Unsupported
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference import backends
from pyagent_node.inference.backend_names import ADOPTED
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, PullRequest
from pyagent_node.node.client import Client

from .waiting import until

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
]

INSTALLED = {state.name for state in backends.survey() if state.installed}
TEXT = " ".join(f"Day {day}: {day * 13 % 90} miles." for day in range(1, 14))
"""120 tokens: the second block ends in the answer, where a session may begin at any place."""
BLOCKS = 2
TOKENS = 40


def answer(node: LocalNode, model: str, lose: Callable[[], None] | None = None) -> Answer:
    """Ask a node; ``lose`` is called when the answer is half there."""
    ask = Ask(
        model=model,
        prompt=TEXT,
        max_tokens=TOKENS,
        temperature=0.0,
        seed=7,
        ignore_eos=True,
        speculation=NO_SPECULATION,
    )
    seen = 0
    for piece in node.client.generate(ask):
        if isinstance(piece, Answer):
            return piece
        seen += len(piece.token_ids)
        if lose is not None and seen >= TOKENS // 2:
            lose()
            lose = None
    raise AssertionError("the client raises unless an answer came")


def standbys_of(client: Client, rank: int) -> list[str]:
    """Return the standbys of a rank that are ready."""
    (placement,) = client.placements()
    return [each.peer_id for each in placement.ranks[rank].standbys if each.state == "hot"]


@pytest.mark.parametrize(
    ("serves", "takes_over"),
    [
        ("mlx", "llama.cpp"),
        ("llama.cpp", "mlx"),
        pytest.param("torch", "mlx", marks=pytest.mark.torch),
    ],
)
def test_a_rank_goes_on_in_another_backend_on_the_kv_of_before(
    serves: str, takes_over: str, bundled_model: Path
) -> None:
    for name in (serves, takes_over):
        if name not in INSTALLED:
            pytest.skip(f"{name} is not installed")
    with local_swarm(3) as (head, second, third):
        client = head.client
        model = client.pull(PullRequest(source=f"file:{bundled_model}")).name
        client.load(
            LoadRequest(
                model=model,
                layers=(15,),
                nodes=(head.peer_id, second.peer_id),
                standbys=1,
                spares=0,
                backend=f"{head.name}=llama.cpp,{second.name}={serves},{third.name}={takes_over}",
            )
        )
        until(client, lambda: standbys_of(client, 1) == [third.peer_id], "a standby")
        whole: list[Answer] = []

        def streamed() -> bool:
            whole.append(answer(head, model))
            return second.client.kv.view().stream.blocks_sent >= BLOCKS

        until(client, streamed, "the standby has the blocks")
        assert {name.partition("/")[0] for name in whole[0].served_by} == {"llama.cpp", serves}
        survived = answer(head, model, second.kill)
        _check(survived, whole[0], {"llama.cpp", serves, takes_over})
        (placement,) = client.placements()
        assert [rank.peer_id for rank in placement.ranks] == [head.peer_id, third.peer_id]


def _check(survived: Answer, whole: Answer, libraries: set[str]) -> None:
    """Check an answer that lost a rank on the way, against the one of the ranks it began on."""
    assert survived.failovers == 1
    assert len(survived.token_ids) == TOKENS
    pairs = zip(survived.token_ids, whole.token_ids, strict=True)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), TOKENS)
    print(
        f"\n{survived.served_by}: {survived.recomputed_tokens} of {survived.prompt_tokens} and"
        f" {TOKENS} tokens computed again, stalled {survived.stall_seconds:.2f} s,"
        f" {same} of {TOKENS} tokens alike"
    )
    assert same >= TOKENS // 2
    assert {name.partition("/")[0] for name in survived.served_by} == libraries
    # KV of the other class was gone on from, less what did not fill a block
    assert any(name.endswith(ADOPTED) for name in survived.served_by)
    assert survived.recomputed_tokens <= 64


def test_a_backend_that_a_node_lacks_is_one_clear_line(bundled_model: Path) -> None:
    missing = next((name for name in ("torch", "mlx") if name not in INSTALLED), None)
    if missing is None:
        pytest.skip("every backend is installed")
    with local_swarm(1) as (node,):
        model = node.client.pull(PullRequest(source=f"file:{bundled_model}")).name
        with pytest.raises(Unsupported) as caught:
            node.client.load(LoadRequest(model=model, backend=f"{node.name}={missing}"))
        assert caught.value.code == "backend_missing"
        assert f"pyagent-node[{missing}]" in str(caught.value.remedy)
