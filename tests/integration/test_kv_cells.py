"""Cells read from llama.cpp's memory are those that it exports itself, whatever happened before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    KV_ROWS,
    CopySequence,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    ResetSequences,
    SequenceOp,
    ShiftSequence,
    StepInput,
    Tokens,
    TrimSequence,
)
from pyagent_node.inference.llama import selftest
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.cache_view import CacheView
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.models.slicing import write_slice

pytestmark = [pytest.mark.slow, pytest.mark.model]

PART = Slice(3, 5, head=False)
N_SEQ = 4
N_CTX = 700
N_EMBD = 576


@pytest.fixture(scope="module")
def front(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "two.gguf"
    write_slice(bundled_model, PART, path)
    return path


@pytest.fixture
def pair(front: Path) -> Iterator[tuple[LlamaBackend, LlamaBackend]]:
    """Two of the same, the second of which knows no other way than whole sequences."""
    with ExitStack() as stack:

        def loaded() -> LlamaBackend:
            return stack.enter_context(
                closing(LlamaBackend(front, PART, n_ctx=N_CTX, n_seq=N_SEQ, threads=1))
            )

        direct = loaded()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selftest, "find_cache", lambda *_, **__: None)
            whole = loaded()
        yield direct, whole


class Reads:
    """Counts what is read from memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read = CacheView.read

        def counted(view: CacheView, seq: int, start: int, stop: int) -> list[tuple[bytes, bytes]]:
            self.count += 1
            return read(view, seq, start, stop)

        patch.setattr(CacheView, "read", counted)


def rows(position: int, n: int, seq: int, sample: int = 0) -> StepInput:
    rng = np.random.default_rng((position, n, seq, sample))
    tokens = rng.integers(0, 40_000, n).astype(np.int32)
    return StepInput(seq, position, tokens, rng.standard_normal((n, N_EMBD), np.float32), False)


