"""A drafter rank among real daemons: the bundled model guesses for itself on a node of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pyagent_node.base.errors import InvalidRequest, NotFound
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import DrafterView, LoadRequest, PullRequest

from .waiting import until, votes_settled

# Alone: a guess that comes too late is another drafter's, which is wrong more often.
pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(180)]

ASK = Ask(
    model="",
    prompt="The three longest rivers of the world are",
    max_tokens=24,
    seed=7,
    temperature=0.8,
    ignore_eos=True,
)


@pytest.fixture(scope="module")
def swarm(bundled_model: Path) -> Iterator[tuple[list[LocalNode], str]]:
    with local_swarm(3) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{bundled_model}"))
        placed = client.load(
            LoadRequest(
                model=model.name,
                layers=(15,),
                nodes=(nodes[0].peer_id, nodes[1].peer_id),
                standbys=0,
                spares=0,
                n_ctx=512,
                n_seq=2,
                drafter=f"{model.name}@{nodes[2].peer_id}",
                draft_length=5,
            )
        )
        assert placed.speculation == "auto"
        assert placed.drafter is not None
        assert (placed.drafter.state, placed.drafter.peer_id) == ("ready", nodes[2].peer_id)
        yield nodes, model.name


def answer(node: LocalNode, model: str, **changes: object) -> Answer:
    *_, last = node.client.generate(msgspec.structs.replace(ASK, model=model, **changes))
    assert isinstance(last, Answer)
    return last


def drafter(node: LocalNode) -> DrafterView:
    (placement,) = node.client.placements()
    assert placement.drafter is not None
    return placement.drafter


def test_a_drafter_rank(swarm: tuple[list[LocalNode], str]) -> None:
    nodes, model = swarm
    _it_guesses_for_every_head(nodes, model)
    _what_cannot_be_is_refused_and_changes_nothing(nodes, model)
    _its_node_dies(nodes, model)


def _it_guesses_for_every_head(nodes: list[LocalNode], model: str) -> None:
    """The model agrees with itself, so nearly every guess is right; and no token changes."""
    plain = answer(nodes[0], model, speculation="none")
    assert plain.speculation is None
    for number, choice, length in ((0, model, 5), (1, f"{model}+suffix", 5), (2, None, None)):
        guessed = answer(nodes[number], model, speculation=choice, draft_length=length)
        assert guessed.token_ids == plain.token_ids
        usage = guessed.speculation
        assert usage is not None
        assert usage.drafter in (model, f"{model}+suffix")
        assert usage.acceptance > 0.95
        assert usage.tokens_per_pass > 3
        assert not usage.failed
    assert (drafter(nodes[1]).guesses or 0) >= 3 * 16


def _what_cannot_be_is_refused_and_changes_nothing(nodes: list[LocalNode], model: str) -> None:
    before = nodes[1].client.placements()[0]
    for said, error in (
        ({"speculation": "crystal ball"}, InvalidRequest),
        ({"drafter": f"{model}@mars"}, InvalidRequest),
        ({"drafter": "nobody"}, NotFound),
    ):
        with pytest.raises(error):
            nodes[1].client.load(LoadRequest(model=model, **said))
    after = nodes[1].client.placements()[0]
    assert (after.epoch, after.speculation) == (before.epoch, before.speculation)
    assert after.drafter is not None
    other = nodes[1].client.load(LoadRequest(model=model, speculation="none"))
    assert (other.epoch, other.speculation, other.draft_length) == (before.epoch, "none", None)
    assert other.drafter is not None
    assert answer(nodes[0], model).speculation is None
    nodes[1].client.load(LoadRequest(model=model, speculation=model, draft_length=5))


def _its_node_dies(nodes: list[LocalNode], model: str) -> None:
    """In the middle of an answer: that goes on at plain speed, with the same tokens."""
    plain = answer(nodes[0], model, speculation="none", max_tokens=48)
    asked = msgspec.structs.replace(
        ASK, model=model, speculation=model, draft_length=3, max_tokens=48
    )
    client = nodes[0].client
    until(client, lambda: votes_settled(client, 3), "all three vote, so one may die")
    pieces = client.generate(asked)
    for _ in range(3):
        next(pieces)
    nodes[2].kill()
    *_, last = pieces
    assert isinstance(last, Answer)
    assert last.token_ids == plain.token_ids
    assert answer(nodes[1], model, max_tokens=48).token_ids == plain.token_ids
    assert drafter(nodes[0]).state == "unknown"
    shown = nodes[0].client.load(LoadRequest(model=model, speculation="none"))
    assert shown.drafter is not None  # it stays placed, and nobody waits for it
