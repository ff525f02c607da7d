"""Landmarks of a chunk on the real model: taken in, they are what a prune of the whole leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.errors import Conflict
from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.context_landmarks import FULL, Arm, measure
from pyagent_node.inference.backend import (
    FreeSequence,
    KvRange,
    OpenSequence,
    PruneSequence,
    StepInput,
    Tokens,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.chunks import alone, moved_to
from pyagent_node.inference.kv.landmarks import cells_of, chosen, picked, spans_at
from pyagent_node.inference.kv.pieces import Piece
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.sharding.kv_codec import EXACT
from pyagent_node.sharding.kv_landmarks import pack, unpack

pytestmark = [pytest.mark.slow, pytest.mark.model]

SKIP, SIZE, AT = 16, 200, 40
HEAD, CHUNK, TAIL = 0, 1, 2
TOKENS: Tokens = np.random.default_rng(5).integers(50, 40_000, AT + SIZE).astype(np.int32)
CELLS = cells_of(SIZE)
ASKED: Tokens = np.arange(900, 908, dtype=np.int32)


@pytest.fixture(scope="module")
def backend(bundled_model: Path) -> Iterator[LlamaBackend]:
    part = Slice(0, 30, head=True)
    with closing(LlamaBackend(bundled_model, part, n_ctx=640, n_seq=3, threads=1)) as made:
        for seq in (HEAD, CHUNK, TAIL):
            made.apply(OpenSequence(seq))
        yield made


def feed(backend: LlamaBackend, seq: int, tokens: Tokens, position: int) -> None:
    backend.decode([StepInput(seq, position, tokens, None, sample=False)])


@pytest.fixture(scope="module")
def whole(backend: LlamaBackend) -> tuple[KvRange, KvRange]:
    """Return the cells of a chunk behind its first tokens: all, and the landmarks."""
    own = TOKENS[AT:]
    padded = alone(own, Piece(0, SIZE))
    feed(backend, CHUNK, padded, 0)
    before = backend.export_kv(CHUNK, 0, len(padded))
    backend.apply(WatchSequence(CHUNK, 1, SIZE))
    feed(backend, CHUNK, own, len(padded))
    found = backend.attention(CHUNK)
    backend.apply(WatchSequence(CHUNK, 0))
    backend.apply(TrimSequence(CHUNK, len(padded)))
    assert backend.export_kv(CHUNK, 0, len(padded)) == before  # reading on changes no bit
    assert found.rows == SIZE
    best = chosen(
        found.positions, found.mass.sum(0), found.seen, start=SKIP, stop=SIZE, cells=CELLS
    )
    rest = part_of(before, SKIP, SIZE)
    return rest, picked(rest, best)


def join(backend: LlamaBackend, seq: int, kv: KvRange) -> None:
    backend.apply(FreeSequence(seq))
    backend.apply(OpenSequence(seq))
    feed(backend, seq, TOKENS[: AT + SKIP], 0)
    shape, start = backend.info.kv_shape, AT + SKIP
    assert shape is not None
    moved = KvRange(
        kv.codec, start, AT + SIZE, tuple(moved_to(kv, start, shape)), spans_at(kv, start)
    )
    backend.import_kv(seq, moved, TOKENS[start:])


def test_they_are_what_a_prune_of_the_whole_chunk_leaves(
    backend: LlamaBackend, whole: tuple[KvRange, KvRange]
) -> None:
    every, best = whole
    join(backend, HEAD, every)
    backend.apply(PruneSequence(HEAD, ((0, AT + SKIP), *spans_at(best, AT + SKIP))))
    join(backend, TAIL, best)
    assert backend.kv_usage(TAIL).cells == AT + SKIP + CELLS
    pruned, taken = backend.score(ASKED, HEAD), backend.score(ASKED, TAIL)
    assert np.array_equal(pruned, taken)


def test_nothing_of_such_a_sequence_gets_the_name_of_exact_blocks(
    backend: LlamaBackend, whole: tuple[KvRange, KvRange]
) -> None:
    join(backend, TAIL, whole[1])
    assert backend.kv_usage(TAIL).pruned
    for start, stop in ((0, AT), (0, AT + SIZE), (AT + SIZE - 1, AT + SIZE)):
        with pytest.raises(Conflict) as caught:
            backend.export_kv(TAIL, start, stop)
        assert caught.value.code == "kv_pruned"
    feed(backend, TAIL, ASKED, AT + SIZE)  # and it goes on
    with pytest.raises(Conflict):
        backend.export_kv(TAIL, AT + SIZE, AT + SIZE + len(ASKED))


def test_their_blocks_bring_every_bit_back(
    backend: LlamaBackend, whole: tuple[KvRange, KvRange]
) -> None:
    best, shape = whole[1], backend.info.kv_shape
    assert shape is not None
    at = np.concatenate([np.arange(*span, dtype=np.int32) for span in best.kept])
    for layer in best.layers:
        block = pack(EXACT, layer.keys, layer.values, places=at, tokens=SIZE, shape=shape)
        found = unpack(EXACT, block, shape=shape)
        assert found.rows == (layer.keys, layer.values)
        assert 3 * len(block) < SIZE * 2 * shape.row_bytes


def test_the_command_measures_every_form(bundled_model: Path) -> None:
    whole, short, small = Arm("whole"), Arm("probe", 64), Arm("probe", 64, "int4")
    arms = (whole, short, small)
    report = measure(bundled_model, prompts=1, chunks=1, size=200, threads=1, arms=arms)
    rows = {(row.way, row.cells, row.level): row for row in report.rows}
    assert set(rows) == {FULL, *arms}
    assert rows[FULL].from_full == rows[whole].from_whole == 0
    assert rows[short].bytes < rows[whole].bytes / 3
    assert rows[small].bytes < rows[short].bytes / 3
