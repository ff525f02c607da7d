"""Landmarks of pieces joined into prompts on the real model, by one rank or three."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pyagent_node.base.types import Digest, PeerId
from pyagent_node.inference.backend import KvRange, LayerKv, PruneSequence, Tokens
from pyagent_node.inference.generation import Finished, Generated, GenerationRequest, Usage
from pyagent_node.inference.kv import landmarks
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.landmarks import cells_of
from pyagent_node.inference.kv.pieces import JoinPlan, Piece
from pyagent_node.inference.kv.port import Wanted
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.runner import SliceRunner
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_landmarks import is_landmarks
from pyagent_node.simulations.shelf import ShelfFaults, ToyShelf, ToyShelves

from .real_pipeline import NAME, RealPipeline, open_real_pipeline
from .whole_model import WholeModel

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

N_CTX = 640
SKIP = 8
FAR = PeerId("far")
DEAR = 1e6
"""Seconds: more than computing takes on any machine."""
PARTS = (
    "You answer from the sources.\n\n",
    "log.txt\n"
    + "The ship left Harwich on the third of May with forty barrels of salted fish. " * 8,
    "cook.txt\n" + "She baked bread every other morning, and sang in a language of her own. " * 9,
    "Question: what was in the barrels?\nAnswer:",
)
Spans = tuple[tuple[int, int], ...]


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have landmarks cost nothing, wherever they are."""
    true = ToyShelf.cost

    async def cost(shelf: ToyShelf, wanted: Wanted) -> float:
        found = await true(shelf, wanted)
        return min(found, 0.001) if found == DEAR and is_landmarks(wanted.cells) else found

    monkeypatch.setattr(ToyShelf, "cost", cost)


@pytest.fixture(scope="module")
def parts(bundled_model: Path) -> list[tuple[int, ...]]:
    """Return the tokens of a prompt in four parts; the two in the middle are pieces."""
    whole = WholeModel(str(bundled_model), N_CTX)
    tokens = [tuple(whole.tokenize(text)) for text in PARTS]
    whole.close()
    assert all(128 <= len(each) < 200 for each in tokens[1:3])
    return tokens


@pytest.fixture(scope="module")
def stored(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelStore, Digest]:
    """Return a store with the model in it."""
    store = ModelStore(tmp_path_factory.mktemp("models"))
    return store, store.add_file(bundled_model, about=About(NAME)).digest


def asked(
    parts: Sequence[tuple[int, ...]], *, lossy: bool = True, join: bool = True
) -> GenerationRequest:
    """Return a request with both pieces, whose budget is more than the prompt has."""
    tokens: list[int] = []
    pieces: list[Piece] = []
    for number, part in enumerate(parts):
        if number in {1, 2}:
            pieces.append(Piece(len(tokens), len(tokens) + len(part)))
        tokens += part
    return GenerationRequest(
        NAME,
        tokens=tuple(tokens),
        max_tokens=6,
        ignore_eos=True,
        sampling=SamplingParams(temperature=0.0, logprobs=True),
        join=JoinPlan(tuple(pieces), skip=SKIP) if join else None,
        pruning=Pruning(4096) if lossy else None,
        prompt_cache=False,
    )


async def answer(
    at: RealPipeline, request: GenerationRequest
) -> tuple[list[tuple[int, float | None]], Usage]:
    """Return the tokens of an answer with their log-probabilities, and what it took."""
    tokens: list[tuple[int, float | None]] = []
    async with at.head.engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Generated):
                tokens.append((event.token, event.logprob))
            elif isinstance(event, Finished):
                usage = event.usage
    return tokens, usage


@asynccontextmanager
async def made(
    stored: tuple[ModelStore, Digest], boundaries: Sequence[int], parts: list[tuple[int, ...]]
) -> AsyncIterator[tuple[RealPipeline, ToyShelves]]:
    """Run ranks whose pieces, and landmarks, are made, and lie far away."""
    shelves = ToyShelves(random.Random(0), ShelfFaults(away=DEAR))
    async with open_real_pipeline(*stored, boundaries, n_ctx=N_CTX, n_seq=4, shelves=shelves) as at:
        at.head.engine.pieces.landmarks = True
        _, usage = await answer(at, asked(parts))
        assert usage.joined_landmarks == 0  # whole pieces are there where they were made
        assert usage.joined_tokens == len(parts[1]) + len(parts[2]) - 2 * SKIP
        assert [view.marked for rank in at.ranks for view in rank.stages.views()] == [2] * len(
            at.ranks
        )
        assert all(not shelf.sessions for shelf in shelves.shelves.values())
        far = shelves.of(FAR).held
        for shelf in shelves.shelves.values():
            if shelf.held is not far:
                far.update(shelf.held)
                shelf.held.clear()
        yield at, shelves


