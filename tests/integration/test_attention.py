"""Measured attention is the model's own: against NumPy, from exported cells and observed queries.

The reference takes the queries from a callback written in Python, in a context of its own, and the
keys from an export.  That it is the right attention is seen from its product with the values, which
llama.cpp computes itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import pytest
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    CellAttention,
    FreeSequence,
    OpenSequence,
    ShiftSequence,
    StepInput,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.model]

LAYERS, HEADS, KV_HEADS, WIDTH = 30, 9, 3, 64
N = 40
WINDOW = 6
TOKENS = np.random.default_rng(3).integers(100, 40_000, N + 20).astype(np.int32)

LIBRARIES = (Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*")
GGML = ctypes.CDLL(str(min(LIBRARIES, key=lambda path: len(path.name))))
GGML.ggml_get_name.argtypes, GGML.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
GGML.ggml_nbytes.argtypes, GGML.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
GGML.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_size_t] * 2


class Observed(NamedTuple):
    """What a callback saw of the prompt: all forms of each layer's queries, what attention gave."""

    queries: dict[str, list[NDArray[np.float32]]]
    outputs: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def backend(bundled_model: Path) -> Iterator[LlamaBackend]:
    whole = Slice(0, LAYERS, head=True)
    with closing(LlamaBackend(bundled_model, whole, n_ctx=600, n_seq=2, threads=1)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def observed(bundled_model: Path, backend: LlamaBackend) -> Observed:
    del backend  # it has started the library
    seen = Observed({}, {})

    @api.ggml_backend_sched_eval_callback
    def note(tensor: int, ask: bool, user_data: object) -> bool:
        del user_data
        name = GGML.ggml_get_name(tensor).decode()
        if not name.startswith(("Qcur-", "kqv_out-")) or " " in name:
            return not ask
        if not ask:
            piece = np.empty((N, HEADS, WIDTH), np.float32)
            assert GGML.ggml_nbytes(tensor) == piece.nbytes
            GGML.ggml_backend_tensor_get(tensor, piece.ctypes.data, 0, piece.nbytes)
            if name.startswith("Q"):
                seen.queries.setdefault(name, []).append(piece)
            else:
                seen.outputs[name] = piece
        return True

    model: Any = api.llama_model_load_from_file(
        str(bundled_model).encode(), api.llama_model_default_params()
    )
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cb_eval = note
    context = api.llama_init_from_model(model, params)
    batch = api.llama_batch_init(N, 0, 1)
    try:
        batch.n_tokens = N
        for i in range(N):
            batch.token[i], batch.pos[i], batch.logits[i] = int(TOKENS[i]), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert api.llama_decode(context, batch) == 0
    finally:
        api.llama_batch_free(batch)
        api.llama_free(context)
        api.llama_model_free(model)
    return seen


def step(seq: int, start: int, stop: int) -> StepInput:
    return StepInput(seq, start, TOKENS[start:stop], None, sample=stop > N - 1)


def fed(backend: LlamaBackend, *, watch: WatchSequence | None = None, seq: int = 0) -> None:
    backend.apply(OpenSequence(seq, SamplingParams()))
    if watch is not None:
        backend.apply(watch)
    backend.decode([step(seq, 0, N)])


@pytest.fixture(autouse=True)
def emptied(backend: LlamaBackend) -> Iterator[None]:
    yield
    for seq in range(2):
        try:
            backend.apply(FreeSequence(seq))
        except InvalidRequest:
            continue


def weights(
    queries: NDArray[np.float32], keys: NDArray[np.float32], first: int
) -> NDArray[np.float64]:
    """Causal attention of rows from ``first`` on, shape (rows, heads, cells)."""
    shared = np.repeat(keys.astype(np.float64), HEADS // KV_HEADS, axis=1)
    scores = np.einsum("rhw,chw->rhc", queries.astype(np.float64), shared) / np.sqrt(WIDTH)
    rows, cells = np.arange(first, first + len(queries)), np.arange(len(keys))
    scores[np.broadcast_to((cells > rows[:, None])[:, None], scores.shape)] = -np.inf
    scores -= scores.max(axis=2, keepdims=True)
    made: NDArray[np.float64] = np.exp(scores)
    return made / made.sum(axis=2, keepdims=True)


def cells_of(backend: LlamaBackend, layer: int, *, values: bool) -> NDArray[np.float32]:
    kv = backend.export_kv(0, 0, N).layers[layer]
    rows = np.frombuffer(kv.values if values else kv.keys, "<f2")
    return rows.reshape(N, KV_HEADS, WIDTH).astype(np.float32)


def test_the_reference_is_what_llama_cpp_attends_to(
    backend: LlamaBackend, observed: Observed
) -> None:
    fed(backend)
    for layer in (0, 13, LAYERS - 1):
        keys, values = (cells_of(backend, layer, values=v) for v in (False, True))
        shared = np.repeat(values, HEADS // KV_HEADS, axis=1)
        forms = [
            np.einsum("rhc,chw->rhw", weights(form, keys, 0), shared)
            for form in observed.queries[f"Qcur-{layer}"]
        ]
        theirs = observed.outputs[f"kqv_out-{layer}"]
        off = [float(np.abs(form - theirs).max() / np.abs(theirs).max()) for form in forms]
        assert off[-1] < 0.01
        assert off[0] > 0.05, "queries that are not turned by position are other ones"


def test_it_is_that_of_the_reference(backend: LlamaBackend, observed: Observed) -> None:
    fed(backend, watch=WatchSequence(0, window=WINDOW))
    found = backend.attention(0)
    assert found.rows == WINDOW
    assert found.positions.tolist() == list(range(N))
    blind = np.maximum(0, np.arange(N) - (N - WINDOW))
    assert found.seen.tolist() == (WINDOW - blind).tolist()
    first, peaks = N - WINDOW, np.zeros((WINDOW, N))
    for layer in range(LAYERS):
        queries = observed.queries[f"Qcur-{layer}"][-1][first:]
        wanted = weights(queries, cells_of(backend, layer, values=False), first)
        assert np.abs(found.mass[layer] - wanted.mean(axis=1).sum(axis=0)).max() < 1e-5
        peaks = np.maximum(peaks, wanted.max(axis=1))
        logs = np.log(wanted, out=np.zeros_like(wanted), where=wanted > 0)
        entropy = -(wanted * logs).sum(axis=2).mean()
        assert found.entropy[layer] == pytest.approx(entropy, abs=1e-4)
    assert np.abs(found.peak - peaks.sum(axis=0)).max() < 1e-4


def test_watching_changes_no_bit(backend: LlamaBackend) -> None:
    def spoken(watch: WatchSequence | None) -> list[int]:
        fed(backend, watch=watch)
        fed(backend, seq=1)
        said = []
        for at in range(N, N + 20):
            outputs = backend.decode([step(0, at, at + 1), step(1, at, at + 1)])
            said += [output.sampled[0].token for output in outputs]
        kv = backend.export_kv(0, 0, N + 20)
        said.append(hash(tuple((layer.keys, layer.values) for layer in kv.layers)))
        for seq in (0, 1):
            backend.apply(FreeSequence(seq))
        return said

    plain = spoken(None)
    assert spoken(WatchSequence(0)) == plain
    assert spoken(WatchSequence(0, every=7, window=0)) == plain


def grown(backend: LlamaBackend, seq: int, start: int, stop: int) -> CellAttention:
    for at in range(start, stop):
        backend.decode([step(seq, at, at + 1)])
    return backend.attention(seq)


def test_each_sequence_is_measured_by_itself(backend: LlamaBackend) -> None:
    for seq in (0, 1):
        fed(backend, watch=WatchSequence(seq, window=1), seq=seq)
    for at in range(N, N + 4):
        backend.decode([step(0, at, at + 1), step(1, at, at + 1)])
    first, second = backend.attention(0), backend.attention(1)
    assert first.rows == second.rows == 5
    assert np.array_equal(first.mass, second.mass)
    assert np.allclose(first.mass.sum(axis=1), 5, atol=1e-4)


def test_only_every_nth_step_is_measured(backend: LlamaBackend) -> None:
    fed(backend, watch=WatchSequence(0, every=4, window=0))
    assert backend.attention(0).rows == 0
    assert not backend.attention(0).entropy.any()
    assert grown(backend, 0, N, N + 9).rows == 3
    backend.apply(WatchSequence(0))
    assert backend.attention(0).rows == 0
    assert grown(backend, 0, N + 9, N + 11).rows == 2


def test_guesses_are_not_measured(backend: LlamaBackend) -> None:
    fed(backend, watch=WatchSequence(0, window=0))
    drafted = StepInput(0, N, TOKENS[N : N + 5], None, sample=True, drafts=4)
    outputs = backend.decode([drafted])
    found = backend.attention(0)
    assert found.rows == 1
    assert len(found.positions) == N + len(outputs[0].sampled)
    assert found.mass[:, N + 1 :].sum() == 0


def test_what_is_trimmed_is_forgotten(backend: LlamaBackend) -> None:
    fed(backend, watch=WatchSequence(0, window=0))
    before = grown(backend, 0, N, N + 3)
    grown(backend, 0, N + 3, N + 6)
    backend.apply(TrimSequence(0, N + 3))
    after = backend.attention(0)
    assert after.positions.tolist() == before.positions.tolist()
    assert after.seen[-1] == 4  # its own row, and those of the tokens that are gone
    assert grown(backend, 0, N + 3, N + 4).seen[-1] == 1


def test_what_is_not_watched_is_refused(backend: LlamaBackend) -> None:
    with pytest.raises(InvalidRequest, match="not open"):
        backend.attention(0)
    with pytest.raises(InvalidRequest, match="not open"):
        backend.apply(WatchSequence(0))
    with pytest.raises(InvalidRequest, match="not one of"):
        backend.apply(WatchSequence(-1))
    fed(backend)
    for op in (WatchSequence(0, every=0), ShiftSequence(0, 0, N, 3)):
        backend.apply(WatchSequence(0))
        backend.apply(op)
        with pytest.raises(InvalidRequest) as caught:
            backend.attention(0)
        assert caught.value.code == "not_watched"
    with pytest.raises(InvalidRequest):
        backend.apply(WatchSequence(0, every=-1))
