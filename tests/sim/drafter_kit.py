"""A swarm of four nodes, one of which drafts for the other three, and answers checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from pyagent_node.base.types import Drafting, Placement
from pyagent_node.consensus.commands import SetDrafting
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationRequest,
    SpeculationUsage,
)
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import MODEL, NAME, peer
from pyagent_node.simulations.placements import (
    N_LAYERS,
    HostingWorld,
    open_hosting_world,
)

PARAMS = SamplingParams(seed=3, temperature=0.7)
PROMPT = list(range(40))
COUNT = 40
EXPECTED = toy_generate(N_LAYERS, PROMPT, COUNT, PARAMS, one_way=True)
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
    async with open_hosting_world(4, latency=latency, one_way=True) as world:
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
