"""A simulated swarm that places the toy model through its replicated log.

Mesh, log, requests, controllers and pipelines are the real code; slices and runners are toys.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import trio

from pyagent_node.base.errors import PyAgentError, RunnerFailed
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
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
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.inference.pipeline.ports import StageRunner
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.healer import Healer
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.node.keeping import HostProgress
from pyagent_node.node.nurseries import background
from pyagent_node.node.placement_board import PlacementBoard
from pyagent_node.node.placement_messages import (
    AskFacts,
    AskPlacements,
    FactsReply,
    PlacementReports,
)
from pyagent_node.node.placement_parts import HeadParts
from pyagent_node.node.placements import PlacementController
from pyagent_node.node.planning import facts_reply, survey
from pyagent_node.node.resharding import Resharder
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
from pyagent_node.simulations.shelf import ToyShelves

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


SHAPE = ModelShape(
    name=NAME,
    layer_bytes=(1 << 20,) * N_LAYERS,
    layer_flops=(1 << 20,) * N_LAYERS,
    head_bytes=1 << 20,
    head_flops=1 << 20,
    embedding_bytes=0,
    kv_bytes=1,
)
NEED = 200 << 20
"""Memory that a toy runner takes from its node; more than a plan reckons with."""

Reserves = tuple[tuple[int, ...], ...]
"""Numbers of nodes for each rank."""


class ToyHead(NamedTuple):
    """The head's parts of the toy."""

    vocabulary: Vocabulary
    tokenizer: ToyTokenizer
    embeddings: ToyEmbeddings
    failed: trio.Event
    failure: RunnerFailed | None


class ToyAssets:
    """Slices that take ``seconds`` to get ready, half of it to come to the ``disk``.

    ``faults`` are raised by the next attempts instead; ``heads`` counts the heads made.  ``memory``
    is what the node has for runners, ``pace`` the seconds that a decode takes.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds = seconds
        self.faults: list[PyAgentError] = []
        self.runners: list[ToyRunner] = []
        self.attempts: list[float] = []
        self.most_at_once = 0
        self.heads = 0
        self.memory = 10**12
        self.starved = False
        """There is no memory for any runner."""
        self.disk: set[Slice] = set()
        self.pace = 0.01
        self.one_way = False
        """All rows of its toys go through the same kernel."""

    @asynccontextmanager
    async def runner(
        self, model: ModelRecord, key: RunnerKey, epoch: int, progress: HostProgress
    ) -> AsyncIterator[StageRunner]:
        """Load a toy."""
        self.attempts.append(trio.current_time())
        if key.slice not in self.disk:
            progress("fetching", 1, 2)
            await trio.sleep(self.seconds / 2)
        self.disk.add(key.slice)
        progress("loading")
        await trio.sleep(self.seconds / 2)
        if self.faults:
            raise self.faults.pop(0)
        if self.starved:
            raise RunnerFailed("The runner was killed by SIGKILL.", reason="SIGKILL")
        runner = self.make_runner(key)
        self.runners.append(runner)
        self.most_at_once = max(self.most_at_once, len(self.runners))
        try:
            yield runner
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)  # a process takes a moment to end
            self.runners.remove(runner)

    def make_runner(self, key: RunnerKey) -> ToyRunner:
        """Return a runner of a toy."""
        return ToyRunner(
            key.slice,
            whole=key.slice == Slice(0, N_LAYERS, True),
            n_ctx=key.n_ctx,
            n_seq=key.n_seq,
            seconds=self.pace,
            one_way=self.one_way,
        )

    @asynccontextmanager
    async def head(
        self, model: ModelRecord, epoch: int, progress: HostProgress
    ) -> AsyncIterator[HeadParts]:
        """Load the toy's tokenizer."""
        self.heads += 1
        await trio.sleep(self.seconds)
        yield ToyHead(toy_vocabulary(), ToyTokenizer(), ToyEmbeddings(), trio.Event(), None)

    async def spare(
        self, model: ModelRecord, part: Slice, epoch: int, progress: HostProgress
    ) -> None:
        """Fetch a file."""
        progress("fetching", 1, 2)
        await trio.sleep(self.seconds / 2)
        self.disk.add(part)

    async def tidy(self, model: Digest, needed: Callable[[], frozenset[Slice]]) -> None:
        """Delete files."""
        await trio.lowlevel.checkpoint()
        self.disk &= needed()


