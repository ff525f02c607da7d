"""Cells are given up: what is left, what is computed from it, the memory, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CopySequence,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    PruneSequence,
    ShiftSequence,
    StepInput,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.llama import cells, selftest
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.llama.kv_state import Cells, SequenceState, parse_state
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.runner import RunnerSpec, open_slice_runner
from pyagent_node.inference.stepping.sequences import SequenceLog

pytestmark = [pytest.mark.slow, pytest.mark.model]

PART = Slice(10, 13, head=False)
LAYERS = 3
N_CTX, N_SEQ, N_EMBD = 1100, 3, 576
N = 600
ROWS = np.random.default_rng(2).standard_normal((N_CTX, N_EMBD)).astype(np.float32)
TOKENS = np.arange(100, 100 + N_CTX, dtype=np.int32)
KEEP = ((0, 4), (90, 150), (400, 401), (560, N))
KEPT = np.concatenate([np.arange(*part) for part in KEEP])


@pytest.fixture(scope="module")
def file(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "middle.gguf"
    write_slice(bundled_model, PART, path)
    return path


@pytest.fixture(scope="module")
def loaded(file: Path) -> Iterator[LlamaBackend]:
    with closing(LlamaBackend(file, PART, n_ctx=N_CTX, n_seq=N_SEQ, threads=1)) as backend:
        yield backend


@pytest.fixture
def backend(loaded: LlamaBackend) -> Iterator[LlamaBackend]:
    yield loaded
    for seq in range(N_SEQ):
        try:
            loaded.apply(FreeSequence(seq))
        except InvalidRequest:
            continue


def step(seq: int, start: int, stop: int) -> StepInput:
    return StepInput(seq, start, TOKENS[start:stop], ROWS[start:stop], sample=False)


def fed(backend: LlamaBackend, seq: int = 0) -> None:
    backend.apply(OpenSequence(seq))
    for start in range(0, N, 512):
        backend.decode([step(seq, start, min(N, start + 512))])


def next_rows(backend: LlamaBackend, seq: int, start: int, n: int = 3) -> NDArray[np.float32]:
    found = [
        backend.decode([step(seq, at, at + 1)])[0].activations for at in range(start, start + n)
    ]
    return np.concatenate([rows for rows in found if rows is not None])


def state(backend: LlamaBackend, seq: int) -> Cells:
    """The cells that llama.cpp itself says a sequence has."""
    parsed = parse_state(backend._llama.read_state(seq), N_SEQ)
    assert parsed is not None
    return parsed.cells


def same(one: Cells, other: Cells) -> bool:
    rows = zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    return np.array_equal(one.positions, other.positions) and all(
        np.array_equal(a, b) for a, b in rows
    )


def test_the_kept_cells_are_there_bit_for_bit(backend: LlamaBackend) -> None:
    for seq in range(N_SEQ):
        fed(backend, seq)
    before, other = state(backend, 1), backend.export_kv(0, 0, N)
    backend.apply(PruneSequence(1, KEEP))
    assert same(state(backend, 1), before.pick(KEPT))
    backend.apply(PruneSequence(1, KEEP))  # once more is nothing
    assert same(state(backend, 1), before.pick(KEPT))
    assert [backend.export_kv(seq, 0, N) for seq in (0, 2)] == [other, other]
    next_rows(backend, 1, N)
    assert state(backend, 1).positions.tolist() == [*KEPT.tolist(), N, N + 1, N + 2]
    assert same(state(backend, 1).pick(np.arange(len(KEPT))), before.pick(KEPT))


def test_what_follows_sees_the_kept_cells_at_their_old_places(backend: LlamaBackend) -> None:
    fed(backend, 0)
    fed(backend, 1)
    backend.apply(PruneSequence(0, KEEP))
    # the same attention by another way: llama.cpp drops the other cells where they lie
    memory = api.llama_get_memory(backend._llama.handle)
    for (_, start), (stop, _) in pairwise(KEEP):
        assert api.llama_memory_seq_rm(memory, 1, start, stop)
    pruned, holed = (next_rows(backend, seq, N) for seq in (0, 1))
    fed(backend, 2)
    whole = next_rows(backend, 2, N)
    # the order of summing differs, in f16: what counts is that little else does
    assert np.linalg.norm(pruned - holed) < 0.05 * np.linalg.norm(pruned - whole)


def test_the_same_prune_gives_the_same_bits(backend: LlamaBackend) -> None:
    found = []
    for seq in (0, 2):
        fed(backend, seq)
        backend.apply(PruneSequence(seq, KEEP))
        found.append(next_rows(backend, seq, N, 20))
    assert np.array_equal(*found)


def test_memory_goes_back_to_the_system(backend: LlamaBackend) -> None:
    for seq in range(N_SEQ):
        fed(backend, seq)
    before = [backend.kv_usage(seq) for seq in range(N_SEQ)]
    assert {usage.cells for usage in before} == {N}
    each = backend.info.kv_bytes_per_token
    backend.apply(PruneSequence(1, KEEP))
    after = [backend.kv_usage(seq) for seq in range(N_SEQ)]
    assert (after[1].cells, after[1].bytes, after[1].pruned) == (len(KEPT), len(KEPT) * each, True)
    assert (before[1].bytes, before[1].pruned) == (N * each, False)
    if sys.platform != "linux":
        assert after[1].resident is None
        return
    room = 2 * LAYERS * 2 * 4096  # a page at each end of each layer's keys and values
    assert after[1].resident is not None
    assert after[1].resident <= after[1].bytes + room
    kept = [after[seq].resident or 0 for seq in (0, 2)]
    assert min(kept) >= N * each
    next_rows(backend, 1, N, 60)
    grown = backend.kv_usage(1)
    assert grown.resident is not None
    assert after[1].resident < grown.resident <= grown.bytes + room + 256 * each


def test_a_freed_slot_is_whole_again(backend: LlamaBackend) -> None:
    fed(backend, 0)
    reference, expected = backend.export_kv(0, 0, N), next_rows(backend, 0, N)
    for heal in (FreeSequence(1), TrimSequence(1, 0)):
        fed(backend, 1)
        backend.apply(PruneSequence(1, ((N - 1, N),)))
        backend.apply(heal)
        if isinstance(heal, TrimSequence):
            backend.apply(FreeSequence(1))
        fed(backend, 1)
        assert backend.export_kv(1, 0, N) == reference
        assert np.array_equal(next_rows(backend, 1, N), expected)
        assert not backend.kv_usage(1).pruned
        backend.apply(FreeSequence(1))


def test_a_pruned_sequence_gives_nothing_away(backend: LlamaBackend) -> None:
    fed(backend, 0)
    backend.apply(OpenSequence(1))
    backend.apply(PruneSequence(0, KEEP))
    next_rows(backend, 0, N)

    attempts: list[Callable[[], object]] = [
        lambda: backend.export_kv(0, 0, 4),
        lambda: backend.export_kv(0, N, N + 2),
        lambda: backend.apply(CopySequence(1, 0, 0, 4)),
        lambda: backend.apply(ShiftSequence(0, 0, 4, 1)),
        lambda: backend.apply(TrimSequence(0, 200)),
    ]
    for attempt in attempts:
        with pytest.raises(Conflict) as caught:
            attempt()
        assert caught.value.code == "kv_pruned"
    backend.apply(TrimSequence(0, N + 1))
    backend.apply(TrimSequence(0, 130))  # its last cells then are some that were kept
    assert state(backend, 0).positions.tolist() == [*range(4), *range(90, 130)]
    next_rows(backend, 0, 130, 1)
    with pytest.raises(Conflict):
        backend.export_kv(0, 130, 131)


@pytest.mark.parametrize(
    "keep", [(), ((0, 4),), ((5, 4), (4, N)), ((0, N + 1),), ((-3, N),), ((0, 2**62),)]
)
def test_what_cannot_be_kept_changes_nothing(
    backend: LlamaBackend, keep: tuple[tuple[int, int], ...]
) -> None:
    fed(backend)
    before = backend.export_kv(0, 0, N)
    with pytest.raises(InvalidRequest) as caught:
        backend.apply(PruneSequence(0, keep))
    assert caught.value.code == "kv_range"
    assert backend.export_kv(0, 0, N) == before
    for seq in (1, N_SEQ, -1):
        with pytest.raises(InvalidRequest):
            backend.apply(PruneSequence(seq, ((0, 1),)))
    backend.apply(OpenSequence(1))
    with pytest.raises(InvalidRequest):
        backend.apply(PruneSequence(1, ((0, 1),)))  # it has no cells


def test_where_llama_cpp_refuses_the_sequence_is_empty(
    backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(backend)
    backend.apply(WatchSequence(0))

    def fails(*_: object) -> None:
        raise Unavailable("no", code="kv_failed")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "write_state", fails)
        with pytest.raises(Unavailable):
            backend.apply(PruneSequence(0, KEEP))
    assert backend.kv_usage(0).cells == 0
    assert len(backend.attention(0).positions) == 0
    backend.decode([step(0, 0, 9)])


def test_where_there_is_no_memory_for_it_the_sequence_stays_whole(
    backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(backend)
    before = state(backend, 0)

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cells, "build_state", fails)
        with pytest.raises(MemoryError):
            backend.apply(PruneSequence(0, KEEP))
    assert same(state(backend, 0), before)
    backend.apply(PruneSequence(0, KEEP))
    assert same(state(backend, 0), before.pick(KEPT))


def test_cells_in_another_order_are_put_into_that_of_their_positions(
    backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(backend)
    before = state(backend, 0)
    read = cells.CellStore._state

    def mixed(store: cells.CellStore, log: SequenceLog) -> SequenceState:
        found = read(store, log)
        order = np.random.default_rng(1).permutation(N).astype(np.intp)
        return found._replace(cells=found.cells.pick(order))

    with monkeypatch.context() as patch:
        patch.setattr(cells.CellStore, "in_order", lambda *_: False)
        patch.setattr(cells.CellStore, "_state", mixed)
        backend.apply(PruneSequence(0, KEEP))
    assert same(state(backend, 0), before.pick(KEPT))


def test_a_slot_on_which_a_call_has_failed_is_watched_and_measured_behind_a_prune(
    backend: LlamaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has its slot next asks for it to be watched, and must not be refused."""

    def fails(*_: object, **__: object) -> None:
        raise Unavailable("no", code="decode_failed")

    backend.apply(OpenSequence(0))
    with monkeypatch.context() as patch:
        patch.setattr(LlamaContext, "decode", fails)
        with pytest.raises(Unavailable):
            backend.decode([step(0, 0, 9)])
    backend.apply(FreeSequence(0))
    backend.apply(OpenSequence(0))
    backend.apply(WatchSequence(0, every=1, window=4))
    backend.decode([step(0, 0, 512)])
    backend.decode([step(0, 512, N)])
    found = backend.attention(0)
    assert (len(found.positions), found.rows) == (N, 0)
    backend.apply(PruneSequence(0, KEEP))
    backend.apply(WatchSequence(0, every=1, window=4))
    next_rows(backend, 0, N)
    found = backend.attention(0)
    assert (len(found.positions), found.rows) == (len(KEPT) + 3, 3)
    assert found.seen[: len(KEPT)].tolist() == [3] * len(KEPT)


