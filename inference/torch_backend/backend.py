"""``TorchBackend``: a slice of a model in torch, behind the ``Backend`` port."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import torch  # pyright: ignore[reportMissingImports]

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    KV_ROWS,
    MAX_CALL_ROWS,
    MAX_DECODE_ROWS,
    PREFILL_CHUNK,
    BackendInfo,
)
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.formats.weights import check_part, open_weights
from pyagent_node.inference.llama.memory import F16, F32, HEADROOM, MemoryNeed, check_memory
from pyagent_node.inference.stepping.backend import SliceBackend, check_numbers
from pyagent_node.inference.stepping.calls import CallRunner, LonePolicy
from pyagent_node.inference.stepping.shapes import ShapeBook
from pyagent_node.inference.stepping.watching import PlainPruner
from pyagent_node.inference.torch_backend.cells import TorchCells
from pyagent_node.inference.torch_backend.context import TorchContext, padded_cells
from pyagent_node.inference.torch_backend.devices import (
    Device,
    choose_device,
    exactness,
    free_memory,
    torch_errors,
)
from pyagent_node.inference.torch_backend.layers import load_layers
from pyagent_node.inference.torch_backend.selftest import run_self_test


class TorchBackend(SliceBackend):
    """A loaded slice.  One thread may use it; see the port for the meaning of the methods."""

    def __init__(
        self,
        path: Path,
        part: Slice,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        device: str | None = None,
        dtype: str | None = None,
        available: Callable[[], int] | None = None,
    ) -> None:
        """Load the slice ``part`` from ``path``: a GGUF file that holds it, or safetensors.

        ``device`` and ``dtype`` as for ``devices.choose_device``; ``available`` returns the bytes
        that may be taken.  Raises :class:`InvalidRequest`
        (``bad_parameter``, ``wrong_slice``), :class:`CorruptData`, :class:`Unsupported`
        (``unsupported_architecture``, ``tensor_type``) and :class:`LimitExceeded`
        (``not_enough_memory``).
        """
        with closing(open_weights(path)) as weights:
            config = weights.config
            check_numbers(n_ctx=n_ctx, n_seq=n_seq, threads=threads, n_ctx_train=config.n_ctx_train)
            check_part(weights, part)
            place = choose_device(device, dtype)
            torch.set_num_threads(threads)
            need = memory_need(config, part, place, n_ctx=n_ctx, n_seq=n_seq)
            check_memory(need, free_memory(place) if available is None else available())
            with torch_errors("for the weights"):
                layers = load_layers(weights, part, place)
        context = TorchContext(config, layers, place, n_ctx=n_ctx, n_seq=n_seq)
        whole = part.first == 0 and part.head
        findings = run_self_test(context, n_ctx=n_ctx, head=part.head, tokens=whole)
        shapes = ShapeBook(findings.passed, findings.failed, (), n_seq=n_seq)
        info = BackendInfo(
            backend="torch",
            version=str(torch.__version__),
            device=place.name,
            slice=part,
            n_embd=config.n_embd,
            n_vocab=config.n_vocab if part.head else 0,
            n_ctx=n_ctx,
            n_ctx_train=config.n_ctx_train,
            n_seq=n_seq,
            threads=threads,
            kv_bytes_per_token=cell_bytes(config, part) * place.cache_bytes,
            memory_bytes=int(psutil.Process().memory_info().rss),
            batch_invariant_widths=findings.passed,
            kv_portable=True,
            kv_codec=KV_ROWS,
            joint_shapes=shapes.joint,
            kv_shape=config.kv_shape,
            exactness=exactness(place),
            prunes=True,
        )
        policy = LonePolicy(threads, threads, companion=False)
        calls = CallRunner(context, shapes, policy, head=part.head)
        pruner = PlainPruner(context, info.kv_bytes_per_token)
        super().__init__(info, context, calls, TorchCells(context, part), pruner)
        self._torch = context

    def close(self) -> None:
        """Release the model; idempotent."""
        self._torch.close()


def cell_bytes(config: ModelConfig, part: Slice) -> int:
    """Return how many numbers a cell has in all layers of a slice, keys and values."""
    return 2 * (part.last - part.first) * config.n_head_kv * config.head_dim


def memory_need(
    config: ModelConfig, part: Slice, device: Device, *, n_ctx: int, n_seq: int
) -> MemoryNeed:
    """Estimate what loading takes on the device, and computing a full chunk of a prompt."""
    q, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    layer = config.n_embd * (2 * q + 2 * kv + 3 * config.n_ff)
    tables = (1 if config.tied or part.first else 2) if part.head else 0
    numbers = (part.last - part.first) * layer + tables * config.n_vocab * config.n_embd
    cells = padded_cells(n_ctx)
    group = config.n_head // config.n_head_kv
    rows = 3 * config.n_ff + 6 * config.n_embd + 2 * q + group * cells
    logits = max(MAX_DECODE_ROWS, MAX_CALL_ROWS) * config.n_vocab if part.head else 0
    # one layer is in memory twice while it is read
    work = F32 * (PREFILL_CHUNK * rows + logits) + 2 * F32 * layer + HEADROOM
    return MemoryNeed(
        numbers * (F16 if device.dtype == "f16" else F32),
        cell_bytes(config, part) * device.cache_bytes * cells * n_seq,
        work,
    )
