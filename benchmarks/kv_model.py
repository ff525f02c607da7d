"""A whole model with KV of any type of llama.cpp's, for measuring what the type costs."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
from llama_cpp import llama_cpp as lc
from numpy.typing import NDArray

from pyagent_node.inference.llama.kv_state import SequenceState, build_state, parse_state

PIECE: Final = 512
"""Tokens that are computed at once."""


class PlainModel:
    """The model of a file; contexts come and go."""

    def __init__(self, path: str) -> None:
        self.handle = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        if not self.handle:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocab = lc.llama_model_get_vocab(self.handle)
        self.n_vocab = int(lc.llama_vocab_n_tokens(self.vocab))

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a text, with the one that begins it."""
        raw = text.encode()
        found = (lc.llama_token * (len(raw) + 8))()
        count = lc.llama_tokenize(self.vocab, raw, len(raw), found, len(found), True, False)
        return list(found[:count])

    def close(self) -> None:
        """Free the model; its contexts are closed."""
        lc.llama_model_free(self.handle)


class PlainContext:
    """One sequence whose KV is of ``kind`` (a ``ggml_type``); flash attention is on."""

    def __init__(self, model: PlainModel, *, kind: int, n_ctx: int, threads: int) -> None:
        self._n_vocab = model.n_vocab
        params = lc.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = PIECE
        if threads:
            params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = kind
        params.kv_unified = False
        self._handle = lc.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise RuntimeError(f"llama.cpp gives no context with KV of type {kind}")
        self._memory = lc.llama_get_memory(self._handle)

    def close(self) -> None:
        """Free the context."""
        lc.llama_free(self._handle)

    def clear(self) -> None:
        """Forget everything."""
        lc.llama_memory_clear(self._memory, True)

    def feed(
        self, tokens: Sequence[int], position: int, *, logits: bool
    ) -> NDArray[np.float32] | None:
        """Compute ``tokens`` from ``position`` on; return logits of shape (n, n_vocab) if asked."""
        found: list[NDArray[np.float32]] = []
        for start in range(0, len(tokens), PIECE):
            piece = tokens[start : start + PIECE]
            batch = lc.llama_batch_init(len(piece), 0, 1)
            try:
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = position + start + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = 0
                    batch.logits[i] = logits or i == len(piece) - 1
                status = lc.llama_decode(self._handle, batch)
            finally:
                lc.llama_batch_free(batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            if logits:
                floats = ctypes.cast(
                    lc.llama_get_logits(self._handle), ctypes.POINTER(ctypes.c_float)
                )
                shape = (len(piece), self._n_vocab)
                found.append(np.ctypeslib.as_array(floats, shape).copy())
        return np.concatenate(found) if logits else None

    def cells(self) -> SequenceState:
        """Return what the sequence holds."""
        size = int(lc.llama_state_seq_get_size(self._handle, 0))
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lc.llama_state_seq_get_data(self._handle, pointer, size, 0) != size:
            raise RuntimeError("llama.cpp does not give its state")
        state = parse_state(data, 1)
        assert state is not None, "there are cells"
        return state

    def load(self, state: SequenceState) -> None:
        """Hold these cells instead."""
        data = build_state(state.layout, [state.cells], seq=0, n_streams=1)
        self.clear()
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lc.llama_state_seq_set_data(self._handle, pointer, len(data), 0) != len(data):
            raise RuntimeError("llama.cpp does not take its state back")