def test_measuring_goes_on_behind_a_prune(backend: LlamaBackend) -> None:
    fed(backend)
    backend.apply(WatchSequence(0))
    next_rows(backend, 0, N, 4)
    before = backend.attention(0)
    backend.apply(PruneSequence(0, ((0, 4), (590, N + 4))))
    after = backend.attention(0)
    kept = np.flatnonzero(np.isin(before.positions, after.positions))
    assert after.positions.tolist() == [*range(4), *range(590, N + 4)]
    assert np.array_equal(after.mass, before.mass[:, kept])
    assert np.array_equal(after.seen, before.seen[kept])
    next_rows(backend, 0, N + 4, 2)
    grown = backend.attention(0)
    assert grown.rows == 6
    # each row spreads its attention over what is left
    more = grown.mass[:, : len(kept)].sum() + grown.mass[:, len(kept) :].sum() - after.mass.sum()
    assert more == pytest.approx(2 * LAYERS, abs=1e-3)


def sparse(kv: KvRange, kept: tuple[tuple[int, int], ...]) -> KvRange:
    """Only the rows of some positions."""
    cells = np.concatenate([np.arange(*part) for part in kept]) - kv.start
    count = kv.stop - kv.start

    def rows(data: bytes) -> bytes:
        return np.frombuffer(data, np.uint8).reshape(count, -1)[cells].tobytes()

    layers = tuple(LayerKv(x.layer, rows(x.keys), rows(x.values)) for x in kv.layers)
    return KvRange(kv.codec, kv.start, kv.stop, layers, kept)