def made_up(start: int, n: int, sample: int) -> tuple[KvRange, Tokens]:
    rng = np.random.default_rng((start, n, sample))

    def cells() -> bytes:
        return rng.standard_normal((n, 192), np.float32).astype("<f2").tobytes()

    layers = tuple(LayerKv(layer, cells(), cells()) for layer in range(PART.first, PART.last))
    return KvRange(KV_ROWS, start, start + n, layers), np.full(n, sample, np.int32)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_was_done_to_sequences_both_ways_read_the_same(
    pair: tuple[LlamaBackend, LlamaBackend], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    reads, rng = Reads(monkeypatch), random.Random(seed)
    held: list[list[int]] = [[] for _ in range(N_SEQ)]
    asked = 0
    for backend in pair:
        for seq in range(N_SEQ):
            backend.apply(OpenSequence(seq))

    def both(op: SequenceOp) -> None:
        for backend in pair:
            backend.apply(op)

    for turn in range(60):
        seq, other = rng.sample(range(N_SEQ), 2)
        at = held[seq]
        end = max(at, default=-1) + 1
        match rng.randrange(11):
            case 0 | 1 | 2 | 3 if end < N_CTX - 80:
                step = rows(end, rng.choice((1, 2, 5, 8, 40, 64)), seq, turn)
                first, second = (backend.decode([step])[0].activations for backend in pair)
                assert first is not None
                assert second is not None
                assert np.array_equal(first, second)
                at += range(end, end + len(step.tokens))
            case 4 if end:
                start = rng.randrange(end)
                both(TrimSequence(seq, start))
                held[seq] = [position for position in at if position < start]
            case 5 if held[other] == list(range(len(held[other]))) != [] == at:
                stop = rng.randrange(len(held[other])) + 1
                both(CopySequence(seq, other, 0, stop))
                held[seq] = list(range(stop))
            case 6 if end > 4 and rng.random() < 0.3:
                cut = rng.randrange(1, end)
                both(ShiftSequence(seq, cut, end, 3))
                held[seq] = [position + 3 * (position >= cut) for position in at]
            case 7 if rng.random() < 0.3:
                both(FreeSequence(seq))
                both(OpenSequence(seq))
                held[seq] = []
            case 8 if rng.random() < 0.1:
                both(ResetSequences())
                for each in range(N_SEQ):
                    both(OpenSequence(each))
                    held[each] = []
            case 9 | 10 if end < N_CTX - 200:
                kv, tokens = made_up(end, rng.choice((1, 64, 192)), turn)
                for backend in pair:
                    backend.import_kv(seq, kv, tokens)
                at += range(kv.start, kv.stop)
            case _:
                pass
        for each, positions in enumerate(held):
            if positions:
                start, stop = sorted(rng.sample(range(max(positions) + 2), 2))
                got = [exported(backend, each, start, stop) for backend in pair]
                asked += 1
                assert got[0] == got[1]
    assert asked / 4 < reads.count <= asked


def exported(backend: LlamaBackend, seq: int, start: int, stop: int) -> KvRange | str:
    try:
        return backend.export_kv(seq, start, stop)
    except PyAgentError as error:
        return error.code


def test_many_blocks_come_in_at_once_and_go_out_as_they_came(
    pair: tuple[LlamaBackend, LlamaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    direct, whole = pair
    step = rows(0, 512, 2)
    direct.apply(OpenSequence(2))
    direct.decode([step])
    kv = direct.export_kv(2, 0, 512)
    for backend in pair:
        backend.apply(OpenSequence(3))
        backend.import_kv(3, kv, step.tokens)
        assert backend.export_kv(3, 0, 512) == kv
    more = rows(512, 64, 3)
    for backend in pair:
        backend.decode([more])
    assert direct.export_kv(3, 448, 576) == whole.export_kv(3, 448, 576)
    assert reads.count == 3


@pytest.mark.parametrize("n_seq", [1, 3])
def test_appending_blocks_does_not_write_the_sequence_again(
    front: Path, monkeypatch: pytest.MonkeyPatch, n_seq: int
) -> None:
    written: list[int] = []
    write = LlamaContext.write_state

    def counted(context: LlamaContext, seq: int, data: NDArray[np.uint8]) -> None:
        written.append(len(data))
        write(context, seq, data)

    seq = n_seq - 1
    with closing(LlamaBackend(front, PART, n_ctx=N_CTX, n_seq=n_seq, threads=1)) as backend:
        monkeypatch.setattr(LlamaContext, "write_state", counted)
        backend.apply(OpenSequence(seq))
        parts = [made_up(start, 64, start) for start in range(0, 640, 64)]
        for kv, tokens in parts:
            backend.import_kv(seq, kv, tokens)
        assert len(written) == 1
        assert [backend.export_kv(seq, kv.start, kv.stop) for kv, _ in parts] == [
            kv for kv, _ in parts
        ]


def test_an_append_that_fails_leaves_the_sequence_as_it_was(
    pair: tuple[LlamaBackend, LlamaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, whole = pair
    step, (kv, tokens) = rows(0, 100, 1), made_up(100, 64, 5)
    for backend in pair:
        backend.apply(OpenSequence(1))
        backend.decode([step])
    with monkeypatch.context() as patch:
        patch.setattr(CacheView, "write", _fail)
        with pytest.raises(ZeroDivisionError):
            direct.import_kv(1, kv, tokens)
    more = rows(100, 8, 1)
    outputs = [backend.decode([more])[0].activations for backend in pair]
    assert outputs[0] is not None
    assert outputs[1] is not None
    assert np.array_equal(outputs[0], outputs[1])
    assert direct.export_kv(1, 0, 108) == whole.export_kv(1, 0, 108)


def test_after_a_call_that_failed_cells_are_read_through_llama_cpp(
    pair: tuple[LlamaBackend, LlamaBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    direct, _ = pair
    direct.apply(OpenSequence(0))
    direct.decode([rows(0, 20, 0)])
    before = direct.export_kv(0, 0, 20)
    assert reads.count == 1
    with monkeypatch.context() as patch:
        patch.setattr("pyagent_node.inference.stepping.calls._Work.note", _fail)
        with pytest.raises(ZeroDivisionError):
            direct.decode([rows(20, 5, 0)])
    assert direct.export_kv(0, 0, 20) == before
    assert reads.count == 1


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_cache_that_does_not_read_like_the_export_is_not_read(
    front: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CacheView.read

    def off_by_one(view: CacheView, seq: int, start: int, stop: int) -> list[tuple[bytes, bytes]]:
        return [(keys, values[::-1]) for keys, values in read(view, seq, start, stop)]

    monkeypatch.setattr(CacheView, "read", off_by_one)
    with closing(LlamaBackend(front, PART, n_ctx=N_CTX, n_seq=N_SEQ, threads=1)) as backend:
        monkeypatch.undo()
        reads = Reads(monkeypatch)
        assert backend.info.kv_portable
        backend.apply(OpenSequence(0))
        backend.decode([rows(0, 20, 0)])
        assert backend.export_kv(0, 3, 9).layers
        assert reads.count == 0
