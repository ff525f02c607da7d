"""``LlamaBackend``: a slice of a model in llama.cpp, behind the ``Backend`` port.

Equal to the bit with a plain llama.cpp process on the unsliced file, for any number of slices and
of concurrent sessions, on the terms of ``batching`` (which shapes are computed), ``context`` (how
the context is set up) and ``selftest`` (which shapes passed).  The plain process to compare with
has ``flash_attn=True, n_batch=512``, f16 KV, and ``n_threads=1`` once a context passes 256 tokens:
beyond that llama.cpp's own results depend on the number of threads, and ours are those of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    KV_ROWS,
    MAX_CALL_ROWS,
    MAX_DECODE_ROWS,
    BackendInfo,
)
from pyagent_node.inference.llama import library
from pyagent_node.inference.llama.cells import GGML_F16, CellStore
from pyagent_node.inference.llama.context import LlamaContext, padded_cells
from pyagent_node.inference.llama.kv_state import CellLayout, RowKind
from pyagent_node.inference.llama.memory import available_memory, check_memory, memory_need
from pyagent_node.inference.llama.pruner import LlamaPruner, find_pruner
from pyagent_node.inference.llama.selftest import run_self_test
from pyagent_node.inference.models.architectures import model_shape, plain_attention
from pyagent_node.inference.models.gguf_header import GgufHeader, read_header
from pyagent_node.inference.models.kv_rows import kv_shape
from pyagent_node.inference.models.layer_kinds import layers_of_every_kind
from pyagent_node.inference.models.slicing import SLICE_KEY
from pyagent_node.inference.stepping.backend import SliceBackend, check_numbers
from pyagent_node.inference.stepping.calls import CallRunner
from pyagent_node.inference.stepping.shapes import ShapeBook
from pyagent_node.sharding.kv_codec import KvShape

MAX_N_SEQ: Final = 64
MAX_THREADS: Final = 512


class LlamaBackend(SliceBackend):
    """A loaded slice.  One thread may use it; see the port for the meaning of the methods."""

    def __init__(
        self,
        path: Path,
        part: Slice,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        available: Callable[[], int] = available_memory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load the slice ``part`` from ``path``: its own file, or the whole model's for all of it.

        ``n_ctx`` tokens are reserved for each of ``n_seq`` sequences.  Raises
        :class:`InvalidRequest` (``bad_parameter``, ``wrong_slice``), :class:`CorruptData`
        (``gguf_truncated``, ...), :class:`Unsupported` and :class:`LimitExceeded`
        (``not_enough_memory``).
        """
        header = read_header(path)
        shape = model_shape(header)
        check_numbers(n_ctx=n_ctx, n_seq=n_seq, threads=threads, n_ctx_train=shape.n_ctx_train)
        _check_slice(header, part, shape.n_layers)
        n_cells = padded_cells(n_ctx)
        outputs = max(MAX_DECODE_ROWS, min(n_seq * MAX_DECODE_ROWS, MAX_CALL_ROWS))
        need = memory_need(
            header, cells=n_cells, n_seq=n_seq, n_vocab=shape.n_vocab, max_outputs=outputs
        )
        check_memory(need, available())
        whole = part.first == 0 and part.head
        plain = plain_attention(header)
        self._model = library.load_model(path)
        try:
            context = LlamaContext(
                self._model,
                n_ctx=n_ctx,
                n_seq=n_seq,
                threads=threads,
                tapped=not part.head,
                max_outputs=outputs,
                early_layer=max(0, layers_of_every_kind(header) - 1),
            )
            try:
                findings = run_self_test(
                    context,
                    n_cells=n_cells,
                    tapped=not part.head,
                    takes_tokens=whole,
                    clock=clock,
                    query_width=plain.n_head * plain.head_dim if plain is not None else 0,
                )
            except BaseException:
                context.close()
                raise
        except BaseException:
            self._model.close()
            raise
        shapes = ShapeBook(findings.widths, findings.failed, findings.slow, n_seq=n_seq)
        moving = findings.moving
        layout = moving.layout if moving.exact else None
        info = BackendInfo(
            backend="llama.cpp",
            version=library.VERSION,
            device="cpu",
            slice=part,
            n_embd=self._model.n_embd,
            n_vocab=shape.n_vocab if part.head else 0,
            n_ctx=n_ctx,
            n_ctx_train=shape.n_ctx_train,
            n_seq=n_seq,
            threads=threads,
            kv_bytes_per_token=need.kv // (n_cells * n_seq),
            memory_bytes=int(psutil.Process().memory_info().rss),
            batch_invariant_widths=findings.widths,
            kv_portable=moving.exact,
            kv_codec=KV_ROWS if moving.exact else "",
            joint_shapes=shapes.joint,
            prefill_cut=findings.prefill_cut,
            kv_shape=_kv_shape(header, layout),
            exactness=f"llama.cpp/{library.VERSION}/cpu",
        )
        cells = CellStore(
            context, part, layout, moving.cache, appends=moving.appends, takes_tokens=whole
        )
        pruner: LlamaPruner | None = None
        if plain is not None and moving.queried and info.kv_shape is not None:
            pruner = find_pruner(context, cells, plain, info.kv_bytes_per_token)
        super().__init__(
            msgspec.structs.replace(info, prunes=pruner is not None),
            context,
            CallRunner(context, shapes, findings.lone, head=part.head),
            cells,
            pruner,
        )
        self._llama = context

    def close(self) -> None:
        """Release the model; idempotent."""
        self._llama.close()
        self._model.close()


def _kv_shape(header: GgufHeader, layout: CellLayout | None) -> KvShape | None:
    """Return the shape of every layer's rows, when there is one."""
    shape = kv_shape(header)
    rows = RowKind(GGML_F16, shape.row_bytes)
    return shape if layout is not None and {*layout.keys, *layout.values} == {rows} else None


def _check_slice(header: GgufHeader, part: Slice, n_layers: int) -> None:
    """Check that the file holds the layers it is loaded for."""
    held = header.text(SLICE_KEY, str(Slice(0, n_layers, head=True)))
    if held != str(part):
        raise InvalidRequest(f"The file holds layers {held[:64]}, not {part}.", code="wrong_slice")