def test_cells_with_gaps_can_be_taken_in(backend: LlamaBackend) -> None:
    fed(backend, 0)
    kv = backend.export_kv(0, 0, N)
    backend.apply(OpenSequence(1))
    backend.import_kv(1, sparse(kv, KEEP), TOKENS[:N])
    backend.apply(PruneSequence(0, KEEP))
    assert same(state(backend, 0), state(backend, 1))
    assert np.array_equal(next_rows(backend, 0, N), next_rows(backend, 1, N))
    with pytest.raises(Conflict):
        backend.export_kv(1, 0, 4)
    # behind cells that are there, and followed by some without gaps
    backend.apply(OpenSequence(2))
    backend.decode([step(2, 0, 90)])
    later = sparse(part(kv, 90, 500), ((90, 100), (499, 500)))
    backend.import_kv(2, later, TOKENS[90:500])
    backend.import_kv(2, part(kv, 500, N), TOKENS[500:N])
    assert state(backend, 2).positions.tolist() == [*range(100), *range(499, N)]
    assert backend.kv_usage(2).pruned
    next_rows(backend, 2, N)


def part(kv: KvRange, start: int, stop: int) -> KvRange:
    def rows(data: bytes) -> bytes:
        return np.frombuffer(data, np.uint8).reshape(kv.stop - kv.start, -1)[start:stop].tobytes()

    layers = tuple(LayerKv(x.layer, rows(x.keys), rows(x.values)) for x in kv.layers)
    return KvRange(kv.codec, start, stop, layers)


