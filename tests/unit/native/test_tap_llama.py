"""The tensor tap inside llama.cpp, on the default model, against a callback written in Python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

from pyagent_node import native

pytestmark = [pytest.mark.model, pytest.mark.slow]

LAST_LAYER = 29
TOKENS = [1, 9690, 198, 2683, 359, 260, 5356, 30, 28, 314, 260]

LIBRARIES = (Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*")
GGML = ctypes.CDLL(str(min(LIBRARIES, key=lambda path: len(path.name))))
GGML.ggml_get_name.argtypes, GGML.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
GGML.ggml_nbytes.argtypes, GGML.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
GGML.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_size_t] * 2


def address(name: str) -> int:
    value = ctypes.cast(getattr(GGML, name), ctypes.c_void_p).value
    assert value
    return value


def tap_of(layer: int, capacity: int) -> native.TensorTap:
    return native.TensorTap(
        f"l_out-{layer}",
        capacity,
        get_name=address("ggml_get_name"),
        nbytes=address("ggml_nbytes"),
        tensor_get=address("ggml_backend_tensor_get"),
    )


@api.llama_log_callback
def _quiet(level: int, text: bytes, user_data: object) -> None:
    del level, text, user_data


@pytest.fixture(scope="module")
def model(bundled_model: Path) -> Iterator[Any]:
    api.llama_backend_init()
    api.llama_log_set(_quiet, ctypes.c_void_p(0))
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    loaded = api.llama_model_load_from_file(str(bundled_model).encode(), params)
    assert loaded
    yield loaded
    api.llama_model_free(loaded)


def run(model: Any, callback: Any, user_data: int, n_ubatch: int) -> NDArray[np.float32]:
    """Decode ``TOKENS`` with the callback in place; return the last token's logits."""
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 64, 64, n_ubatch
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cb_eval = callback
    params.cb_eval_user_data = user_data
    context = api.llama_init_from_model(model, params)
    assert context
    batch = api.llama_batch_init(len(TOKENS), 0, 1)
    try:
        batch.n_tokens = len(TOKENS)
        for i, token in enumerate(TOKENS):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert api.llama_decode(context, batch) == 0
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        logits = api.llama_get_logits_ith(context, len(TOKENS) - 1)
        return np.ctypeslib.as_array(logits, (n_vocab,)).copy()
    finally:
        api.llama_batch_free(batch)
        api.llama_free(context)


def native_callback(tap: native.TensorTap) -> Any:
    return api.ggml_backend_sched_eval_callback(tap.callback)


@pytest.mark.parametrize("n_ubatch", [64, 4])
@pytest.mark.parametrize("layer", [0, 13, LAST_LAYER])
def test_the_tap_sees_what_a_python_callback_sees(model: Any, layer: int, n_ubatch: int) -> None:
    seen: list[NDArray[np.float32]] = []

    @api.ggml_backend_sched_eval_callback
    def in_python(tensor: int, ask: bool, user_data: object) -> bool:
        del user_data
        if GGML.ggml_get_name(tensor) != f"l_out-{layer}".encode():
            return not ask
        if not ask:
            piece = np.empty(GGML.ggml_nbytes(tensor) // 4, np.float32)
            GGML.ggml_backend_tensor_get(tensor, piece.ctypes.data, 0, piece.nbytes)
            seen.append(piece)
        return True

    expected_logits = run(model, in_python, 0, n_ubatch)
    expected = np.concatenate(seen)
    assert len(seen) == -(-len(TOKENS) // n_ubatch)

    n_embd = api.llama_model_n_embd(model)
    out = np.full((len(TOKENS), n_embd), np.nan, np.float32)
    tap = tap_of(layer, out.size)
    tap.arm(out)
    logits = run(model, native_callback(tap), tap.user_data, n_ubatch)
    assert tap.collect() == out.size
    assert (out.ravel() == expected).all()
    assert (logits == expected_logits).all()


def test_a_tap_that_is_not_armed_or_too_small_disturbs_nothing(model: Any) -> None:
    plain = run(model, api.ggml_backend_sched_eval_callback(0), 0, 64)
    tap = tap_of(LAST_LAYER, 10)
    assert (run(model, native_callback(tap), tap.user_data, 64) == plain).all()
    out = np.full(10, np.nan, np.float32)
    tap.arm(out)
    assert (run(model, native_callback(tap), tap.user_data, 64) == plain).all()
    assert tap.collect() == -1
    assert np.isnan(out).all()
