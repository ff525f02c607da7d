"""Generations of the real model outlive its runners, to the bit, and can be resumed elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest
import trio

from pyagent_node.base.errors import Conflict
from pyagent_node.base.types import Digest, Placement, Rank, SessionId, Slice
from pyagent_node.inference.generation import Finished, Generated, GenerationRequest
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.journal import Outcome, SessionJournal
from pyagent_node.inference.pipeline.pipeline import Pipeline, open_pipeline
from pyagent_node.inference.pipeline.ports import HeadModel
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.runner import (
    RunnerSpec,
    SliceRunner,
    TokenizerRunner,
    open_slice_runner,
    open_tokenizer_runner,
)
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.nurseries import background
from pyagent_node.simulations.mesh import open_network
from pyagent_node.simulations.pipeline import peer

from .whole_model import WholeModel

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

NAME = "bundled"
N_CTX, N_SEQ, NODES = 1024, 4, 4
TEXT = "The ship's log. " + " ".join(
    f"Day {day}: wind force {day % 7}, {day * 13 % 90} miles made good." for day in range(1, 40)
)


class LastJournal:
    """A sink that keeps the last session."""

    def __init__(self) -> None:
        self.journal: SessionJournal | None = None

    def begin(self, journal: SessionJournal) -> None:
        """Note a session."""
        self.journal = journal

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """Note tokens."""
        assert self.journal is not None
        assert start == len(self.journal.tokens)
        self.journal = msgspec.structs.replace(self.journal, tokens=(*self.journal.tokens, *tokens))

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """Keep the journal."""


class World:
    """Nodes over the simulated mesh, with real runners that are kept from epoch to epoch."""

    def __init__(
        self,
        store: ModelStore,
        digest: Digest,
        pipelines: list[Pipeline],
        nursery: trio.Nursery,
        tokenizer: TokenizerRunner,
        parts: tuple[Vocabulary, EmbeddingTable],
        backends: Mapping[int, str],
    ) -> None:
        self.pipelines = pipelines
        self.runners: dict[tuple[int, Slice], SliceRunner] = {}
        self.placement = Placement(digest, 0, (), N_CTX, N_SEQ)
        self._store = store
        self._nursery = nursery
        self._tokenizer = tokenizer
        self._parts = parts
        self._backends = backends

    async def place(self, cuts: Sequence[int], nodes: Sequence[int]) -> None:
        """Serve the model under the next epoch, and offer it on every node."""
        digest = self.placement.model
        shape = model_shape(self._store.model_file(digest).header)
        ends = (0, *cuts, shape.n_layers)
        last = len(cuts)
        ranks = tuple(
            Rank(r, Slice(ends[r], ends[r + 1], r == last), peer(nodes[r])) for r in range(last + 1)
        )
        for rank, node in zip(ranks, nodes, strict=True):
            known = self.runners.get((node, rank.slice))
            if known is None or known.failure is not None:
                await self._load(node, rank.slice)
        placement = Placement(digest, self.placement.epoch + 1, ranks, N_CTX, N_SEQ)
        self.placement = placement
        for rank, node in zip(ranks, nodes, strict=True):
            r = rank.rank
            spec = StageSpec(
                model=digest,
                epoch=placement.epoch,
                rank=r,
                peer_id=rank.peer_id,
                slice=rank.slice,
                upstream=ranks[r - 1].peer_id if r else None,
                downstream=ranks[r + 1].peer_id if r < last else None,
                n_embd=shape.n_embd,
                n_vocab=shape.n_vocab,
                n_ctx=N_CTX,
                n_seq=N_SEQ,
            )
            self._nursery.start_soon(self._serve, node, spec)
        vocabulary, table = self._parts
        for pipeline in self.pipelines:
            pipeline.engine.offer(HeadModel(NAME, 1, placement, vocabulary, self._tokenizer, table))

    async def _load(self, node: int, part: Slice) -> None:
        path = await trio.to_thread.run_sync(self._store.make_slice, self.placement.model, part)
        loaded = trio.Event()

        async def hold() -> None:
            backend = self._backends.get(node, "llama.cpp")
            spec = RunnerSpec(str(path), part, N_CTX, N_SEQ, backend=backend)
            async with open_slice_runner(spec) as runner:
                self.runners[node, part] = runner
                loaded.set()
                await trio.sleep_forever()

        self._nursery.start_soon(hold)
        await loaded.wait()

    async def _serve(self, node: int, spec: StageSpec) -> None:
        try:
            await self.pipelines[node].stages.serve(spec, self.runners[node, spec.slice])
        except Conflict:
            return  # a later epoch took the runner over

    async def kill(self, rank: int) -> None:
        """Kill the runner of a rank as the system does."""
        one = self.placement.ranks[rank]
        node = next(n for n in range(NODES) if peer(n) == one.peer_id)
        runner = self.runners[node, one.slice]
        os.kill(runner.pid, signal.SIGKILL)
        await runner.failed.wait()


@asynccontextmanager
async def open_world(
    store: ModelStore,
    digest: Digest,
    journal: LastJournal,
    backends: Mapping[int, str] = MappingProxyType({}),
) -> AsyncIterator[World]:
    """Run the nodes without a placement; ``backends`` of nodes that do not use llama.cpp."""
    file = store.model_file(digest)
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_network())
        meshes = [network.node(peer(i)) for i in range(NODES)]
        pipelines = [
            await stack.enter_async_context(open_pipeline(mesh, journal=journal)) for mesh in meshes
        ]
        await network.connect_all()
        tokenizer = await stack.enter_async_context(open_tokenizer_runner(str(file.path)))
        table = stack.enter_context(EmbeddingTable(file))
        vocabulary = Vocabulary(
            tuple(await tokenizer.pieces()), frozenset(tokenizer.info.end_tokens)
        )
        nursery = await stack.enter_async_context(background())
        parts = (vocabulary, table)
        yield World(store, digest, pipelines, nursery, tokenizer, parts, backends)


@pytest.fixture(scope="module")
def stored(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelStore, Digest]:
    """Return a store with the model in it."""
    store = ModelStore(tmp_path_factory.mktemp("models"))
    return store, store.add_file(bundled_model, about=About(NAME)).digest


@pytest.mark.parametrize("length", [225, 600])
async def test_killed_runners_and_moved_ranks_change_no_token(
    length: int, bundled_model: Path, stored: tuple[ModelStore, Digest]
) -> None:
    n = 120  # more than the head runs ahead of the faults below
    whole = WholeModel(str(bundled_model), N_CTX)
    prompt = whole.tokenize(TEXT)[:length]
    assert len(prompt) == length
    expected = whole.generate(prompt, n, seed=7, temperature=0.8)
    whole.close()
    request = GenerationRequest(
        NAME,
        tokens=tuple(prompt),
        max_tokens=n,
        ignore_eos=True,
        sampling=SamplingParams(seed=7, temperature=0.8),
    )
    sink = LastJournal()
    texts: list[str] = []
    tokens: list[int] = []
    async with open_world(*stored, sink) as world:
        await world.place((10, 20), (0, 1, 2))
        async with world.pipelines[3].engine.generate(request) as events:
            async for event in events:
                texts.append(event.text)
                if isinstance(event, Finished):
                    assert event.usage.failovers >= 2
                    assert event.usage.recomputed_tokens > 2 * length
                    continue
                tokens.append(event.token)
                match len(tokens):
                    case 3:  # the runner of the tail dies and is started again
                        await world.kill(2)
                        await world.place((10, 20), (0, 1, 2))
                    case 11:  # a rank moves, and all runners stay
                        await world.place((10, 20), (0, 3, 2))
                    case 22:  # other cuts, and in mid-replay the next death
                        await world.place((7,), (1, 2))
                        await trio.sleep(0.05)
                        await world.kill(1)
                        await world.place((10, 20), (0, 1, 2))
                    case 33:  # a whole new home
                        await world.place((), (3,))
        assert tokens == expected

        assert sink.journal is not None
        half = msgspec.structs.replace(sink.journal, tokens=sink.journal.tokens[: n // 2])
        await world.place((10, 20), (0, 1, 2))
        async with world.pipelines[1].engine.resume(half, 9) as events:
            again = [event async for event in events]
        assert [e.token for e in again if isinstance(e, Generated)] == expected[9:]
        assert [e.text for e in again] == texts[9:]
