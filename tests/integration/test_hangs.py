"""Processes that are stopped in the middle of an answer, not killed: nothing closes, nothing ends.

The tokens must be those of the same request when nothing happened to anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, PlacementView, PullRequest

from .waiting import until, votes_settled

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(240)]

TOKENS = 60
STALL_SECONDS = 20.0
"""A hang is noticed within 4 or 5 seconds; the rest is for busy machines.  It was minutes."""


class Swarm:
    """Four daemons with one model; the first is the head and leads the log."""

    def __init__(self, nodes: list[LocalNode], model: str) -> None:
        self.nodes = nodes
        self.model = model

    def placement(self) -> PlacementView:
        return self.nodes[0].client.status().placements[0]

    def become_whole(self) -> None:
        """Wait until every rank has a standby, and three nodes vote: one may be stopped."""
        client = self.nodes[0].client

        def whole() -> bool:
            placement = self.placement()
            reserved = all(rank.standbys for rank in placement.ranks)
            return votes_settled(client, 3) and placement.ready and reserved

        until(client, whole, "the swarm is whole")

    def victim(self) -> LocalNode:
        """Return the node of the first rank that is not on the head."""
        peers = [rank.peer_id for rank in self.placement().ranks]
        return next(node for node in self.nodes[1:] if node.peer_id in peers)

    def answer(self, disturb: Callable[[], object]) -> Answer:
        asked = Ask(
            model=self.model,
            messages=(ChatMessage("user", "Name three rivers."),),
            max_tokens=TOKENS,
            temperature=0.8,
            seed=1,
            ignore_eos=True,
        )
        pieces = self.nodes[0].client.generate(asked)
        for _ in range(5):
            next(pieces)
        disturb()
        *_, answer = pieces
        assert isinstance(answer, Answer)
        return answer


@pytest.fixture(scope="module")
def swarm(bundled_model: Path) -> Iterator[Swarm]:
    with local_swarm(4) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{bundled_model}"))
        there = tuple(node.peer_id for node in nodes[1:3])
        client.load(LoadRequest(model=model.name, layers=(15,), nodes=there, standbys=1))
        it = Swarm(nodes, model.name)
        it.become_whole()
        yield it


def test_a_stopped_runner(swarm: Swarm) -> None:
    undisturbed = swarm.answer(lambda: None)
    found = psutil.Process(swarm.victim().pid).children(recursive=True)
    largest = max(found, key=lambda process: process.memory_info().rss)
    answer = swarm.answer(largest.suspend)
    assert answer.token_ids == undisturbed.token_ids
    assert answer.failovers >= 1
    assert answer.stall_seconds < STALL_SECONDS
    assert not largest.is_running()


def test_a_stopped_daemon(swarm: Swarm) -> None:
    swarm.become_whole()
    undisturbed = swarm.answer(lambda: None)
    epoch, victim = swarm.placement().epoch, swarm.victim()
    process = psutil.Process(victim.pid)
    try:
        answer = swarm.answer(process.suspend)
    finally:
        process.resume()
    assert answer.token_ids == undisturbed.token_ids
    assert answer.stall_seconds < STALL_SECONDS
    assert swarm.placement().epoch > epoch
    assert victim.peer_id not in [rank.peer_id for rank in swarm.placement().ranks]
    # It comes back to a mesh that went on without it, and serves nothing under the old epoch.
    assert swarm.answer(lambda: None).token_ids == undisturbed.token_ids
