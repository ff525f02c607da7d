"""A simulated swarm that places the toy model through its replicated log.

Mesh, log, requests, controllers and pipelines are the real code; slices and runners are toys.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import trio

from pyagent_node.base.errors import PyAgentError, RunnerFailed
from pyagent_node.base.types import PeerId, Placement, Rank, Slice
from pyagent_node.consensus.commands import (
    ModelRecord,
    RegisterModel,
    RemovePlacement,
    SetPlacement,
)
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.replica import REQUEST_BYTES
from pyagent_node.consensus.single import open_single
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.pipeline.head import Vocabulary
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.nurseries import background
from pyagent_node.node.placement_board import PlacementBoard
from pyagent_node.node.placement_messages import AskPlacements, PlacementReports
from pyagent_node.node.placements import HeadParts, HostProgress, PlacementController
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.simulations.backend import (
    N_EMBD,
    N_VOCAB,
    ToyEmbeddings,
    ToyRunner,
    ToyTokenizer,
    toy_vocabulary,
)
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network
from pyagent_node.simulations.pipeline import MODEL, NAME, peer

N_LAYERS = 10
RECORD = ModelRecord(
    digest=MODEL,
    name=NAME,
    size=1,
    architecture="toy",
    n_layers=N_LAYERS,
    n_embd=N_EMBD,
    n_vocab=N_VOCAB,
    n_ctx_train=4096,
    manifest=MODEL,
    created=1,
)


class ToyHead(NamedTuple):
    """The head's parts of the toy."""

    vocabulary: Vocabulary
    tokenizer: ToyTokenizer
    embeddings: ToyEmbeddings
    failed: trio.Event
    failure: RunnerFailed | None


class ToyAssets:
    """Slices that take ``seconds`` to load; ``faults`` are raised by the next attempts instead."""

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self.faults: list[PyAgentError] = []
        self.runners: list[ToyRunner] = []
        self.attempts: list[float] = []
        self.most_at_once = 0

    @asynccontextmanager
    async def runner(
        self, model: ModelRecord, placement: Placement, rank: Rank, progress: HostProgress
    ) -> AsyncIterator[StageRunner]:
        """Load a toy."""
        self.attempts.append(trio.current_time())
        progress("fetching", 1, 2)
        await trio.sleep(self.seconds / 2)
        progress("loading")
        await trio.sleep(self.seconds / 2)
        if self.faults:
            raise self.faults.pop(0)
        runner = ToyRunner(
            rank.slice,
            whole=len(placement.ranks) == 1,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            seconds=0.01,
        )
        self.runners.append(runner)
        self.most_at_once = max(self.most_at_once, len(self.runners))
        try:
            yield runner
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)  # a process takes a moment to end
            self.runners.remove(runner)

    @asynccontextmanager
    async def head(
        self, model: ModelRecord, placement: Placement, progress: HostProgress
    ) -> AsyncIterator[HeadParts]:
        """Load the toy's tokenizer."""
        await trio.sleep(self.seconds)
        yield ToyHead(toy_vocabulary(), ToyTokenizer(), ToyEmbeddings(), trio.Event(), None)


class HostingNode(NamedTuple):
    """One node of the swarm."""

    mesh: SimulatedMesh
    consensus: Consensus
    pipeline: Pipeline
    assets: ToyAssets
    controller: PlacementController
    board: PlacementBoard

    async def ask(self, tokens: list[int], n: int, params: SamplingParams) -> list[int]:
        """Return the tokens of an answer."""
        request = GenerationRequest(NAME, tokens=tuple(tokens), max_tokens=n, sampling=params)
        async with self.pipeline.engine.generate(request) as events:
            return [event.token async for event in events if isinstance(event, Generated)]


class HostingWorld:
    """The nodes; node 0 writes the log.  Get one from :func:`open_hosting_world`."""

    def __init__(self, network: SimulatedNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.nodes: list[HostingNode] = []
        self._nursery = nursery

    async def add(self) -> HostingNode:
        """Start one more node, connected to all others."""
        number = len(self.nodes)
        started: list[HostingNode] = []
        ready = trio.Event()

        async def run() -> None:
            async with _node(self.network, number) as node:
                started.append(node)
                ready.set()
                await trio.sleep_forever()

        self._nursery.start_soon(run)
        await ready.wait()
        self.nodes += started
        await self.network.connect_all()
        return started[0]

    async def place(self, boundaries: tuple[int, ...], nodes: tuple[int, ...]) -> Placement:
        """Propose a placement, as seen from node 0, and return it."""
        consensus = self.nodes[0].consensus
        cuts = (0, *boundaries, N_LAYERS)
        last = len(cuts) - 2
        ranks = tuple(
            Rank(r, Slice(cuts[r], cuts[r + 1], r == last), peer(nodes[r])) for r in range(last + 1)
        )
        before = consensus.state.placements.get(MODEL)
        await consensus.propose(RegisterModel(RECORD))
        await consensus.propose(
            SetPlacement(MODEL, ranks, 4096, 4, before.epoch if before is not None else 0)
        )
        return consensus.state.placements[MODEL]

    async def unplace(self) -> None:
        """Propose to remove the placement."""
        consensus = self.nodes[0].consensus
        await consensus.propose(RemovePlacement(MODEL, consensus.state.placements[MODEL].epoch))


@asynccontextmanager
async def _node(network: SimulatedNetwork, number: int) -> AsyncIterator[HostingNode]:
    mesh = network.node(peer(number), name=f"n{number}")
    async with AsyncExitStack() as stack:
        rng = random.Random(number)  # noqa: S311 - a simulation must repeat itself
        consensus = await stack.enter_async_context(
            open_single(
                mesh,
                MemoryLog(),
                leader=peer(0),
                new_request=lambda: rng.randbytes(REQUEST_BYTES),
                rng=rng,
            )
        )
        rpc: Rpc = await stack.enter_async_context(open_rpc(mesh))
        pipeline = await stack.enter_async_context(open_pipeline(mesh))
        assets = ToyAssets()
        controller = PlacementController(mesh.peer_id, consensus, pipeline, assets, rng=rng)
        board = PlacementBoard(mesh, rpc, consensus, controller)

        async def answer(
            asker: PeerId, ask: AskPlacements, tail: bytes
        ) -> tuple[PlacementReports, bytes]:
            return controller.reports(), b""

        rpc.register(AskPlacements, answer)
        nursery = await stack.enter_async_context(background())
        nursery.start_soon(controller.run)
        yield HostingNode(mesh, consensus, pipeline, assets, controller, board)


@asynccontextmanager
async def open_hosting_world(nodes: int, *, latency: float = 0.001) -> AsyncIterator[HostingWorld]:
    """Run a swarm of ``nodes`` nodes without a placement."""
    async with open_network(latency=latency) as network, background() as nursery:
        world = HostingWorld(network, nursery)
        for _ in range(nodes):
            await world.add()
        yield world
