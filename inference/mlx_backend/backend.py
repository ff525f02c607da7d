"""``MlxBackend``: a slice of a model of the llama family on MLX, behind the ``Backend`` port.

On Apple's GPUs it computes in f16, on processors in f32 (whose products are faster there).  Results
are not llama.cpp's to the bit; ``BackendInfo.exactness`` names what they are equal within.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import mlx.core as mx
import psutil

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import KV_ROWS, PREFILL_CHUNK, BackendInfo
from pyagent_node.inference.formats.config import ModelConfig, shapes_of
from pyagent_node.inference.formats.weights import check_part, open_weights
from pyagent_node.inference.llama.memory import (
    HEADROOM,
    MemoryNeed,
    available_memory,
    check_memory,
)
from pyagent_node.inference.mlx_backend import library
from pyagent_node.inference.mlx_backend.cells import MlxCells
from pyagent_node.inference.mlx_backend.context import GROWTH, MlxContext
from pyagent_node.inference.stepping.backend import SliceBackend, check_numbers
from pyagent_node.inference.stepping.calls import CallRunner, LonePolicy
from pyagent_node.inference.stepping.selftest import Findings, run_self_test
from pyagent_node.inference.stepping.shapes import ShapeBook
from pyagent_node.inference.stepping.watching import PlainPruner

Compute = Literal["f32", "f16"]
_SIZES: dict[Compute, int] = {"f32": 4, "f16": 2}


class MlxBackend(SliceBackend):
    """A loaded slice.  One thread may use it; see the port for the meaning of the methods."""

    def __init__(
        self,
        path: Path,
        part: Slice,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        compute: Compute | None = None,
        available: Callable[[], int] = available_memory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load ``part`` from a GGUF file, a slice of one, or a folder of safetensors.

        ``n_ctx`` tokens may be kept for each of ``n_seq`` sequences.  Raises
        :class:`InvalidRequest` (``bad_parameter``, ``wrong_slice``), the errors of
        ``formats.open_weights`` and :class:`LimitExceeded` (``not_enough_memory``).
        """
        device = library.device()
        kind: Compute = compute or ("f32" if device == "cpu" else "f16")
        with closing(open_weights(path)) as weights:
            config = weights.config
            check_numbers(n_ctx=n_ctx, n_seq=n_seq, threads=threads, n_ctx_train=config.n_ctx_train)
            check_part(weights, part)
            need = memory_need(config, part, n_ctx=n_ctx, n_seq=n_seq, size=_SIZES[kind])
            check_memory(need, available())
            context = MlxContext(
                weights,
                part,
                n_ctx=n_ctx,
                n_seq=n_seq,
                dtype=mx.float32 if kind == "f32" else mx.float16,
            )
        cells = MlxCells(context, part.first)
        findings: Findings = run_self_test(
            context,
            cells,
            n_ctx=n_ctx,
            n_vocab=config.n_vocab,
            takes_tokens=part.first == 0 and part.head,
            head=part.head,
            clock=clock,
        )
        shapes = ShapeBook(findings.widths, findings.failed, findings.slow, n_seq=n_seq)
        info = BackendInfo(
            backend="mlx",
            version=library.VERSION,
            device=device,
            slice=part,
            n_embd=config.n_embd,
            n_vocab=config.n_vocab if part.head else 0,
            n_ctx=n_ctx,
            n_ctx_train=config.n_ctx_train,
            n_seq=n_seq,
            threads=threads,
            kv_bytes_per_token=_cell_bytes(config, part, _SIZES[kind]),
            memory_bytes=int(psutil.Process().memory_info().rss),
            batch_invariant_widths=findings.widths,
            kv_portable=findings.portable,
            kv_codec=KV_ROWS if findings.portable else "",
            joint_shapes=shapes.joint,
            prefill_cut=PREFILL_CHUNK,
            kv_shape=config.kv_shape,
            exactness=f"mlx/{library.VERSION}/{device}/{kind}",
            prunes=True,
        )
        lone = LonePolicy(threads, threads, companion=False)
        calls = CallRunner(context, shapes, lone, head=part.head)
        pruner = PlainPruner(context, info.kv_bytes_per_token)
        super().__init__(info, context, calls, cells, pruner)
        self._mlx = context

    def close(self) -> None:
        """Release the model; idempotent."""
        self._mlx.close()


def memory_need(
    config: ModelConfig, part: Slice, *, n_ctx: int, n_seq: int, size: int
) -> MemoryNeed:
    """Estimate what loading takes, with ``size`` bytes a number."""
    layers = range(part.last - part.first)
    numbers = sum(_count(shape) for shape in shapes_of(config, list(layers)).values())
    table = config.n_vocab * config.n_embd
    if part.head:
        numbers += table * (2 if part.first == 0 and not config.tied else 1)
    cells = -(-n_ctx // GROWTH) * GROWTH * n_seq
    row = 3 * config.n_ff + 8 * config.n_embd + config.n_head * n_ctx
    work = size * PREFILL_CHUNK * row + (4 * 32 * config.n_vocab if part.head else 0) + HEADROOM
    return MemoryNeed(numbers * size, _cell_bytes(config, part, size) * cells, work)


def _cell_bytes(config: ModelConfig, part: Slice, size: int) -> int:
    return 2 * (part.last - part.first) * config.n_head_kv * config.head_dim * size


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
