"""A simulated swarm that runs the toy model: real pipelines over the simulated mesh.

>>> async with open_pipeline_world(4, latency=0.01) as world:              # doctest: +SKIP
...     world.place((3, 7), nodes=(1, 2, 3))
...     answer = await world.ask(0, tokens, max_tokens=20, sampling=SamplingParams(seed=7))
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import trio

from pyagent_node.base.errors import Conflict, RunnerFailed
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, Slice
from pyagent_node.inference.generation import Finished, Generated, GenerationRequest
from pyagent_node.inference.kv.pieces import JoinPlan
from pyagent_node.inference.kv.port import KvShelf
from pyagent_node.inference.pipeline.journal import JournalSink
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.pipeline.stage_types import StageLimits, StageSpec
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.backend import (
    N_EMBD,
    N_VOCAB,
    ToyEmbeddings,
    ToyRunner,
    ToyTokenizer,
    toy_vocabulary,
)
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network
from pyagent_node.simulations.pruning import PruningToy
from pyagent_node.simulations.shelf import ToyShelves

MODEL = Digest("70" * 32)
NAME = "toy"


def peer(number: int) -> PeerId:
    """Return the peer id of node ``number``, the same in every run."""
    return NodeKey(number.to_bytes(32, "big")).peer_id


class Answer(NamedTuple):
    """What a request was answered with."""

    tokens: list[int]
    text: str
    finished: Finished


class PipelineWorld:
    """The nodes, and what is placed on them; get one from :func:`open_pipeline_world`."""

    def __init__(
        self,
        network: SimulatedNetwork,
        meshes: list[SimulatedMesh],
        pipelines: list[Pipeline],
        nursery: trio.Nursery,
    ) -> None:
        self.network = network
        self.meshes = meshes
        self.pipelines = pipelines
        self.placement = Placement(MODEL, 0, (), 0, 0)
        self.runners: list[ToyRunner] = []
        self.failures: list[RunnerFailed] = []
        self._nursery = nursery
        self._scopes: list[trio.CancelScope] = []
        self._epoch = 0
        self._trained = 0

    def place(
        self,
        boundaries: Sequence[int],
        nodes: Sequence[int],
        *,
        n_layers: int = 10,
        n_ctx: int = 4096,
        n_seq: int = 8,
        seconds: float = 0.01,
        keep: bool = False,
        classes: Sequence[str] = (),
        prefill_cuts: Sequence[int] = (),
        activations: str = "",
        trained: int = 0,
    ) -> Placement:
        """Serve the toy, cut at ``boundaries``, and offer it on every node; replaces the last.

        With ``keep`` the runners go over to the new placement, rank by rank, and their old stages
        are left to end by that.  ``classes`` are the exactness classes that the runners name,
        ``activations`` as in ``Placement``.  With ``trained`` positions the runners prune.
        """
        kept = self.runners if keep else []
        if not keep:
            self.unplace()
        self._epoch += 1
        self._trained = trained
        cuts = (0, *boundaries, n_layers)
        last = len(cuts) - 2
        ranks = tuple(
            Rank(r, Slice(cuts[r], cuts[r + 1], r == last), peer(nodes[r])) for r in range(last + 1)
        )
        placement = Placement(MODEL, self._epoch, ranks, n_ctx, n_seq, activations=activations)
        self.placement = placement
        self.runners = kept or [
            PruningToy(
                r.slice,
                whole=last == 0,
                n_ctx=n_ctx,
                n_seq=n_seq,
                seconds=seconds,
                n_ctx_train=trained,
            )
            if trained
            else ToyRunner(
                r.slice,
                whole=last == 0,
                n_ctx=n_ctx,
                n_seq=n_seq,
                seconds=seconds,
                exactness=classes[r.rank] if classes else "",
                prefill_cut=prefill_cuts[r.rank] if prefill_cuts else 64,
            )
            for r in ranks
        ]
        for rank in ranks:
            self.start_rank(placement, rank.rank)
        self.offer(placement)
        return placement

    def restart(self, rank: int, exactness: str = "") -> None:
        """Serve one rank of the placement with a new runner, as after the death of the last."""
        placement, old = self.placement, self.runners[rank]
        self.runners[rank] = ToyRunner(
            placement.ranks[rank].slice,
            whole=len(placement.ranks) == 1,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            seconds=old.seconds,
            exactness=exactness,
        )
        self.start_rank(placement, rank)

    def offer(self, placement: Placement) -> None:
        """Make every node a head for ``placement``."""
        for pipeline in self.pipelines:
            pipeline.engine.offer(
                HeadModel(
                    NAME,
                    1,
                    placement,
                    toy_vocabulary(),
                    ToyTokenizer(),
                    ToyEmbeddings(),
                    n_ctx_train=self._trained,
                )
            )

    def start_rank(self, placement: Placement, rank: int) -> None:
        """Serve one rank with the runner in ``runners``."""
        ranks = placement.ranks
        spec = StageSpec(
            model=MODEL,
            epoch=placement.epoch,
            rank=rank,
            peer_id=ranks[rank].peer_id,
            slice=ranks[rank].slice,
            upstream=ranks[rank - 1].peer_id if rank else None,
            downstream=ranks[rank + 1].peer_id if rank + 1 < len(ranks) else None,
            n_embd=N_EMBD,
            n_vocab=N_VOCAB,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            activations=placement.crossing,
        )
        scope = trio.CancelScope()
        self._scopes.append(scope)
        self._nursery.start_soon(self._serve, spec, self.runners[rank], scope)

    async def _serve(self, spec: StageSpec, runner: ToyRunner, scope: trio.CancelScope) -> None:
        node = next(i for i, mesh in enumerate(self.meshes) if mesh.peer_id == spec.peer_id)
        if scope.cancel_called:
            return
        with scope, contextlib.suppress(Conflict):
            self.failures.append(await self.pipelines[node].stages.serve(spec, runner))

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run something of a test next to the nodes."""
        self._nursery.start_soon(task)

    def unplace(self) -> None:
        """Stop every stage; the heads still offer the model."""
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    async def ask(
        self,
        node: int,
        tokens: Sequence[int],
        *,
        max_tokens: int = 20,
        sampling: SamplingParams | None = None,
        cache_salt: str = "",
        prompt_cache: bool = True,
        join: JoinPlan | None = None,
    ) -> Answer:
        """Ask ``node`` and return the whole answer."""
        request = GenerationRequest(
            NAME,
            tokens=tuple(tokens),
            max_tokens=max_tokens,
            sampling=sampling or SamplingParams(temperature=0.0),
            cache_salt=cache_salt,
            prompt_cache=prompt_cache,
            join=join,
        )
        got: list[int] = []
        text = ""
        async with self.pipelines[node].engine.generate(request) as events:
            async for event in events:
                text += event.text
                if isinstance(event, Generated):
                    got.append(event.token)
                else:
                    return Answer(got, text, event)
        raise AssertionError("an answer ends with Finished")

    @property
    def sessions(self) -> int:
        """Sessions open on any stage."""
        return sum(len(p.stages.sessions()) for p in self.pipelines)

    @property
    def open_slots(self) -> int:
        """Slots in use in any runner."""
        return sum(runner.open_slots for runner in self.runners)


