"""A drafter rank on another node: it may crash, stall, lie or lose messages; tokens stay equal."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest, RunnerFailed, Unsupported
from pyagent_node.base.types import Digest, Drafting, PeerId, Placement
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import ModelRecord, RegisterModel, SetDrafting
from pyagent_node.inference.drafting.remote import REST_SECONDS
from pyagent_node.inference.drafting.remote_messages import (
    DRAFT_PROTOCOL,
    FROM_DRAFTER,
    TO_DRAFTER,
    Ask,
    Drafted,
    DraftRefused,
    NotNow,
    OpenDraft,
)
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationRequest,
    SpeculationUsage,
)
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.keeping import HostProgress
from pyagent_node.node.placement_parts import HeadParts
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import MODEL, NAME, peer
from pyagent_node.simulations.placements import (
    N_LAYERS,
    RECORD,
    HostingWorld,
    ToyHead,
    open_hosting_world,
)

PARAMS = SamplingParams(seed=3, temperature=0.7)
PROMPT = list(range(40))
COUNT = 40
EXPECTED = toy_generate(N_LAYERS, PROMPT, COUNT, PARAMS)
DRAFTER = 3
"""The node that drafts."""
FIXED = {"draft_length": 4, "draft_depth": 1}


def ignore(progress: object) -> None:
    """Take a progress report."""


async def draft_on(world: HostingWorld, node: int | None, **changes: object) -> Placement:
    """Say which node drafts, with the model itself, and wait until it can."""
    consensus = world.nodes[0].consensus
    epoch = consensus.state.placements[MODEL].epoch
    drafting = Drafting(drafter=MODEL, peer_id=peer(node)) if node is not None else Drafting("auto")
    drafting = msgspec.structs.replace(drafting, **changes)
    await consensus.propose(SetDrafting(MODEL, drafting, epoch))
    if node is not None:
        await drafting_again(world, node)
    await trio.sleep(0.1)  # until all have applied it
    return consensus.state.placements[MODEL]


async def drafting_again(world: HostingWorld, node: int) -> None:
    """Wait until a node drafts under the epoch of now."""
    epoch = world.nodes[0].consensus.state.placements[MODEL].epoch
    with trio.fail_after(30):
        while not any(  # noqa: ASYNC110 - the state has no event
            (report.epoch, report.state) == (epoch, "ready")
            for report in world.nodes[node].controller.reports().drafters
        ):
            await trio.sleep(0.01)


@asynccontextmanager
async def drafted(*, latency: float = 0.001) -> AsyncIterator[HostingWorld]:
    """Run a swarm of four nodes: three ranks, and a fourth one that drafts for them."""
    async with open_hosting_world(4, latency=latency) as world:
        placement = await world.place((3, 7), (0, 1, 2))
        for node in world.nodes:
            await node.board.wait_ready(placement, ignore)
        await draft_on(world, DRAFTER)
        yield world


async def ask(
    world: HostingWorld,
    number: int = 0,
    speculation: str | None = NAME,
    *,
    tree: bool | None = None,
    **options: int,
) -> SpeculationUsage | None:
    """Ask a node; the answer must be the one of plain decoding.  Return what guessing came to."""
    options = options or FIXED
    request = GenerationRequest(
        NAME,
        tokens=tuple(PROMPT),
        max_tokens=COUNT,
        sampling=PARAMS,
        speculation=speculation,
        draft_length=options.get("draft_length"),
        draft_depth=options.get("draft_depth"),
        draft_tree=tree,
    )
    tokens: list[int] = []
    usage = None
    with trio.fail_after(60):
        async with world.nodes[number].pipeline.engine.generate(request) as events:
            async for event in events:
                if isinstance(event, Generated):
                    tokens.append(event.token)
                elif isinstance(event, Finished):
                    usage = event.usage
    assert tokens == EXPECTED
    assert usage is not None
    return usage.speculation


@pytest.mark.parametrize("head", [0, 2, DRAFTER])
async def test_it_guesses_for_every_head(autojump_clock: MockClock, head: int) -> None:
    async with drafted() as world:
        usage = await ask(world, head)
        assert usage is not None
        assert (usage.drafter, usage.failed) == (NAME, False)
        assert usage.acceptance > 0.95
        (report,) = world.nodes[DRAFTER].controller.reports().drafters
        assert report.load.guesses >= usage.drafted
        await trio.sleep(0.1)
        assert world.nodes[DRAFTER].controller.reports().drafters[0].load.sessions == 0


async def test_a_tree_that_is_none(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        world.network.meddler = Meddling("tangled")
        await ask(world, tree=True, draft_length=4, draft_depth=2)


@pytest.mark.parametrize("depth", [1, 3])
async def test_its_guesses_may_form_trees(autojump_clock: MockClock, depth: int) -> None:
    async with drafted() as world:
        usage = await ask(world, 1, tree=True, draft_length=6, draft_depth=depth)
        assert usage is not None
        assert not usage.failed
        assert usage.tokens_per_pass > 2
        assert not world.nodes[DRAFTER].pipeline.drafts.refused


async def test_several_steps_in_flight_and_several_sessions(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.02) as world, trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(lambda n=number: ask(world, n, draft_length=3, draft_depth=3))


async def test_who_says_what_holds(autojump_clock: MockClock) -> None:
    """Request before load option before the node's own setting."""
    async with drafted() as world:
        assert await ask(world, speculation=None) is None  # the node's default: none
        await draft_on(world, DRAFTER, speculation=NAME, length=5)
        by_load = await ask(world, 1, speculation=None, draft_depth=1)
        assert by_load is not None
        assert (by_load.drafter, by_load.length) == (NAME, 5)
        assert await ask(world, speculation="none") is None
        await draft_on(world, DRAFTER, speculation="elsewhere")
        instead = await ask(world, speculation=None)
        assert instead is not None
        assert instead.drafter == NAME  # a drafter that is not here: auto
        await draft_on(world, None, speculation="none")
        assert await ask(world, speculation=None) is None
        with pytest.raises(InvalidRequest, match="There is no drafter"):
            await ask(world, speculation=NAME)
        assert await ask(world, speculation="auto") is None


