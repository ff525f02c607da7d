"""A simulated swarm whose sessions outlive their heads: journals, manifests, taking over.

Mesh, log, requests, pipelines and everything about sessions are the real code; the model is the
toy.  Node 0 writes the log.

>>> async with open_session_world(5) as world:                            # doctest: +SKIP
...     await world.place((3, 7), nodes=(0, 1, 2))
...     head, other = world.nodes[3], world.nodes[4]
...     world.crash(3)
...     async with other.live.attach(session, after=10) as events:
...         ...
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from pyagent_node.base.types import PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.consensus.commands import ModelRecord, RegisterModel, SetPlacement
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.replica import REQUEST_BYTES
from pyagent_node.consensus.single import open_single
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.journal_book import JournalBook
from pyagent_node.node.journals import JournalKeeper, open_journals
from pyagent_node.node.kv_service import KvService
from pyagent_node.node.live_session import Reader
from pyagent_node.node.live_sessions import LiveSessions
from pyagent_node.node.nurseries import background
from pyagent_node.node.rpc import Rpc, open_rpc
from pyagent_node.node.session_moves import MovedSessions
from pyagent_node.node.session_recovery import SessionRecovery, open_sessions
from pyagent_node.simulations.backend import (
    N_EMBD,
    N_VOCAB,
    ToyEmbeddings,
    ToyRunner,
    ToyTokenizer,
    toy_vocabulary,
)
from pyagent_node.simulations.kv import open_simulated_kv
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network
from pyagent_node.simulations.pipeline import MODEL, NAME, peer

N_LAYERS = 10
N_CTX = 4096
RECORD = ModelRecord(
    digest=MODEL,
    name=NAME,
    size=1,
    architecture="toy",
    n_layers=N_LAYERS,
    n_embd=N_EMBD,
    n_vocab=N_VOCAB,
    n_ctx_train=N_CTX,
    manifest=MODEL,
    created=1,
)
EPOCH = 1_800_000_000.0
"""Unix seconds at the simulation's time 0."""


def wall() -> float:
    """Return Unix seconds on the simulation's clock."""
    return EPOCH + trio.current_time()


def session_id(number: int) -> SessionId:
    """Return a session id, the same in every run."""
    return SessionId(f"{number:032x}")


class SessionNode:
    """One node's parts; ``book`` holds the journals it keeps for others."""

    def __init__(self, number: int, mesh: SimulatedMesh, book: JournalBook) -> None:
        self.number = number
        self.peer_id = mesh.peer_id
        self.mesh = mesh
        self.book = book
        self.scope = trio.CancelScope()
        self.runners: list[ToyRunner] = []
        self.consensus: Consensus
        self.rpc: Rpc
        self.keeper: JournalKeeper
        self.pipeline: Pipeline
        self.live: LiveSessions
        self.recovery: SessionRecovery
        self.moved: MovedSessions
        self.kv: KvService | None = None

    async def read(self, reader: Reader, most: int | None = None) -> list[int]:
        """Return the next tokens of an answer, ``most`` of them or all."""
        tokens: list[int] = []
        while most is None or len(tokens) < most:
            try:
                event = await reader.__anext__()
            except StopAsyncIteration:
                break
            if isinstance(event, Generated):
                tokens.append(event.token)
        return tokens

    async def resume(self, session: SessionId, after: int) -> list[int]:
        """Return the tokens of a session from one on."""
        async with self.live.attach(session, after) as reader:
            return await self.read(reader)