@asynccontextmanager
async def open_pipeline_world(
    nodes: int,
    *,
    latency: float = 0.0,
    limits: StageLimits | None = None,
    journal: JournalSink | None = None,
    speculators: Speculators | None = None,
    shelves: ToyShelves | None = None,
    open_shelf: Callable[[SimulatedMesh], AbstractAsyncContextManager[KvShelf]] | None = None,
) -> AsyncIterator[PipelineWorld]:
    """Run ``nodes`` connected nodes without a placement.

    ``journal`` hears of all heads; ``speculators`` guess for all of them; ``shelves`` keep blocks,
    or what ``open_shelf`` opens for each node.
    """
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network(latency=latency))
        meshes = [network.node(peer(i), name=f"n{i}") for i in range(nodes)]
        pipelines = []
        for mesh in meshes:
            shelf: KvShelf | None = None if shelves is None else shelves.of(mesh.peer_id)
            if open_shelf is not None:
                shelf = await stack.enter_async_context(open_shelf(mesh))
            opened = open_pipeline(
                mesh, limits=limits, journal=journal, speculators=speculators, shelf=shelf
            )
            pipelines.append(await stack.enter_async_context(opened))
        await network.connect_all()
        nursery = await stack.enter_async_context(background())
        yield PipelineWorld(network, meshes, pipelines, nursery)