class ToyFacts:
    """What a node says of itself; unlike the real provider it needs no threads, which stop no
    simulated clock.
    """

    def __init__(self, peer_id: PeerId, name: str, assets: ToyAssets) -> None:
        self._peer_id = peer_id
        self._name = name
        self._assets = assets

    async def facts(self, model: Digest) -> NodeFacts:
        """Return the facts as of now."""
        await trio.lowlevel.checkpoint()
        assets = self._assets
        free = max(1, assets.memory - len(assets.runners) * NEED)
        if assets.starved:
            free = 1
        return NodeFacts(self._peer_id, self._name, free, 1, 1e9, 1e9, tuple(sorted(assets.disk)))


class HostingNode(NamedTuple):
    """One node of the swarm."""

    mesh: SimulatedMesh
    consensus: Consensus
    pipeline: Pipeline
    assets: ToyAssets
    controller: PlacementController
    board: PlacementBoard
    healer: Healer
    resharder: Resharder

    async def ask(self, tokens: list[int], n: int, params: SamplingParams) -> list[int]:
        """Return the tokens of an answer."""
        request = GenerationRequest(NAME, tokens=tuple(tokens), max_tokens=n, sampling=params)
        async with self.pipeline.engine.generate(request) as events:
            return [event.token async for event in events if isinstance(event, Generated)]


class HostingWorld:
    """The nodes; node 0 writes the log.  Get one from :func:`open_hosting_world`."""

    def __init__(
        self,
        network: SimulatedNetwork,
        nursery: trio.Nursery,
        *,
        heal: bool,
        one_way: bool,
        shelves: ToyShelves | None = None,
    ) -> None:
        self.network = network
        self.nodes: list[HostingNode] = []
        self._heal = heal
        self._one_way = one_way
        self._shelves = shelves
        self._nursery = nursery
        self._scopes: dict[int, trio.CancelScope] = {}

    async def add(self) -> HostingNode:
        """Start one more node, connected to all others."""
        node = await self._start(len(self.nodes))
        self.nodes.append(node)
        return node

    async def _start(self, number: int) -> HostingNode:
        started: list[HostingNode] = []
        ready = trio.Event()
        scope = self._scopes[number] = trio.CancelScope()

        async def run() -> None:
            with scope:
                async with _node(
                    self.network,
                    number,
                    heal=self._heal,
                    one_way=self._one_way,
                    shelves=self._shelves,
                ) as node:
                    started.append(node)
                    ready.set()
                    await trio.sleep_forever()

        self._nursery.start_soon(run)
        await ready.wait()
        await self.network.connect_all()
        return started[0]

    def crash(self, number: int) -> None:
        """Kill a node: nothing of it is left but what others remember."""
        self.network.crash(peer(number))
        self._scopes[number].cancel()

    async def restart(self, number: int) -> HostingNode:
        """Start a crashed node again, its disk empty."""
        self.nodes[number] = await self._start(number)
        return self.nodes[number]

    async def place(
        self,
        boundaries: tuple[int, ...],
        nodes: tuple[int, ...],
        *,
        standbys: Reserves = (),
        spares: Reserves = (),
    ) -> Placement:
        """Propose a placement, as seen from node 0, and return it.

        ``standbys`` and ``spares`` name nodes for each rank, for all ranks or for none.
        """
        consensus = self.nodes[0].consensus
        await consensus.propose(RegisterModel(RECORD))
        await consensus.propose(self.command(boundaries, nodes, standbys=standbys, spares=spares))
        return consensus.state.placements[MODEL]

    def command(
        self,
        boundaries: tuple[int, ...],
        nodes: tuple[int, ...],
        *,
        by: int = 0,
        standbys: Reserves = (),
        spares: Reserves = (),
    ) -> SetPlacement:
        """Return what :meth:`place` proposes, after what node ``by`` sees in force."""
        cuts = (0, *boundaries, N_LAYERS)
        last = len(cuts) - 2
        ranks = tuple(
            Rank(
                r,
                Slice(cuts[r], cuts[r + 1], r == last),
                peer(nodes[r]),
                tuple(map(peer, standbys[r] if standbys else ())),
                tuple(map(peer, spares[r] if spares else ())),
            )
            for r in range(last + 1)
        )
        before = self.nodes[by].consensus.state.placements.get(MODEL)
        return SetPlacement(MODEL, ranks, 4096, 4, before.epoch if before is not None else 0)

    async def unplace(self) -> None:
        """Propose to remove the placement."""
        consensus = self.nodes[0].consensus
        await consensus.propose(RemovePlacement(MODEL, consensus.state.placements[MODEL].epoch))


