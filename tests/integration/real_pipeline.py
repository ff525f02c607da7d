"""Pipelines of real runners in child processes, over the simulated mesh in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import trio

from pyagent_node.base.types import Digest, Placement, Rank, Slice
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.journal import JournalSink
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.runner import (
    RunnerSpec,
    SliceRunner,
    open_slice_runner,
    open_tokenizer_runner,
)
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.mesh import open_network
from pyagent_node.simulations.pipeline import peer
from pyagent_node.simulations.shelf import ToyShelves

NAME = "bundled"


class RealPipeline(NamedTuple):
    """``head`` is the pipeline part of a node that holds no rank."""

    head: Pipeline
    ranks: list[Pipeline]
    runners: list[SliceRunner]
    placement: Placement


@asynccontextmanager
async def open_real_pipeline(
    store: ModelStore,
    digest: Digest,
    boundaries: Sequence[int],
    *,
    n_ctx: int,
    n_seq: int,
    latency: float = 0.0,
    speculators: Speculators | None = None,
    shelves: ToyShelves | None = None,
    journal: JournalSink | None = None,
    backends: Sequence[str] = (),
) -> AsyncIterator[RealPipeline]:
    """Run the model cut at ``boundaries``, each rank on a node of its own.

    ``backends`` has one name for each rank; all are llama.cpp where it is empty.
    """
    file = store.model_file(digest)
    shape = model_shape(file.header)
    cuts = (0, *boundaries, shape.n_layers)
    count = len(cuts) - 1
    ranks = tuple(
        Rank(r, Slice(cuts[r], cuts[r + 1], r == count - 1), peer(r)) for r in range(count)
    )
    placement = Placement(digest, 1, ranks, n_ctx, n_seq)
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network(latency=latency))
        meshes = [network.node(peer(i)) for i in range(count + 1)]
        pipelines = [
            await stack.enter_async_context(
                open_pipeline(
                    mesh,
                    speculators=speculators,
                    shelf=None if shelves is None else shelves.of(mesh.peer_id),
                    journal=journal,
                )
            )
            for mesh in meshes
        ]
        await network.connect_all()
        runners = []
        for rank, backend in zip(ranks, backends or ["llama.cpp"] * count, strict=True):
            path = await trio.to_thread.run_sync(store.make_slice, digest, rank.slice)
            spec = RunnerSpec(str(path), rank.slice, n_ctx, n_seq, backend=backend)
            runners.append(await stack.enter_async_context(open_slice_runner(spec)))
        tokenizer = await stack.enter_async_context(open_tokenizer_runner(str(file.path)))
        table = stack.enter_context(EmbeddingTable(file))
        nursery = await stack.enter_async_context(background())
        for rank, runner in zip(ranks, runners, strict=True):
            r = rank.rank
            stage = StageSpec(
                model=digest,
                epoch=1,
                rank=r,
                peer_id=rank.peer_id,
                slice=rank.slice,
                upstream=peer(r - 1) if r else None,
                downstream=peer(r + 1) if r + 1 < count else None,
                n_embd=shape.n_embd,
                n_vocab=shape.n_vocab,
                n_ctx=n_ctx,
                n_seq=n_seq,
            )
            nursery.start_soon(pipelines[r].stages.serve, stage, runner)
        pieces = tuple(await tokenizer.pieces())
        vocabulary = Vocabulary(pieces, frozenset(tokenizer.info.end_tokens))
        pipelines[count].engine.offer(HeadModel(NAME, 1, placement, vocabulary, tokenizer, table))
        yield RealPipeline(pipelines[count], pipelines[:count], runners, placement)