class Watched:
    """What goes into the slots of a runner; ``spans`` are what whole pieces are pruned to."""

    def __init__(self, runner: SliceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: list[KvRange] = []
        self.spans: dict[int, Spans] = {}
        self._kept: list[tuple[int, int]] = []
        self._runner, self._import = runner, runner.import_kv
        monkeypatch.setattr(runner, "import_kv", self.import_kv)

    async def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Import cells, and give up those that landmarks lacked."""
        self.ranges.append(kv)
        await self._import(seq, kv, tokens)
        spans = self.spans.get(kv.start)
        if spans is not None:
            at = self._kept[-1][1] if self._kept else 0
            self._kept += [(at, kv.start), *spans]
            await self._runner.apply([PruneSequence(seq, joined(self._kept))])


def joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Return spans in order as ranges that do not touch."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


@pytest.mark.parametrize("boundaries", [(), (7, 19)])
async def test_they_give_the_tokens_of_whole_pieces_pruned_to_the_same_cells(
    stored: tuple[ModelStore, Digest],
    parts: list[tuple[int, ...]],
    boundaries: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(landmarks, "LEVEL", "f16")  # else they are rounded
    async with made(stored, boundaries, parts) as (at, shelves):
        watched = [Watched(runner, monkeypatch) for runner in at.runners]
        tokens, usage = await answer(at, asked(parts))
        assert usage.joined_landmarks == usage.joined_tokens > 0
        lost = sum(len(part) - SKIP - cells_of(len(part)) for part in parts[1:3])
        assert usage.evicted is not None
        assert usage.evicted.cells == lost * len(at.ranks)
        for each in watched:
            assert len(each.ranges) == 2
            assert all(kv.kept for kv in each.ranges)
            each.spans = {kv.start: kv.kept for kv in each.ranges}
        if len(watched) > 1:  # every rank goes by its own layers
            assert len({tuple(each.spans.values()) for each in watched}) > 1
        assert sum(view.joined_landmarks for r in at.ranks for view in r.stages.views()) == (
            usage.joined_landmarks * len(at.ranks)
        )
        shelves.faults.away = 0.0
        again, usage = await answer(at, asked(parts))
        assert usage.joined_landmarks == 0
        assert all(not kv.kept for each in watched for kv in each.ranges[2:])
        assert again == tokens
        for each in watched:
            each.spans = {}
        shelves.faults.away = DEAR
        exact, usage = await answer(at, asked(parts, lossy=False))  # who asks for no loss
        assert usage.joined_landmarks == 0
        assert usage.joined_tokens > 0
        assert exact != tokens
        if len(at.ranks) > 1:
            await lacking_and_damaged(at, shelves, parts)


async def lacking_and_damaged(
    at: RealPipeline, shelves: ToyShelves, parts: list[tuple[int, ...]]
) -> None:
    """Check that a rank without landmarks takes whole pieces, and computes damaged ones."""
    far, last = shelves.of(FAR).held, at.placement.ranks[-1].slice
    few = {name: kv for name, kv in far.items() if is_landmarks(name[3])}
    for name in few:
        if name[1] >= last.first:
            del far[name]
    before = [view.joined_landmarks for rank in at.ranks for view in rank.stages.views()]
    _, usage = await answer(at, asked(parts))
    assert usage.joined_landmarks == usage.joined_tokens > 0  # one rank is enough
    after = [view.joined_landmarks for rank in at.ranks for view in rank.stages.views()]
    more = usage.joined_tokens
    assert [b - a for a, b in zip(before, after, strict=True)] == [more, more, 0]
    rng = random.Random(1)
    for name, kv in few.items():
        rows = bytearray(kv.values)
        rows[rng.randrange(len(rows))] ^= 1
        far[name] = LayerKv(kv.layer, kv.keys, bytes(rows))
    plain, _ = await answer(at, asked(parts, join=False))
    tokens, usage = await answer(at, asked(parts))
    assert usage.joined_tokens == usage.joined_landmarks == 0
    assert tokens == plain
    assert all(view.unfit for rank in at.ranks for view in rank.stages.views())
