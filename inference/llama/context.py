"""One llama.cpp context: rows in, activations or logits out, and the cells of its sequences.

The context is made for exactness.  Flash attention is on (with it off, results depend on the width
of a batch), each sequence has a KV stream of its own (so that its cells lie in the order of its
positions and nobody else's cells are walked past), and the physical batch is the logical one.

All calls of a batch are one ubatch of llama.cpp, see ``batching``.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

import numpy as np
from llama_cpp import llama_cpp as lc
from numpy.typing import NDArray

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.inference.backend import PREFILL_CHUNK, Activations
from pyagent_node.inference.llama import cache_view, library
from pyagent_node.inference.llama.library import Model
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.native import HeldTensor, TensorTap

QUERY_PREFIX: Final = "Qcur-"
"""How llama.cpp names a layer's queries; of three tensors the last is turned by position."""
CELL_STEP: Final = 256
"""llama.cpp rounds the cells of a stream, and the cells that attention walks over, up to this."""


def padded_cells(n_ctx: int) -> int:
    """Cells of a stream for ``n_ctx`` tokens: one to spare for a companion row, then rounded up."""
    return -(-(n_ctx + 1) // CELL_STEP) * CELL_STEP


class RowWatcher(Protocol):
    """Measures rows of calls, see :meth:`LlamaContext.query`."""

    def begin(self, rows: Rows) -> bool:
        """Note what is wanted of a call that begins; return whether it is anything."""
        ...

    def end(self) -> None:
        """Take what was wanted, if the call has computed it."""
        ...


class LlamaContext:
    """Owns a context of ``model``; ``tapped`` when activations are wanted instead of logits.

    ``early_layer`` is the one after which :meth:`decode_early` ends.  Without a tap it must not be
    the last, of which only the wanted rows are computed.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        tapped: bool,
        max_outputs: int,
        early_layer: int = 0,
    ) -> None:
        self.model = model
        self.n_seq = n_seq
        self.threads = threads
        self.n_embd = model.n_embd
        self._batch = _Batch(PREFILL_CHUNK)
        self._tapped = tapped
        self._tap = _tap(model, early_layer)
        self.can_decode_early = early_layer < model.n_layers - (0 if tapped else 1)
        self._logits_type = ctypes.c_float * model.n_vocab
        params = lc.llama_context_default_params()
        params.n_ctx = padded_cells(n_ctx) * n_seq
        params.n_seq_max = n_seq
        params.n_batch = params.n_ubatch = PREFILL_CHUNK
        params.n_outputs_max = PREFILL_CHUNK if tapped else max(max_outputs, n_seq)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        # the callback type of llama-cpp-python casts an address as well as a function
        params.cb_eval = ctypes.cast(self._tap.callback, lc.ggml_backend_sched_eval_callback)
        params.cb_eval_user_data = self._tap.user_data
        library.complaints()
        handle = lc.llama_init_from_model(model.handle, params)
        if not handle:
            text = library.complaints() or "no reason given"
            raise LimitExceeded(
                f"llama.cpp could not set up {n_seq} sequences of {n_ctx} tokens: {text}",
                code="not_enough_memory",
                remedy="Load with a shorter context or fewer sequences.",
                n_ctx=n_ctx,
                n_seq=n_seq,
            )
        self.handle = handle
        self._memory = lc.llama_get_memory(handle)
        self.watcher: RowWatcher | None = None
        """Told of every call; ``None`` while nobody watches."""
        self._lone_threads = threads

    def decode(self, rows: Rows, out: Activations | None, *, lone_threads: int) -> None:
        """Compute one call; with a tap, ``out`` of shape (n, n_embd) gets what leaves the slice.

        ``lone_threads`` is used for a single row, all threads for more.  Raises
        :class:`LimitExceeded` (``kv_full``) and :class:`Unavailable` (``decode_failed``); the cells
        of the call are then not there, except those that overlap an earlier call.
        """
        if lone_threads != self._lone_threads:
            lc.llama_set_n_threads(self.handle, lone_threads, self.threads)
            self._lone_threads = lone_threads
        assert self._tapped == (out is not None), "what leaves the slice needs a place"
        self._decode(rows, out, early=False)

    def decode_early(self, rows: Rows, out: Activations) -> None:
        """Compute one call up to a layer; ``out`` of shape (n, n_embd) gets what leaves that layer.

        The cells of later layers are not written: drop those of the call afterwards.  Errors as for
        :meth:`decode`.
        """
        self._decode(rows, out, early=True)

    def claim(self, seq: int, start: int, n: int, *, takes_tokens: bool) -> None:
        """Make cells for positions ``[start, start + n)`` without computing what is in them.

        They hold what was in that memory before: write them (``cache_view``) at once.  Errors as
        for :meth:`decode`.
        """
        self._tap.skip(True)
        try:
            for at in range(start, start + n, PREFILL_CHUNK):
                count = min(PREFILL_CHUNK, start + n - at)
                rows = Rows(
                    np.full(count, seq, np.int32),
                    np.arange(at, at + count, dtype=np.int32),
                    np.zeros(count, np.int32) if takes_tokens else None,
                    None if takes_tokens else np.zeros((count, self.n_embd), np.float32),
                    np.zeros(count, np.int8),
                )
                batch = self._batch.fill(rows, every=False)
                _check(lc.llama_decode(self.handle, batch))
        finally:
            self._tap.skip(False)

    def _decode(self, rows: Rows, out: Activations | None, *, early: bool) -> None:
        batch = self._batch.fill(rows, every=self._tapped)
        if out is not None:
            assert out.shape == (len(rows.seqs), self.n_embd), "one row each"
            self._tap.arm(out, early=early)
        watching = self.watcher is not None and self.watcher.begin(rows)
        status = lc.llama_decode(self.handle, batch)
        if watching and self.watcher is not None:
            self.watcher.end()
        written = self._tap.collect() if out is not None else 0
        _check(status)
        if out is not None and written != out.size:
            raise library.failure(f"to show its last layer ({written} floats)", "tap_failed")

    def query(self, out: NDArray[np.float32], rows: NDArray[np.int32], call_rows: int) -> None:
        """Note the queries of ``rows`` of the next call, which has ``call_rows`` rows in all.

        ``out`` has shape (layers, rows, heads * width); the keys are turned by position alike.
        """
        self._tap.query(QUERY_PREFIX, out, rows, layers=self.model.n_layers, call_rows=call_rows)

    def queried(self) -> bool:
        """Stop noting queries; return whether those of all layers came."""
        return self._tap.queried()

    def watch_cache(self) -> None:
        """Note the tensors of the KV cache when the next calls use them."""
        self._tap.watch(cache_view.PREFIX, tensor_bytes=library.tensor_bytes())

    def found_cache(self) -> list[HeldTensor]:
        """Stop noting; return what was seen, to be read for as long as the context is open."""
        return self._tap.found()

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return the logits of a wanted row of the last call, shape (n_vocab,).

        A view into llama.cpp's memory: use it before the next call.
        """
        pointer = lc.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise library.failure("to return logits", "decode_failed")
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        assert address is not None
        floats = memoryview(self._logits_type.from_address(address)).cast("B")
        return np.frombuffer(floats, np.float32)

    def drop(self, seq: int, start: int) -> None:
        """Remove the cells of ``seq`` at positions ``[start, ...)``."""
        if not lc.llama_memory_seq_rm(self._memory, seq, start, -1):
            raise library.failure("to remove cells", "kv_failed")

    @property
    def can_shift(self) -> bool:
        """Whether positions of cells can be changed."""
        return bool(lc.llama_memory_can_shift(self._memory))

    def shift(self, seq: int, start: int, stop: int, delta: int) -> None:
        """Add ``delta`` to positions ``[start, stop)``; keys are rotated by the next call."""
        lc.llama_memory_seq_add(self._memory, seq, start, stop, delta)

    def read_state(self, seq: int) -> NDArray[np.uint8]:
        """Return all cells of ``seq`` in llama.cpp's own format."""
        size = int(lc.llama_state_seq_get_size(self.handle, seq))
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if size == 0 or lc.llama_state_seq_get_data(self.handle, pointer, size, seq) != size:
            raise library.failure("to read KV cells", "kv_failed")
        return data

    def write_state(self, seq: int, data: NDArray[np.uint8]) -> None:
        """Replace the cells of ``seq`` by what ``kv_state.build_state`` built."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lc.llama_state_seq_set_data(self.handle, pointer, len(data), seq) != len(data):
            raise library.failure("to write KV cells", "kv_failed")

    def close(self) -> None:
        """Free the context; idempotent.  The tap lives as long as the object."""
        handle, self.handle = self.handle, None
        if handle:
            lc.llama_free(handle)


def _check(status: int) -> None:
    if status == 1:
        raise LimitExceeded("No KV cell is free for these tokens.", code="kv_full")
    if status != 0:
        raise library.failure(f"to compute (status {status})", "decode_failed")


class _Batch:
    """The arrays of a ``llama_batch``, allocated once; tokens and activations are only borrowed."""

    def __init__(self, capacity: int) -> None:
        self._seqs = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._counts = np.ones(capacity, np.int32)
        addresses = self._seqs.ctypes.data + self._seqs.itemsize * np.arange(capacity)
        self._pointers = addresses.astype(np.uintp)
        batch = lc.llama_batch()
        batch.pos = _pointer(self._positions, ctypes.c_int32)
        batch.n_seq_id = _pointer(self._counts, ctypes.c_int32)
        batch.seq_id = _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        batch.logits = _pointer(self._outputs, ctypes.c_int8)
        self._batch = batch
        self._no_tokens: Any = ctypes.POINTER(ctypes.c_int32)()
        self._no_floats: Any = ctypes.POINTER(ctypes.c_float)()
        self._borrowed: Rows | None = None

    def fill(self, rows: Rows, *, every: bool) -> lc.llama_batch:
        """Return the batch for ``rows``, whose arrays it keeps alive until the next call."""
        n = len(rows.seqs)
        self._seqs[:n] = rows.seqs
        self._positions[:n] = rows.positions
        self._outputs[:n] = 1 if every else rows.wanted
        batch = self._batch
        batch.n_tokens = n
        if rows.activations is not None:
            batch.embd = _pointer(rows.activations, ctypes.c_float)
            batch.token = self._no_tokens
        else:
            assert rows.tokens is not None, "a row is a token or activations"
            batch.token = _pointer(rows.tokens, ctypes.c_int32)
            batch.embd = self._no_floats
        self._borrowed = rows
        return batch


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    # Any: the stubs of llama-cpp-python call the pointer fields of a batch arrays
    assert array.flags.c_contiguous, "llama.cpp reads the array as it lies in memory"
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _tap(model: Model, early_layer: int) -> TensorTap:
    return TensorTap(
        f"l_out-{model.n_layers - 1}",
        PREFILL_CHUNK * model.n_embd,
        get_name=library.symbol("ggml_get_name"),
        nbytes=library.symbol("ggml_nbytes"),
        tensor_get=library.symbol("ggml_backend_tensor_get"),
        tensor_set=library.symbol("ggml_backend_tensor_set"),
        early=f"l_out-{early_layer}",
        get_data=library.symbol("ggml_get_data"),
    )
