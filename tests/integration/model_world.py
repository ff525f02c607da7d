"""Nodes with real stores and real runners, over the simulated mesh, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.single import open_single
from pyagent_node.inference.generation import (
    ChatMessage,
    Generated,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.api.schema import LoadRequest, PlacementView, Progress, PullRequest
from pyagent_node.node.assets import LocalAssets
from pyagent_node.node.hosting import open_models
from pyagent_node.node.models import ModelDefaults, NodeModels
from pyagent_node.node.rpc import open_rpc
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network
from pyagent_node.simulations.pipeline import peer


def ignore(progress: Progress) -> None:
    """Take a progress report."""


class ModelNode(NamedTuple):
    """One node."""

    mesh: SimulatedMesh
    consensus: Consensus
    pipeline: Pipeline
    store: ModelStore
    assets: LocalAssets
    models: NodeModels

    async def pull(self, source: str) -> str:
        """Pull a model and return its name."""
        return (await self.models.pull(PullRequest(source=source), ignore)).name

    async def load(self, model: str, **kwargs: object) -> PlacementView:
        """Load a model."""
        return await self.models.load(LoadRequest(model=model, **kwargs), ignore)  # type: ignore[arg-type]

    async def ask(
        self,
        model: str,
        n: int = 12,
        *,
        seen: Callable[[GenerationEvent], None] = lambda _: None,
    ) -> list[int]:
        """Return the tokens of a seeded answer."""
        request = GenerationRequest(
            model,
            messages=(ChatMessage("user", "Name three rivers."),),
            max_tokens=n,
            ignore_eos=True,
            sampling=SamplingParams(seed=7, temperature=0.8),
        )
        tokens = []
        async with self.pipeline.engine.generate(request) as events:
            async for event in events:
                seen(event)
                if isinstance(event, Generated):
                    tokens.append(event.token)
        return tokens


@asynccontextmanager
async def _node(
    network: SimulatedNetwork,
    number: int,
    root: Path,
    memory: Callable[[], int] | None,
    threads: int | None,
) -> AsyncIterator[ModelNode]:
    mesh = network.node(peer(number), name=f"n{number}")
    async with AsyncExitStack() as stack:
        consensus = await stack.enter_async_context(open_single(mesh, MemoryLog(), leader=peer(0)))
        rpc = await stack.enter_async_context(open_rpc(mesh))
        pipeline = await stack.enter_async_context(open_pipeline(mesh))
        store = ModelStore(root / str(number))
        assets = LocalAssets(mesh, store, threads=threads)
        models = await stack.enter_async_context(
            open_models(
                mesh=mesh,
                consensus=consensus,
                rpc=rpc,
                pipeline=pipeline,
                store=store,
                name=f"n{number}",
                defaults=ModelDefaults(n_ctx=512, n_seq=2),
                assets=assets,
                memory=memory,
            )
        )
        yield ModelNode(mesh, consensus, pipeline, store, assets, models)


@asynccontextmanager
async def open_model_world(
    nodes: int,
    root: Path,
    *,
    memory: Callable[[], int] | None = None,
    threads: int | None = None,
) -> AsyncIterator[list[ModelNode]]:
    """Run ``nodes`` connected nodes with empty stores under ``root``."""
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network())
        world = [
            await stack.enter_async_context(_node(network, i, root, memory, threads))
            for i in range(nodes)
        ]
        await network.connect_all()
        yield world