async def test_the_drafter_dies_and_comes_back(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.01) as world:
        found: list[SpeculationUsage | None] = []

        async def run() -> None:
            found.append(await ask(world))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.2)
            world.crash(DRAFTER)
        assert found[0] is not None
        assert found[0].failed
        assert await ask(world, 1) is None  # away: nothing to wait for
        epoch = world.nodes[0].consensus.state.placements[MODEL].epoch
        await world.restart(DRAFTER)
        await drafting_again(world, DRAFTER)
        await trio.sleep(REST_SECONDS)
        assert world.nodes[0].consensus.state.placements[MODEL].epoch == epoch
        again = await ask(world)
        assert again is not None
        assert not again.failed
        assert again.acceptance > 0.95


async def test_its_runner_dies(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.01) as world:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, world)
            await trio.sleep(0.2)
            (runner,) = world.nodes[DRAFTER].assets.runners
            world.nodes[DRAFTER].assets.faults.append(RunnerFailed("no", reason="test"))
            runner.kill()
        assert await ask(world) is None  # it failed a moment ago
        await drafting_again(world, DRAFTER)
        await trio.sleep(REST_SECONDS)
        again = await ask(world)
        assert again is not None
        assert again.acceptance > 0.95
        assert sum(world.nodes[DRAFTER].pipeline.drafts.refused.values()) == 1


async def test_it_is_too_slow(autojump_clock: MockClock) -> None:
    async with drafted(latency=0.05) as world:
        world.network.set_latency(peer(0), peer(DRAFTER), 1.0)
        usage = await ask(world)
        assert usage is not None
        assert usage.failed
        assert usage.accepted == 0