def test_gaps_that_do_not_fit_are_refused(backend: LlamaBackend) -> None:
    fed(backend, 0)
    kv = backend.export_kv(0, 0, N)
    made = sparse(kv, KEEP)
    backend.apply(OpenSequence(1))
    wrong: list[KvRange] = [
        KvRange(kv.codec, 0, N, made.layers, kept)
        for kept in (((0, 4),), ((0, 4), (2, N)), ((0, 2**40),), ((0, N),), ((4, 4), (5, N)))
    ]
    wrong.append(KvRange(kv.codec, 0, N, kv.layers, KEEP))
    for each in wrong:
        with pytest.raises((InvalidRequest, CorruptData)):
            backend.import_kv(1, each, TOKENS[:N])
    with pytest.raises(CorruptData):
        backend.import_kv(1, made, TOKENS[: len(KEPT)])  # all tokens are wanted
    assert backend.kv_usage(1).cells == 0


def test_a_slice_whose_cells_are_hidden_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "find_cache", lambda *_, **__: None)
    with closing(LlamaBackend(file, PART, n_ctx=64, n_seq=1, threads=1)) as backend:
        assert not backend.info.prunes
        backend.apply(OpenSequence(0))
        backend.decode([step(0, 0, 9)])
        gaps = KvRange("rows/1/f16", 9, 12, (), ((11, 12),))
        for attempt in (
            lambda: backend.apply(WatchSequence(0)),
            lambda: backend.apply(PruneSequence(0, ((8, 9),))),
            lambda: backend.attention(0),
            lambda: backend.import_kv(0, gaps, TOKENS[9:12]),
        ):
            with pytest.raises(Unsupported) as caught:
                attempt()
            assert caught.value.code == "no_pruning"
        usage = backend.kv_usage(0)
        assert (usage.cells, usage.resident, usage.pruned) == (9, None, False)


async def test_a_runner_prunes_between_steps(file: Path, loaded: LlamaBackend) -> None:
    spec = RunnerSpec(str(file), PART, n_ctx=N_CTX, n_seq=N_SEQ, threads=1)
    async with open_slice_runner(spec) as runner:
        assert runner.info.prunes
        await runner.apply([OpenSequence(0), OpenSequence(1), WatchSequence(0, window=4)])
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                # a prompt goes piece by piece: between the two the sequence has its first 512
                nursery.start_soon(runner.decode, [step(0, 0, N)])
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(runner.apply, [PruneSequence(0, ((0, 4), (500, 512)))])
        usage = await runner.kv_usage(0)
        assert (usage.cells, usage.pruned) == (4 + 12 + N - 512, True)
        with pytest.raises(InvalidRequest):
            await runner.apply([PruneSequence(0, ((0, N),))])
        found = await runner.attention(0)
        assert found.mass.shape == (LAYERS, usage.cells)
        assert found.rows == 8
        with pytest.raises(InvalidRequest):
            await runner.attention(1)
        with pytest.raises(Conflict):
            await runner.export_kv(0, 0, 4)
        fed(loaded)
        kv = loaded.export_kv(0, 0, N)
        await runner.import_kv(1, sparse(kv, KEEP), TOKENS[:N])
        assert (await runner.kv_usage(1)).cells == len(KEPT)
        loaded.apply(FreeSequence(0))
