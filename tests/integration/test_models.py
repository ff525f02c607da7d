"""Pull, load, ask, reload, unload and remove, with real slices and runners on three nodes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest
from pyagent_node.inference.generation import Generated, GenerationEvent
from pyagent_node.simulations.pipeline import peer

from .model_world import ModelNode, open_model_world

pytestmark = [pytest.mark.slow, pytest.mark.model]


def runner_pids(holding: str = "runner_main") -> list[int]:
    """Return the child processes that hold slices or vocabularies."""
    children = psutil.Process().children(recursive=True)
    return [c.pid for c in children if holding in " ".join(c.cmdline())]


async def test_a_model_on_one_node_serves_on_all(bundled_model: Path, tmp_path: Path) -> None:
    async with open_model_world(3, tmp_path) as (a, b, c):
        name = await a.pull(f"file:{bundled_model}")
        await b.consensus.read_barrier()  # what a node lists is what it has heard so far
        (view,) = await b.models.list()
        assert (view.name, view.registered, view.local_bytes) == (name, True, 0)
        assert (view.architecture, view.n_layers) == ("llama", 30)

        placed = await a.load(name, ranks=3, standbys=0, spares=0)
        assert placed.ready
        assert [rank.state for rank in placed.ranks] == ["ready"] * 3
        assert len({rank.peer_id for rank in placed.ranks}) == 3
        tokens = await a.ask(name)
        assert await b.ask(name) == tokens
        assert await c.ask(name) == tokens

        # Each fetched its layers, and embeddings to be a head, but not the rest.
        for node in (b, c):
            assert 30 * MIB < node.assets.stats.bytes_fetched < 80 * MIB
        assert a.assets.stats.bytes_fetched == 0

        again = await c.load(name, layers=(4, 28), nodes=("n2", "n0", "n2"))
        assert again.epoch == 2
        assert [rank.layers for rank in again.ranks] == [(0, 4), (4, 28), (28, 30)]
        assert [rank.name for rank in again.ranks] == [peer(i)[-8:] for i in (2, 0, 2)]
        assert await b.ask(name) == tokens
        assert (await b.load(name)).epoch == 2

        digest = Digest(view.digest)
        with pytest.raises(Conflict) as placed_still:
            await a.models.remove(digest)
        assert placed_still.value.code == "model_placed"
        await b.models.unload(name)
        assert runner_pids() == []
        with pytest.raises(NotFound):
            await a.models.unload(name)
        for node in (a, b, c):
            assert node.pipeline.engine.models() == []
            await node.models.remove(digest)
        with pytest.raises(NotFound):
            await a.models.remove(digest)
        assert await a.models.list() == ()


async def test_an_answer_outlives_a_killed_runner_which_comes_back(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(2, tmp_path) as (a, b):
        name = await a.pull(f"file:{bundled_model}")
        await a.load(name, layers=(15,), nodes=("n0", "n1"), standbys=0, spares=0)
        tokens = await a.ask(name)
        undisturbed = await a.ask(name, 60)
        before = set(runner_pids())
        victim = _runner_of_rank(b, before)
        seen = 0

        def kill(event: GenerationEvent) -> None:
            nonlocal seen
            seen += isinstance(event, Generated)
            if seen == 5:
                os.kill(victim, signal.SIGKILL)

        assert await a.ask(name, 60, seen=kill) == undisturbed
        (report,) = b.models.parts().ranks
        assert (report.state, report.failures) == ("ready", 1)
        assert a.consensus.state.last_epoch == 1
        assert await a.ask(name) == tokens
        assert await b.ask(name) == tokens
        after = set(runner_pids())
        assert victim not in after
        assert len(after) == len(before)


def _runner_of_rank(node: ModelNode, pids: set[int]) -> int:
    """Return the process that has this node's slice open."""
    folder = str(node.store.root)
    for pid in pids:
        maps = psutil.Process(pid).memory_maps()
        if any(m.path.startswith(folder) and "vocabulary" not in m.path for m in maps):
            return pid
    raise AssertionError("no runner maps a slice of this node")


async def test_what_cannot_be_loaded_is_refused_and_leaves_nothing(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(2, tmp_path) as (a, _):
        with pytest.raises(NotFound) as unknown:
            await a.load("gpt-9")
        assert unknown.value.code == "model_not_found"
        name = await a.pull(f"file:{bundled_model}")
        for kwargs, code in (
            ({"ranks": 3}, "bad_ranks"),
            ({"ranks": 0}, "bad_ranks"),
            ({"layers": (30,)}, "bad_boundaries"),
            ({"layers": (15,), "ranks": 3}, "bad_ranks"),
            ({"nodes": ("elsewhere",)}, "unknown_node"),
            ({"n_ctx": 0}, "bad_parameter"),
            ({"n_ctx": 10**9}, "bad_parameter"),
            ({"n_seq": 0}, "bad_parameter"),
        ):
            with pytest.raises(InvalidRequest) as caught:
                await a.load(name, **kwargs)
            assert caught.value.code == code
        assert a.consensus.state.placements == {}


async def test_a_model_that_fits_nowhere_is_refused_with_the_numbers(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(2, tmp_path, memory=lambda: 120 * MIB) as (a, _):
        name = await a.pull(f"file:{bundled_model}")
        with pytest.raises(Unavailable) as caught:
            await a.load(name)
        assert caught.value.code == "not_enough_memory"
        assert caught.value.facts["available_bytes"] == 2 * 108 * MIB


async def test_a_placement_that_cannot_get_ready_is_taken_back(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(1, tmp_path, threads=1000) as (a,):
        name = await a.pull(f"file:{bundled_model}")
        with pytest.raises(InvalidRequest) as caught:
            await a.load(name)  # no runner takes so many threads
        assert caught.value.facts["rank"] == 0
        assert a.consensus.state.placements == {}
