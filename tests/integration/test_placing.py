"""Standbys, plans, drains and interrupted loads, with real slices and runners on three nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from pyagent_node.base.errors import InvalidRequest, NotFound, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Placement
from pyagent_node.consensus.commands import AdmitMember, SetMeshSetting
from pyagent_node.node import draining, healer
from pyagent_node.node.api.placement_schema import DrainRequest
from pyagent_node.node.api.schema import LoadRequest, Progress
from pyagent_node.simulations.pipeline import peer

from .model_world import ModelNode, ignore, open_model_world
from .waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(240)]


def placement(node: ModelNode) -> Placement:
    """Return the one placement."""
    (found,) = node.consensus.state.placements.values()
    return found


async def reserved(node: ModelNode, *states: str) -> None:
    """Wait until all standbys and spares are in these states, rank by rank."""
    with trio.fail_after(60):
        while True:
            (view,) = await node.models.placements()
            found = [r.state for rank in view.ranks for r in (*rank.standbys, *rank.spares)]
            if found == list(states):
                return
            await trio.sleep(0.05)


async def test_a_rank_moves_to_its_standby_by_draining(bundled_model: Path, tmp_path: Path) -> None:
    async with open_model_world(3, tmp_path) as (a, b, c):
        for n in range(3):
            await a.consensus.propose(AdmitMember(peer(n), f"n{n}", "voter", b"c"))
        await a.consensus.propose(SetMeshSetting("spares", 0))
        name = await a.pull(f"file:{bundled_model}")
        await a.load(name, layers=(15,), nodes=("n1", "n2"))
        tokens = await a.ask(name)
        await reserved(a, "hot", "hot")
        assert placement(a).epoch == 1
        told: list[Progress] = []
        reply = await b.models.drain(DrainRequest(node="n1"), told.append)
        assert (reply.name, reply.draining) == ("n1", True)
        assert told[-1].text == "0 parts left on n1"
        assert placement(a).epoch == 2
        assert all(peer(1) not in (rank.peer_id, *rank.standbys) for rank in placement(a).ranks)
        for node in (a, b, c):
            assert await node.ask(name) == tokens
        # Nothing new is given to it.
        with pytest.raises(InvalidRequest):
            await a.load(name, ranks=2, nodes=("n0", "n1"))
        again = await a.models.drain(DrainRequest(node=peer(1)), ignore)
        assert again.draining
        back = await c.models.drain(DrainRequest(node="n1", undo=True), ignore)
        assert not back.draining
        await a.load(name, layers=(15,), nodes=("n0", "n1"))
        assert await b.ask(name) == tokens


async def test_a_drain_that_cannot_end_says_why(
    bundled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "STALL_SECONDS", 4.0)
    monkeypatch.setattr(healer, "FACTS_SECONDS", 0.1)
    free, asked = 10_000 * MIB, 0

    def memory() -> int:
        nonlocal asked
        asked += 1
        return free

    async with open_model_world(2, tmp_path, memory=memory) as (a, _):
        for n in range(2):
            await a.consensus.propose(AdmitMember(peer(n), f"n{n}", "voter", b"c"))
        name = await a.pull(f"file:{bundled_model}")
        await a.load(name, layers=(15,), nodes=("n0", "n1"), standbys=0, spares=0)
        free, before = 1 * MIB, asked
        # both nodes in a round that has begun, in a whole one, and the first of the next
        await eventually(lambda: asked >= before + 5, "the leader has asked both again")
        with pytest.raises(Unavailable) as caught:
            await a.models.drain(DrainRequest(node="n1"), ignore)
        assert caught.value.code == "cannot_drain"
        assert "no other node has room for rank 1" in str(caught.value).lower()
        assert placement(a).epoch == 1
        with pytest.raises(NotFound):
            await a.models.drain(DrainRequest(node="nobody"), ignore)


async def test_planning_changes_nothing_and_applying_does(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(3, tmp_path) as (a, b, _):
        name = await a.pull(f"file:{bundled_model}")
        fresh = await a.models.plan(LoadRequest(model=name, layers=(15,)), ignore)
        assert fresh.epoch is None
        assert fresh.changes == ("the model is not loaded: it would be",)
        await a.load(name, layers=(15,), nodes=("n0", "n1"), standbys=0, spares=0)
        tokens = await a.ask(name)
        same = LoadRequest(model=name, layers=(15,), nodes=("n0", "n1"))
        plan = await b.models.plan(same, ignore)
        assert plan.changes == ()
        assert plan.token_seconds_now == pytest.approx(plan.token_seconds, rel=0.01)
        assert (await b.models.apply(same, ignore)).epoch == 1

        moved = LoadRequest(model=name, layers=(15,), nodes=("n0", "n2"), standbys=1)
        plan = await b.models.plan(moved, ignore)
        assert "layers 15-29 + head move from n1 to n2" in plan.changes
        assert placement(a).epoch == 1
        answers: list[list[int]] = []
        begun = trio.Event()

        async def ask() -> None:
            answers.append(await a.ask(name, 60, seen=lambda _: begun.set()))

        expected = await a.ask(name, 60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await begun.wait()
            view = await b.models.apply(moved, ignore)
        assert view.epoch == 2
        assert answers == [expected]
        assert placement(a).ranks[1].peer_id == peer(2)
        assert placement(a).want_standbys == 1
        await reserved(a, "hot", "hot")
        assert placement(a).epoch == 2
        assert await b.ask(name) == tokens
        with pytest.raises(InvalidRequest):
            await a.models.plan(LoadRequest(model=name, standbys=9), ignore)


async def test_a_load_that_is_interrupted_leaves_what_was(
    bundled_model: Path, tmp_path: Path
) -> None:
    async with open_model_world(2, tmp_path) as (a, b):
        name = await a.pull(f"file:{bundled_model}")

        async def interrupted(**kwargs: object) -> None:
            with trio.CancelScope() as scope:

                def report(progress: Progress) -> None:
                    if progress.step == "ready":
                        scope.cancel()

                await b.models.load(LoadRequest(model=name, **kwargs), report)  # type: ignore[arg-type]
            assert scope.cancelled_caught

        await interrupted(layers=(15,), nodes=("n0", "n1"))
        await eventually(lambda: a.consensus.state.placements == {})
        await a.load(name, layers=(15,), nodes=("n0", "n1"), standbys=0, spares=0)
        before = placement(a)
        tokens = await a.ask(name)
        await interrupted(layers=(10,), nodes=("n0", "n1"))
        await eventually(lambda: placement(a).ranks == before.ranks)
        assert placement(a).want_standbys == 0
        await eventually(lambda: a.models.parts().heads[0].state == "ready")
        assert await a.ask(name) == tokens