@asynccontextmanager
async def _node(
    network: SimulatedNetwork,
    number: int,
    *,
    heal: bool,
    one_way: bool,
    shelves: ToyShelves | None,
) -> AsyncIterator[HostingNode]:
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
        shelf = shelves.of(mesh.peer_id) if shelves is not None else None
        pipeline = await stack.enter_async_context(open_pipeline(mesh, shelf=shelf))
        assets = ToyAssets()
        assets.one_way = one_way
        controller = PlacementController(mesh.peer_id, consensus, pipeline, assets, rng=rng)

        provider = ToyFacts(mesh.peer_id, f"n{number}", assets)

        async def facts(model: Digest) -> dict[PeerId, NodeFacts]:
            swarm = await survey(mesh, rpc, provider, model, distances=False)
            return {node.peer_id: node for node in swarm.nodes}

        healer = Healer(
            mesh=mesh,
            consensus=consensus,
            rpc=rpc,
            own=controller.reports,
            facts=facts,
            shapes=_shape,
        )
        board = PlacementBoard(mesh, rpc, consensus, healer.reports)
        resharder = Resharder(mesh.peer_id, consensus, board)

        async def answer(
            asker: PeerId, ask: AskPlacements, tail: bytes
        ) -> tuple[PlacementReports, bytes]:
            return healer.reports(), b""

        async def answer_facts(
            asker: PeerId, ask: AskFacts, tail: bytes
        ) -> tuple[FactsReply, bytes]:
            return await facts_reply(mesh, provider, ask), b""

        rpc.register(AskPlacements, answer)
        rpc.register(AskFacts, answer_facts)
        nursery = await stack.enter_async_context(background())
        nursery.start_soon(controller.run)
        if heal:
            nursery.start_soon(healer.run)
        nursery.start_soon(resharder.run)
        yield HostingNode(mesh, consensus, pipeline, assets, controller, board, healer, resharder)


async def _shape(digest: Digest) -> ModelShape:
    return SHAPE


@asynccontextmanager
async def open_hosting_world(
    nodes: int,
    *,
    latency: float = 0.001,
    heal: bool = False,
    one_way: bool = False,
    shelves: ToyShelves | None = None,
) -> AsyncIterator[HostingWorld]:
    """Run a swarm of ``nodes`` nodes without a placement; ``heal`` lets the leader keep them up.

    With ``one_way`` all rows go through the same kernel, so a model drafts for itself without fail.
    ``shelves`` are where the nodes keep KV blocks (``None``: nowhere).
    """
    async with open_network(latency=latency) as network, background() as nursery:
        world = HostingWorld(network, nursery, heal=heal, one_way=one_way, shelves=shelves)
        for _ in range(nodes):
            await world.add()
        yield world