async def test_it_says_nothing_at_all(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        world.network.hold(peer(DRAFTER), peer(0))
        usage = await ask(world)
        assert usage is not None
        assert usage.accepted == 0


async def test_placed_anew_it_goes_on(autojump_clock: MockClock) -> None:
    """A session moves to another epoch, and its drafter with it."""
    async with drafted(latency=0.01) as world:
        found: list[SpeculationUsage | None] = []

        async def run() -> None:
            found.append(await ask(world))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.sleep(0.25)
            before = world.nodes[0].consensus.state.placements[MODEL]
            after = await world.place((3, 7), (0, 2, 1))
            assert after.epoch > before.epoch
            assert after.drafting == before.drafting
        assert found[0] is not None
        assert not found[0].failed
        assert found[0].acceptance > 0.9


class Meddling:
    """Loses or forges what passes between a head and its drafter."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.count = 0

    def __call__(self, one: PeerId, other: PeerId, protocol: str, frame: Frame) -> Sequence[Frame]:
        """Return what arrives instead of ``frame``."""
        if protocol != DRAFT_PROTOCOL:
            return (frame,)
        self.count += 1
        if self.how == "forgets":
            return self._forgetting(frame, from_head=other == peer(DRAFTER))
        if self.how == "loses":
            return () if self.count % 5 == 4 else (frame,)
        if self.how == "doubles":
            return (frame, frame) if other == peer(0) else (frame,)
        if other == peer(DRAFTER):
            return self._to_drafter(frame)
        return (self._lie(frame),)

    def _forgetting(self, frame: Frame, *, from_head: bool) -> Sequence[Frame]:
        """Let the head believe once that the drafter holds what it does not."""
        if not from_head or self.count != 6:
            return (frame,)
        message = TO_DRAFTER.decode(frame.header)
        assert isinstance(message, Ask)
        ahead = msgspec.structs.replace(message, start=message.start + 3)
        return (Frame(TO_DRAFTER.encode(ahead), frame.tail),)

    def _to_drafter(self, frame: Frame) -> Sequence[Frame]:
        match self.how:
            case "garbles":
                return (Frame(b"\xff" + frame.header, frame.tail),)
            case "bloats":
                return (Frame(frame.header, bytes(1 << 20)),)
            case "strange":
                return (Frame(TO_DRAFTER.encode(Ask(1, 1, 0, 0, 4)), b""),)
            case "old":
                message = TO_DRAFTER.decode(frame.header)
                if isinstance(message, OpenDraft):
                    message = msgspec.structs.replace(message, epoch=7)
                return (Frame(TO_DRAFTER.encode(message), frame.tail),)
            case _:
                return (frame,)

    def _lie(self, frame: Frame) -> Frame:
        reply = FROM_DRAFTER.decode(frame.header)
        if isinstance(reply, DraftRefused):
            return frame
        n = self.count
        match self.how:
            case "lies":
                tokens = tuple((n * 31 + i) % 128 for i in range(4))
                reply = Drafted(reply.request, reply.held, tokens, (1.0,) * 4)
            case "nonsense":
                reply = Drafted(reply.request, reply.held, (1 << 40, -1), (float("nan"), 9.0))
            case "floods":
                reply = Drafted(reply.request, reply.held, (1,) * 5000, (1.0,) * 5000)
            case "stale":
                reply = NotNow(reply.request, reply.held, 99)
            case "amnesia":
                reply = NotNow(reply.request, 0, 1)
            case "boasts":
                reply = msgspec.structs.replace(reply, held=1 << 40)
            case "tangled":
                reply = Drafted(
                    reply.request, reply.held, (5, 5, 6, 7), (1.0,) * 4, (2, -7, 1 << 40, 3)
                )
            case "future":
                reply = msgspec.structs.replace(reply, request=1 << 50)
            case _:
                return frame
        return Frame(FROM_DRAFTER.encode(reply), frame.tail)


REFUSED = {
    "garbles": "malformed_message",
    "bloats": "too_many_tokens",
    "strange": "bad_draft_request",
    "old": "stale_epoch",
}


@pytest.mark.parametrize(
    "how",
    [
        *REFUSED,
        *("forgets", "loses", "doubles", "lies", "nonsense", "floods", "stale", "amnesia"),
        *("boasts", "future"),
    ],
)
async def test_whatever_happens_on_the_way(autojump_clock: MockClock, how: str) -> None:
    async with drafted() as world:
        world.network.meddler = Meddling(how)
        usage = await ask(world)
        assert usage is not None
        refused = world.nodes[DRAFTER].pipeline.drafts.refused
        if how in REFUSED:
            assert refused[REFUSED[how]]
            assert usage.failed
        if how in ("forgets", "doubles"):
            assert not usage.failed
            assert usage.acceptance > 0.9
        world.network.meddler = None
        await trio.sleep(REST_SECONDS)
        again = await ask(world)
        assert again is not None
        assert again.acceptance > 0.95


async def test_another_vocabulary_is_refused_by_name(autojump_clock: MockClock) -> None:
    """Its node finds out before it loads the model, and whoever waits for it is told."""
    other = msgspec.structs.replace(RECORD, digest=Digest("9" * 64), name="other")
    async with drafted() as world:
        node, consensus = world.nodes[DRAFTER], world.nodes[0].consensus
        loading = node.assets.head

        @asynccontextmanager
        async def head(
            model: ModelRecord, epoch: int, progress: HostProgress
        ) -> AsyncIterator[HeadParts]:
            async with loading(model, epoch, progress) as parts:
                assert isinstance(parts, ToyHead)
                pieces = (*parts.vocabulary.pieces[:65], b"?", *parts.vocabulary.pieces[66:])
                strange = msgspec.structs.replace(parts.vocabulary, pieces=pieces)
                yield parts._replace(vocabulary=strange)

        node.assets.head = head  # type: ignore[method-assign]
        await consensus.propose(RegisterModel(other))
        placement = consensus.state.placements[MODEL]
        drafting = Drafting("auto", drafter=other.digest, peer_id=peer(DRAFTER))
        await consensus.propose(SetDrafting(MODEL, drafting, placement.epoch))
        placement = consensus.state.placements[MODEL]
        with pytest.raises(Unsupported, match="other cannot draft for this model: its token 65"):
            await world.nodes[0].board.wait_ready(placement, ignore, drafter=True)
        await world.nodes[0].board.wait_ready(placement, ignore)  # the ranks are fine
        (view,) = await world.nodes[1].board.views()
        assert view.ready
        assert view.speculation == "auto"
        assert view.drafter is not None
        assert (view.drafter.name, view.drafter.node) == ("other", peer(DRAFTER)[-8:])
        assert view.drafter.state == "failed"
        assert "vocabulary" in (view.drafter.detail or "") or "token 65" in (
            view.drafter.detail or ""
        )
        assert not node.assets.runners  # it was never loaded
        failed = await ask(world, speculation="other")
        assert failed is not None
        assert failed.failed


async def test_unloaded_with_its_model(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        placement = world.nodes[0].consensus.state.placements[MODEL]
        assert len(world.nodes[DRAFTER].assets.runners) == 1
        assert (await world.nodes[0].board.memory(placement)).keys() >= {peer(DRAFTER)}
        await world.unplace()
        with trio.fail_after(20):
            await world.nodes[0].board.wait_gone(placement)
        assert not any(node.assets.runners for node in world.nodes)
