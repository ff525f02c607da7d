"""A model moves by itself between real daemons: off a node that is drained, under an answer."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pyagent_node.benchmarks.swarm import local_swarm
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.placement_schema import DrainRequest
from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
]

TOKENS = 400


def ignore(progress: Progress) -> None:
    """Take no notice."""


def test_a_drained_node_without_standbys_is_left_by_itself(bundled_model: Path) -> None:
    with local_swarm(2) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{bundled_model}")).name
        client.load(LoadRequest(model=model, standbys=0, spares=0))
        (placed,) = client.placements()
        (rank,) = placed.ranks
        (other,) = (node for node in nodes if node.peer_id != rank.peer_id)
        ask = Ask(
            model=model,
            prompt="Long ago there was",
            max_tokens=TOKENS,
            temperature=0.8,
            seed=3,
            ignore_eos=True,
            speculation=NO_SPECULATION,
        )
        answers, seen, drained = [], 0, False
        for piece in other.client.generate(ask):
            if isinstance(piece, Answer):
                answers.append(piece)
                continue
            seen += len(piece.token_ids)
            if seen >= 70 and not drained:
                drained = True
                client.drain(DrainRequest(node=rank.peer_id), ignore)
        (moved,) = client.placements()
        assert [each.peer_id for each in moved.ranks] == [other.peer_id]
        assert moved.epoch == placed.epoch + 1
        again = next(
            piece
            for piece in other.client.generate(msgspec.structs.replace(ask, prompt_cache=False))
            if isinstance(piece, Answer)
        )
        (answer,) = answers
        assert answer.token_ids == again.token_ids
        assert answer.completion_tokens == TOKENS