class SessionWorld:
    """The nodes and the placement; get one from :func:`open_session_world`."""

    def __init__(
        self, network: SimulatedNetwork, nursery: trio.Nursery, *, keeps_kv: bool = False
    ) -> None:
        self.network = network
        self.nodes: list[SessionNode] = []
        self._keeps_kv = keeps_kv
        self._nursery = nursery
        self._placement: Placement | None = None
        self._logs: dict[int, MemoryLog] = {}

    async def add(self, number: int | None = None) -> SessionNode:
        """Start one more node, or the crashed node ``number`` again."""
        where = len(self.nodes) if number is None else number
        mesh = self.network.node(peer(where), name=f"n{where}")
        node = SessionNode(where, mesh, JournalBook())
        ready = trio.Event()
        self._nursery.start_soon(self._run, node, ready)
        await ready.wait()
        if number is None:
            self.nodes.append(node)
        else:
            self.nodes[number] = node
        await self.network.connect_all()
        if self._placement is not None:
            self._offer(node, self._placement)
        return node

    async def _run(self, node: SessionNode, ready: trio.Event) -> None:
        rng = random.Random(node.number)  # noqa: S311 - a simulation must repeat itself
        with node.scope:
            async with AsyncExitStack() as stack:
                enter = stack.enter_async_context
                node.consensus = await enter(
                    open_single(
                        node.mesh,
                        self._logs.setdefault(node.number, MemoryLog()),
                        leader=peer(0),
                        new_request=lambda: rng.randbytes(REQUEST_BYTES),
                        rng=rng,
                    )
                )
                key = NodeKey(node.number.to_bytes(32, "big"))
                node.rpc = await enter(open_rpc(node.mesh))
                node.keeper = await enter(
                    open_journals(
                        node.mesh, node.consensus, node.rpc, key, wall=wall, book=node.book
                    )
                )
                if self._keeps_kv:
                    node.kv = await enter(open_simulated_kv(node.mesh, node.consensus))
                    node.kv.on_report = node.keeper.blocks_held
                node.pipeline = await enter(
                    open_pipeline(node.mesh, journal=node.keeper, shelf=node.kv)
                )
                if node.kv is not None:
                    node.kv.rests.moved_on = node.pipeline.stages.moved_on
                sessions = await enter(
                    open_sessions(
                        node.peer_id,
                        node.consensus,
                        node.rpc,
                        node.keeper,
                        node.pipeline.engine,
                        wall=wall,
                    )
                )
                node.live, node.recovery, node.moved = sessions
                ready.set()
                await trio.sleep_forever()

    def crash(self, number: int) -> None:
        """Kill a node: its peers see it go, and nothing of it says good-bye."""
        node = self.nodes[number]
        self.network.crash(node.peer_id)
        node.scope.cancel()

    async def place(
        self,
        boundaries: Sequence[int],
        nodes: Sequence[int],
        *,
        seconds: float = 0.05,
        standby: int | None = None,
    ) -> Placement:
        """Place the toy, cut at ``boundaries``, and offer it on every node.

        The node ``standby`` stands by for every rank, in the log at least.
        """
        standbys = () if standby is None else (peer(standby),)
        cuts = (0, *boundaries, N_LAYERS)
        last = len(cuts) - 2
        ranks = tuple(
            Rank(r, Slice(cuts[r], cuts[r + 1], r == last), peer(nodes[r]), standbys)
            for r in range(last + 1)
        )
        writer = self.nodes[0].consensus
        before = writer.state.placements.get(MODEL)
        await writer.propose(RegisterModel(RECORD))
        await writer.propose(
            SetPlacement(MODEL, ranks, N_CTX, 8, before.epoch if before is not None else 0)
        )
        placement = self._placement = writer.state.placements[MODEL]
        for rank in ranks:
            self._serve(self.nodes[nodes[rank.rank]], placement, rank, seconds)
        for node in self.nodes:
            await node.consensus.read_barrier()
            self._offer(node, placement)
        return placement

    def _offer(self, node: SessionNode, placement: Placement) -> None:
        node.pipeline.engine.offer(
            HeadModel(NAME, 1, placement, toy_vocabulary(), ToyTokenizer(), ToyEmbeddings())
        )

    def _serve(self, node: SessionNode, placement: Placement, rank: Rank, seconds: float) -> None:
        at, ranks = rank.rank, placement.ranks
        spec = StageSpec(
            model=MODEL,
            epoch=placement.epoch,
            rank=at,
            peer_id=rank.peer_id,
            slice=rank.slice,
            upstream=ranks[at - 1].peer_id if at else None,
            downstream=ranks[at + 1].peer_id if at + 1 < len(ranks) else None,
            n_embd=N_EMBD,
            n_vocab=N_VOCAB,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            activations=placement.crossing,
        )
        runner = ToyRunner(
            rank.slice,
            whole=len(ranks) == 1,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            seconds=seconds,
        )
        node.runners.append(runner)
        self._nursery.start_soon(self._stage, node, spec, runner)

    async def _stage(self, node: SessionNode, spec: StageSpec, runner: ToyRunner) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def until_crash() -> None:
                    while not node.scope.cancel_called:  # noqa: ASYNC110 - scopes tell nobody
                        await trio.sleep(0.1)
                    scope.cancel()

                nursery.start_soon(until_crash)
                await node.pipeline.stages.serve(spec, runner)
                nursery.cancel_scope.cancel()

    def request(
        self,
        session: SessionId,
        prompt: Sequence[int],
        n: int,
        *,
        seed: int = 7,
        label: str = "",
    ) -> GenerationRequest:
        """Return a request for ``n`` tokens."""
        return GenerationRequest(
            NAME,
            tokens=tuple(prompt),
            max_tokens=n,
            sampling=SamplingParams(seed=seed),
            ignore_eos=True,
            session=session,
            label=label,
        )

    def holders(self, session: SessionId) -> set[int]:
        """Return the running nodes that keep a copy of a session (by its public id)."""
        now = trio.current_time()
        return {
            node.number
            for node in self.nodes
            if not node.scope.cancel_called and node.book.get(session, now) is not None
        }

    def number(self, peer_id: PeerId) -> int:
        """Return a node's number."""
        return next(n.number for n in self.nodes if n.peer_id == peer_id)


@asynccontextmanager
async def open_session_world(
    nodes: int, *, latency: float = 0.001, keeps_kv: bool = False
) -> AsyncIterator[SessionWorld]:
    """Run ``nodes`` connected nodes without a placement, which keep KV blocks or do not."""
    async with open_network(latency=latency) as network, background() as nursery:
        world = SessionWorld(network, nursery, keeps_kv=keeps_kv)
        for _ in range(nodes):
            await world.add()
        yield world
