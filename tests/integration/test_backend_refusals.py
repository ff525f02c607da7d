"""Everything that a backend must refuse, and what it must still do afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unsupported,
)
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CopySequence,
    FreeSequence,
    KvRange,
    OpenSequence,
    SequenceOp,
    ShiftSequence,
    StepInput,
    StepOutput,
    TrimSequence,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.model]

PART = Slice(28, 30, head=True)
N_CTX = 40
N_EMBD = 576
RNG = np.random.default_rng(1)
ROWS = RNG.standard_normal((64, N_EMBD)).astype(np.float32)


@pytest.fixture(scope="module")
def tail_file(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "tail.gguf"
    write_slice(bundled_model, PART, path)
    return path


@pytest.fixture(scope="module")
def loaded(tail_file: Path) -> Iterator[LlamaBackend]:
    with closing(LlamaBackend(tail_file, PART, n_ctx=N_CTX, n_seq=3, threads=1)) as backend:
        yield backend


@pytest.fixture
def backend(loaded: LlamaBackend) -> Iterator[LlamaBackend]:
    """A backend with sequence 0 open and ten tokens in it."""
    loaded.apply(OpenSequence(0, SamplingParams(temperature=0.0)))
    loaded.decode([step(0, 0, 10)])
    yield loaded
    for seq in range(3):
        try:
            loaded.apply(FreeSequence(seq))
        except InvalidRequest:
            continue


def step(seq: int, position: int, n: int, *, sample: bool = False) -> StepInput:
    tokens = np.arange(100 + position, 100 + position + n, dtype=np.int32)
    return StepInput(seq, position, tokens, ROWS[position : position + n], sample)


def refused(backend: LlamaBackend, *steps: StepInput) -> PyAgentError:
    with pytest.raises(PyAgentError) as caught:
        backend.decode(steps)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"seq": 3}, "bad_sequence"),
        ({"seq": -1}, "bad_sequence"),
        ({"seq": 2}, "no_sequence"),
        ({"position": 9}, "bad_step"),
        ({"position": 11}, "bad_step"),
        ({"tokens": np.zeros(0, np.int32)}, "bad_step"),
        ({"tokens": np.zeros(2, np.int64)}, "bad_step"),
        ({"tokens": np.zeros((1, 2), np.int32)}, "bad_step"),
        ({"tokens": np.array([0, -1], np.int32)}, "bad_step"),
        ({"tokens": np.array([0, 49152], np.int32)}, "bad_step"),
        ({"activations": None}, "bad_step"),
        ({"activations": ROWS[:1]}, "bad_step"),
        ({"activations": ROWS[:2, :5]}, "bad_step"),
        ({"activations": ROWS[:2].astype(np.float64)}, "bad_step"),
        ({"activations": np.full((2, N_EMBD), np.nan, np.float32)}, "not_finite"),
        ({"activations": np.full((2, N_EMBD), np.inf, np.float32)}, "not_finite"),
    ],
)
def test_a_bad_step_is_refused_and_changes_nothing(
    backend: LlamaBackend, changes: dict[str, object], code: str
) -> None:
    good = step(0, 10, 2, sample=True)
    bad = msgspec.structs.replace(good, **changes)
    assert refused(backend, bad).code == code
    backend.apply(OpenSequence(1))
    assert refused(backend, step(1, 0, 2), bad).code == code
    (output,) = backend.decode([good])
    assert len(output.sampled) == 1


def test_huge_but_finite_activations_are_computed(backend: LlamaBackend) -> None:
    rows = np.full((1, N_EMBD), 1e30, np.float32)
    backend.decode([msgspec.structs.replace(step(0, 10, 1), activations=rows)])


def test_a_batch_names_a_sequence_once_and_may_be_empty(backend: LlamaBackend) -> None:
    assert backend.decode([]) == []
    assert refused(backend, step(0, 10, 1), step(0, 10, 1)).code == "bad_step"


def test_sampling_needs_a_sequence_that_was_opened_for_it(backend: LlamaBackend) -> None:
    backend.apply(OpenSequence(1))
    assert refused(backend, step(1, 0, 2, sample=True)).code == "bad_step"
    assert backend.decode([step(1, 0, 2)]) == [StepOutput()]


def test_a_full_sequence_says_how_full_it_is(backend: LlamaBackend) -> None:
    error = refused(backend, step(0, 10, 31))
    assert isinstance(error, LimitExceeded)
    assert (error.code, error.facts) == ("kv_full", {"n_ctx": 40, "needed": 41})
    backend.decode([step(0, 10, 30)])
    assert refused(backend, step(0, 40, 1)).code == "kv_full"


@pytest.mark.parametrize(
    ("op", "error", "code"),
    [
        (OpenSequence(0), Conflict, "sequence_in_use"),
        (OpenSequence(3), InvalidRequest, "bad_sequence"),
        (OpenSequence(1, SamplingParams(temperature=-1.0)), InvalidRequest, "bad_parameter"),
        (OpenSequence(1, SamplingParams(logit_bias={49152: 1.0})), InvalidRequest, "bad_parameter"),
        (FreeSequence(1), InvalidRequest, "no_sequence"),
        (TrimSequence(1, 0), InvalidRequest, "no_sequence"),
        (TrimSequence(0, -1), InvalidRequest, "kv_range"),
        (CopySequence(1, 0, 0, 5), InvalidRequest, "no_sequence"),
        (CopySequence(0, 1, 0, 5), InvalidRequest, "no_sequence"),
        (CopySequence(0, 0, 0, 5), InvalidRequest, "kv_range"),
        (ShiftSequence(0, 0, 5, -1), InvalidRequest, "kv_range"),
        (ShiftSequence(0, 0, 5, 3), InvalidRequest, "kv_range"),
        (ShiftSequence(0, 5, 10, 31), InvalidRequest, "kv_range"),
    ],
)
def test_a_bad_operation_is_refused_and_changes_nothing(
    backend: LlamaBackend, op: SequenceOp, error: type[PyAgentError], code: str
) -> None:
    with pytest.raises(error) as caught:
        backend.apply(op)
    assert caught.value.code == code
    backend.decode([step(0, 10, 1)])


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (5, 5), (6, 5), (-1, 3), (10, 12)])
def test_a_range_without_cells_cannot_be_copied_or_exported(
    backend: LlamaBackend, start: int, stop: int
) -> None:
    backend.apply(OpenSequence(1))
    with pytest.raises(InvalidRequest) as caught:
        backend.apply(CopySequence(1, 0, start, stop))
    assert caught.value.code == "kv_range"
    with pytest.raises(InvalidRequest) as caught:
        backend.export_kv(0, start, stop)
    assert caught.value.code == "kv_range"


def test_shifted_cells_keep_their_content(backend: LlamaBackend) -> None:
    """There and back again is the same but for the rounding of two rotations."""
    before = backend.export_kv(0, 0, 10)
    backend.apply(ShiftSequence(0, 0, 10, 7))
    assert refused(backend, step(0, 10, 1)).code == "bad_step"
    moved = backend.export_kv(0, 7, 17)
    assert moved.layers[0].values == before.layers[0].values
    assert moved.layers[0].keys != before.layers[0].keys
    backend.apply(ShiftSequence(0, 7, 17, -7))
    after = backend.export_kv(0, 0, 10)
    for old, new in zip(before.layers, after.layers, strict=True):
        np.testing.assert_allclose(
            np.frombuffer(new.keys, "<f2").astype(np.float32),
            np.frombuffer(old.keys, "<f2").astype(np.float32),
            atol=0.1,
        )
    backend.decode([step(0, 10, 1)])


def bent(kv: KvRange, **changes: object) -> KvRange:
    return msgspec.structs.replace(kv, **changes)


def test_foreign_and_broken_kv_is_refused_and_changes_nothing(backend: LlamaBackend) -> None:
    kv = backend.export_kv(0, 0, 10)
    tokens = np.arange(100, 110, dtype=np.int32)
    first, second = kv.layers
    inf = np.full(len(first.values) // 2, np.inf, "<f2").tobytes()
    cases: list[tuple[KvRange, str]] = [
        (bent(kv, codec="llama.cpp/0.0.1/f16"), "kv_codec"),
        (bent(kv, codec="x" * 10_000), "kv_codec"),
        (bent(kv, stop=9), "kv_malformed"),
        (bent(kv, stop=0), "kv_range"),
        (bent(kv, start=-10, stop=0), "kv_range"),
        (bent(kv, start=35, stop=45), "kv_full"),
        (bent(kv, layers=()), "kv_malformed"),
        (bent(kv, layers=(first,)), "kv_malformed"),
        (bent(kv, layers=(second, first)), "kv_malformed"),
        (bent(kv, layers=(first, first)), "kv_malformed"),
        (bent(kv, layers=(first, bent_layer(second, keys=second.keys[:-1]))), "kv_malformed"),
        (bent(kv, layers=(bent_layer(first, values=b""), second)), "kv_malformed"),
        (bent(kv, layers=(bent_layer(first, values=inf), second)), "not_finite"),
    ]
    backend.apply(OpenSequence(1))
    for broken, code in cases:
        with pytest.raises(PyAgentError) as caught:
            backend.import_kv(1, broken, tokens)
        assert caught.value.code == code
    with pytest.raises(CorruptData):
        backend.import_kv(1, kv, tokens[:-1])
    with pytest.raises(InvalidRequest):
        backend.import_kv(0, kv, tokens)
    backend.import_kv(1, kv, tokens)
    ours, theirs = backend.decode([step(0, 10, 1), step(1, 10, 1)])
    assert ours == theirs
    assert backend.export_kv(1, 0, 11) == backend.export_kv(0, 0, 11)


def bent_layer(layer: msgspec.Struct, **changes: bytes) -> msgspec.Struct:
    return msgspec.structs.replace(layer, **changes)


def test_a_freed_sequence_leaves_nothing_for_the_next(backend: LlamaBackend) -> None:
    fresh = backend.export_kv(0, 0, 10)
    backend.apply(FreeSequence(0))
    backend.apply(OpenSequence(0))
    backend.decode([step(0, 0, 10)])
    assert backend.export_kv(0, 0, 10) == fresh


# ---- loading -------------------------------------------------------------------------------


def load(path: Path, part: Slice = PART, **changes: int) -> PyAgentError:
    numbers = {"n_ctx": 64, "n_seq": 1, "threads": 1} | changes
    with pytest.raises(PyAgentError) as caught:
        LlamaBackend(
            path,
            part,
            n_ctx=numbers["n_ctx"],
            n_seq=numbers["n_seq"],
            threads=numbers["threads"],
        ).close()
    return caught.value


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"n_ctx": 0}, "n_ctx"),
        ({"n_ctx": 8193}, "n_ctx"),
        ({"n_seq": 0}, "n_seq"),
        ({"n_seq": 65}, "n_seq"),
        ({"threads": 0}, "threads"),
        ({"threads": 100_000}, "threads"),
    ],
)
def test_numbers_out_of_range_are_named(
    tail_file: Path, changes: dict[str, int], parameter: str
) -> None:
    error = load(tail_file, **changes)
    assert (error.code, error.facts["parameter"]) == ("bad_parameter", parameter)


def test_a_file_with_other_layers_is_refused(tail_file: Path, bundled_model: Path) -> None:
    assert load(tail_file, Slice(0, 2, head=False)).code == "wrong_slice"
    assert load(bundled_model, PART).code == "wrong_slice"


def test_too_little_memory_is_refused_before_loading(tail_file: Path) -> None:
    with pytest.raises(LimitExceeded) as caught:
        LlamaBackend(tail_file, PART, n_ctx=8192, n_seq=64, threads=1, available=lambda: 700 << 20)
    error = caught.value
    assert error.code == "not_enough_memory"
    assert error.facts["kv"] == (8192 + 256) * 64 * 1536
    assert error.facts["available"] == 700 << 20


def test_missing_empty_cut_and_foreign_files_are_refused(tail_file: Path, tmp_path: Path) -> None:
    assert isinstance(load(tmp_path / "nothing.gguf"), NotFound)
    data = tail_file.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 24, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        error = load(path)
        assert isinstance(error, CorruptData)
        assert error.code == "gguf_truncated"
    path.write_bytes(b"\x7fELF" + data[4:])
    assert load(path).code == "gguf_malformed"


def test_what_llama_cpp_refuses_comes_with_its_words(tail_file: Path, tmp_path: Path) -> None:
    data = tail_file.read_bytes()
    path = tmp_path / "renamed.gguf"
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    error = load(path)
    assert isinstance(error, CorruptData)
    assert error.code == "model_refused"
    assert "blk.1.attn_q.weight" in error.message


def test_an_unknown_architecture_is_named(tail_file: Path, tmp_path: Path) -> None:
    data = tail_file.read_bytes()
    path = tmp_path / "unknown.gguf"
    # the name is as long as before, and so are the keys that begin with it
    path.write_bytes(data.replace(b"llama", b"lhama"))
    error = load(path)
    assert isinstance(error, Unsupported)
    assert error.code == "unsupported_architecture"
    assert "lhama" in error.message
