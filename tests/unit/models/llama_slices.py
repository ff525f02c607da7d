"""Runs whole models and slices straight through llama-cpp-python, as plainly as it can be done."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Self

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

N_CTX = 256
N_BATCH = 64

BASE = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
_GET_NAME = BASE.ggml_get_name
_GET_NAME.argtypes, _GET_NAME.restype = [ctypes.c_void_p], ctypes.c_char_p
_NBYTES = BASE.ggml_nbytes
_NBYTES.argtypes, _NBYTES.restype = [ctypes.c_void_p], ctypes.c_size_t
_TENSOR_GET = BASE.ggml_backend_tensor_get
_TENSOR_GET.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_TENSOR_GET.restype = None


@api.llama_log_callback
def _quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    del level, text, user_data


class Vocabulary:
    """A file loaded with ``vocab_only``."""

    def __init__(self, path: Path, *, vocab_only: bool = True) -> None:
        api.llama_backend_init()
        api.llama_log_set(_quiet, ctypes.c_void_p(0))
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        self.model = api.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}"

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        out = (api.llama_token * (len(raw) + 8))()
        vocab = api.llama_model_get_vocab(self.model)
        n = api.llama_tokenize(vocab, raw, len(raw), out, len(out), True, True)
        assert n > 0
        return list(out[:n])

    def chat_template(self) -> bytes | None:
        template: bytes | None = api.llama_model_chat_template(self.model, None)
        return template

    def close(self) -> None:
        api.llama_model_free(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class LlamaSlice(Vocabulary):
    """One loaded file.  ``tap`` is the local number of the layer whose output is read, if any."""

    def __init__(self, path: Path, tap: int | None = None, threads: int = 1) -> None:
        super().__init__(path, vocab_only=False)
        params = api.llama_context_default_params()
        params.n_ctx = N_CTX
        params.n_batch = params.n_ubatch = N_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.tapped: NDArray[np.float32] | None = None
        self._name = None if tap is None else f"l_out-{tap}".encode()
        if tap is not None:
            self._callback = api.ggml_backend_sched_eval_callback(self._on_tensor)
            params.cb_eval = self._callback
        self.context = api.llama_init_from_model(self.model, params)
        assert self.context
        self.n_embd = api.llama_model_n_embd(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))

    def _on_tensor(self, tensor: int, ask: bool, user_data: object) -> bool:
        del user_data
        wanted = _GET_NAME(tensor) == self._name
        if ask or not wanted:
            return wanted if ask else True
        out = np.empty(_NBYTES(tensor) // 4, np.float32)
        _TENSOR_GET(tensor, out.ctypes.data, 0, out.nbytes)
        self.tapped = out.reshape(-1, self.n_embd)
        return True

    def decode(
        self, position: int, tokens: list[int] | None, embd: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """Run one batch; return every row's logits, or the tapped activations."""
        n = len(tokens) if tokens is not None else len(embd) if embd is not None else 0
        batch = api.llama_batch_init(n, 0 if embd is None else self.n_embd, 1)
        try:
            batch.n_tokens = n
            for i in range(n):
                if tokens is not None:
                    batch.token[i] = tokens[i]
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = 1
            if embd is not None:
                rows = np.ascontiguousarray(embd, np.float32)
                ctypes.memmove(batch.embd, rows.ctypes.data, rows.nbytes)
            assert api.llama_decode(self.context, batch) == 0
        finally:
            api.llama_batch_free(batch)
        if self._name is not None:
            assert self.tapped is not None
            assert self.tapped.shape == (n, self.n_embd)
            return self.tapped
        return np.stack(
            [
                np.ctypeslib.as_array(
                    api.llama_get_logits_ith(self.context, i), (self.n_vocab,)
                ).copy()
                for i in range(n)
            ]
        )

    def close(self) -> None:
        api.llama_free(self.context)
        super().close()
