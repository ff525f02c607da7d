"""Nodes are killed in the middle of an answer; the answer goes on, token for token.

Every test runs real daemons with the real model.  The tokens must be those of the same request
when nothing happened to anybody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyagent_node.base.types import PeerId
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, PlacementView, PullRequest
from pyagent_node.node.client import Client
from tests.conftest import leaving_no_process

from .waiting import until, votes_settled

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(600)]


class Swarm:
    """Five daemons, one of which, the head, is never killed."""

    def __init__(self, nodes: list[LocalNode], model: str) -> None:
        self.nodes = nodes
        self.head = nodes[0]
        self.model = model

    @property
    def client(self) -> Client:
        return self.head.client

    def ask(self, tokens: int) -> Ask:
        return Ask(
            model=self.model,
            messages=(ChatMessage("user", "Tell me about three rivers."),),
            max_tokens=tokens,
            temperature=0.8,
            seed=7,
            ignore_eos=True,
        )

    def answer(self, tokens: int) -> Answer:
        *_, answer = self.client.generate(self.ask(tokens))
        assert isinstance(answer, Answer)
        return answer

    def disturbed(self, tokens: int, at: dict[int, Callable[[], None]]) -> Answer:
        """Ask, and call ``at[n]`` as soon as ``n`` tokens have come."""
        seen = 0
        due = sorted(at)
        last: object = None
        for last in self.client.generate(self.ask(tokens)):
            if not isinstance(last, Answer):
                seen += len(last.token_ids)
                while due and seen >= due[0]:
                    at[due.pop(0)]()
        assert isinstance(last, Answer)
        assert not due, "the answer ended before the disturbance"
        return last

    def placement(self) -> PlacementView:
        (placement,) = self.client.status().placements
        return placement

    def node(self, peer: PeerId) -> LocalNode:
        return next(node for node in self.nodes if node.peer_id == peer)

    def leader(self) -> LocalNode:
        """Return the node that leads now, waiting for an election to end."""

        def found() -> LocalNode | None:
            status = self.client.status().consensus
            assert status is not None
            return self.node(status.leader) if status.leader is not None else None

        leader = until(self.client, found)
        assert isinstance(leader, LocalNode)
        return leader

    def make_leader(self, node: LocalNode) -> None:
        """Hand the leadership to ``node``."""
        if self.leader() is not node:
            self.client.mesh.transfer(node.peer_id)
            until(self.client, lambda: self.leader() is node)

    def victims(self) -> list[LocalNode]:
        """Return the nodes with a rank that may be killed."""
        held = dict.fromkeys(rank.peer_id for rank in self.placement().ranks)
        return [self.node(peer) for peer in held if peer != self.head.peer_id]

    def spread(self) -> None:
        """Give the ranks to three nodes other than the head: takeovers gather them on it."""
        ranks = tuple(node.peer_id for node in self.nodes[1:4])
        request = LoadRequest(model=self.model, layers=(10, 20), nodes=ranks)
        until(self.client, lambda: self.client.load(request))

    def restart(self) -> None:
        """Start what was killed; if few ranks are left to be killed, place them anew."""
        for node in self.nodes:
            if not node.alive:
                node.start()
        if len(self.victims()) < 2:
            self.spread()

    def whole(self) -> None:
        """Start what was killed, and wait until every node is a healthy part of the mesh again."""
        self.restart()
        everyone = {node.peer_id for node in self.nodes}

        def settled() -> bool:
            peers = {peer.peer_id for peer in self.client.status().peers}
            return (
                votes_settled(self.client, len(everyone))
                and peers >= everyone - {self.head.peer_id}
                and self.placement().ready
                and all(rank.standbys for rank in self.placement().ranks)
            )

        until(self.client, settled, "the swarm is whole again")


@pytest.fixture(scope="module", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail when the module leaves a process behind: its tests restart daemons of each other."""
    with leaving_no_process():
        yield


@pytest.fixture(scope="module")
def started(bundled_model: Path) -> Iterator[Swarm]:
    with local_swarm(5) as nodes:
        client = nodes[0].client
        name = client.pull(PullRequest(source=f"file:{bundled_model}")).name
        swarm = Swarm(nodes, name)
        swarm.spread()
        yield swarm


@pytest.fixture
def swarm(started: Swarm) -> Swarm:
    started.whole()
    return started


@pytest.fixture(scope="module")
def undisturbed(started: Swarm) -> Answer:
    return started.answer(96)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_is_killed(swarm: Swarm, undisturbed: Answer, rank: int) -> None:
    victim = swarm.node(swarm.placement().ranks[rank].peer_id)
    swarm.make_leader(swarm.head)
    answer = swarm.disturbed(96, {20: victim.kill})
    assert answer.token_ids == undisturbed.token_ids
    assert answer.text == undisturbed.text
    assert answer.failovers >= 1
    assert victim.peer_id not in {rank.peer_id for rank in swarm.placement().ranks}


def test_the_leader_is_killed(swarm: Swarm, undisturbed: Answer) -> None:
    held = {rank.peer_id for rank in swarm.placement().ranks}
    leader = next(n for n in swarm.nodes[1:] if n.peer_id not in held)
    swarm.make_leader(leader)
    answer = swarm.disturbed(96, {20: leader.kill})
    assert answer.token_ids == undisturbed.token_ids
    until(swarm.client, lambda: swarm.leader() is not leader)  # the answer may end sooner


def test_the_leader_and_a_rank_are_killed_together(swarm: Swarm, undisturbed: Answer) -> None:
    held = {rank.peer_id for rank in swarm.placement().ranks}
    leader = next(n for n in swarm.nodes[1:] if n.peer_id not in held)
    victim = swarm.victims()[0]
    swarm.make_leader(leader)

    def both() -> None:
        leader.kill()
        victim.kill()

    answer = swarm.disturbed(96, {20: both})
    assert answer.token_ids == undisturbed.token_ids


def test_a_leader_that_holds_a_rank_is_killed(swarm: Swarm, undisturbed: Answer) -> None:
    victim = swarm.victims()[0]
    swarm.make_leader(victim)
    answer = swarm.disturbed(96, {20: victim.kill})
    assert answer.token_ids == undisturbed.token_ids


def test_twenty_random_kills(swarm: Swarm) -> None:
    """Ranks and leaders die at random moments and come back, over 1,000 tokens."""
    tokens, rng = 1000, random.Random(3)
    expected = swarm.answer(tokens)

    def kill_one() -> None:
        swarm.restart()
        leader = swarm.leader()
        choices = swarm.victims() + ([] if leader is swarm.head else [leader])
        rng.choice(choices).kill()

    moments = rng.sample(range(5, tokens - 5), 20)
    answer = swarm.disturbed(tokens, dict.fromkeys(moments, kill_one))
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text
