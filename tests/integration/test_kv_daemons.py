"""KV blocks between real daemons: a prompt that comes again, and a rank that dies under it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, PullRequest

from .waiting import until

pytestmark = [
    pytest.mark.daemons,
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(300),
]

TEXT = " ".join(f"Day {day}: {day * 13 % 90} miles, {day % 7} fish." for day in range(1, 61))


def answer(
    node: LocalNode, model: str, kill: Callable[[], None] | None = None, tokens: int = 96
) -> Answer:
    ask = Ask(
        model=model,
        prompt=TEXT,
        max_tokens=tokens,
        temperature=0.8,
        seed=7,
        ignore_eos=True,
        speculation=NO_SPECULATION,
    )
    seen = 0
    for piece in node.client.generate(ask):
        if isinstance(piece, Answer):
            return piece
        seen += len(piece.token_ids)
        if kill is not None and seen >= 40:
            kill()
            kill = None
    raise AssertionError("the client raises unless an answer came")


def test_a_prompt_comes_again_and_a_rank_dies(bundled_model: Path) -> None:
    with local_swarm(4) as nodes:
        head = nodes[0]
        model = head.client.pull(PullRequest(source=f"file:{bundled_model}")).name
        ranks = tuple(node.peer_id for node in nodes[1:3])
        head.client.load(LoadRequest(model=model, layers=(15,), nodes=ranks, standbys=1, spares=0))
        until(
            head.client,
            lambda: all(
                [reserve.state for reserve in rank.standbys] == ["hot"]
                for rank in head.client.status().placements[0].ranks
            ),
            "standbys",
        )
        first = answer(head, model)
        assert first.cached_tokens == 0
        assert first.prompt_tokens > 700

        again: list[Answer] = []

        def cached() -> bool:
            again.append(answer(nodes[3], model))  # another head knows it from adverts
            return again[-1].cached_tokens >= 512

        until(head.client, cached, "a prompt that begins from blocks")
        assert all(each.token_ids == first.token_ids for each in again)

        before = time.monotonic()
        survived = answer(head, model, nodes[2].kill)
        assert time.monotonic() - before < 60
        assert survived.token_ids == first.token_ids
        assert survived.failovers == 1
        # The last block may have been on its way when the rank died.
        assert 0 < survived.recomputed_tokens <= 128
        standby = max((nodes[0], nodes[3]), key=lambda node: node.client.kv.view().loads.loads)
        view = standby.client.kv.view()
        assert view.loads.blocks_local >= first.prompt_tokens // 64
        assert view.stream.bytes_kept > 0
        assert standby.client.kv.clear().blocks > 0


def test_a_node_that_lost_its_power_begins_from_its_disk(bundled_model: Path) -> None:
    with local_swarm(1) as (node,):
        model = node.client.pull(PullRequest(source=f"file:{bundled_model}")).name
        node.client.load(LoadRequest(model=model))
        first = answer(node, model, tokens=20)
        assert first.cached_tokens == 0
        wanted = 30 * (first.prompt_tokens // 64)

        def on_disk() -> int:
            return next(t.blocks for t in node.client.kv.view().tiers if t.name == "disk")

        until(node.client, lambda: on_disk() >= wanted, "blocks on disk")
        node.kill()
        node.start()
        until(
            node.client,
            lambda: any(each.ready for each in node.client.status().placements),
            "a loaded model",
        )
        assert on_disk() >= wanted
        again = answer(node, model, tokens=20)
        assert again.token_ids == first.token_ids
        assert again.cached_tokens > first.prompt_tokens - 130
        hits = next(t.hits for t in node.client.kv.view().tiers if t.name == "disk")
        assert hits >= 30 * (again.cached_tokens // 64)
