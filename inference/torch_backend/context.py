"""One slice in torch: rows in, activations or logits out, and the cells of its sequences.

Each sequence has its cells in the order in which they came, in one block of memory a layer, whose
size is fixed when the slice is loaded.  Cells hold numbers that f16 can hold, whatever they
are kept in: what is exported is what was computed with.

Bits do not depend on how many rows a call has, as far as the self-test finds: matrices get
``least_rows`` rows or more, and attention walks over whole runs of :data:`CELL_STEP` cells.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from torch import Tensor  # pyright: ignore[reportMissingImports]
from torch.nn import functional as fn  # pyright: ignore[reportMissingImports]

from pyagent_node.inference.backend import MAX_DECODE_ROWS, Activations
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.watching import Watch, Watcher, end_all
from pyagent_node.inference.torch_backend.devices import Device, torch_errors
from pyagent_node.inference.torch_backend.layers import (
    Layer,
    Rotation,
    SliceLayers,
    feed_forward,
    norm,
    product,
)

_F16_MAX: Final = 65504.0
CELL_STEP: Final = 64
"""Attention walks over a multiple of so many cells."""


def padded_cells(n: int) -> int:
    """Return the least multiple of :data:`CELL_STEP` that holds ``n`` cells."""
    return -(-n // CELL_STEP) * CELL_STEP


class TorchContext:
    """A loaded slice; see ``stepping.calls.Computer``."""

    def __init__(
        self,
        config: ModelConfig,
        layers: SliceLayers,
        device: Device,
        *,
        n_ctx: int,
        n_seq: int,
    ) -> None:
        self.config = config
        self.device = device
        self.n_seq = n_seq
        self.rotation = Rotation(config, device)
        self._slice: SliceLayers | None = layers
        shape = (len(layers.layers), n_seq, config.n_head_kv, padded_cells(n_ctx), config.head_dim)
        with torch_errors("for the KV cache"):
            self.keys = torch.zeros(shape, dtype=device.cache, device=device.name)
            self.values = torch.zeros(shape, dtype=device.cache, device=device.name)
        self.watcher = Watcher(len(layers.layers))
        self.counts = [0] * n_seq
        self.positions = np.zeros((n_seq, padded_cells(n_ctx)), np.int32)
        self._logits: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._wanted: NDArray[np.intp] = np.zeros(0, np.intp)

    @property
    def n_embd(self) -> int:
        """Length of a row of activations."""
        return self.config.n_embd

    @property
    def n_layers(self) -> int:
        """Layers of the slice."""
        return int(self.keys.shape[0])

    def close(self) -> None:
        """Forget weights and cells; idempotent."""
        self._slice = None
        self.keys = self.values = torch.empty(0)

    # ---- cells -----------------------------------------------------------------------------

    def drop(self, seq: int, start: int) -> None:
        """Remove the cells of ``seq`` at positions ``[start, ...)``."""
        count = self.counts[seq]
        kept = np.flatnonzero(self.positions[seq, :count] < start)
        if len(kept) and kept[-1] >= len(kept):
            # cells that stay lie behind some that go
            index = torch.from_numpy(kept).to(self.device.name)
            for cache in (self.keys, self.values):
                cache[:, seq, :, : len(kept)] = cache[:, seq].index_select(2, index)
            self.positions[seq, : len(kept)] = self.positions[seq, kept]
        self.counts[seq] = len(kept)

    def keep(self, seq: int, kept: NDArray[np.intp]) -> None:
        """Keep the cells at these indices, which ascend, side by side, and no others."""
        n = len(kept)
        index = torch.from_numpy(kept).to(self.device.name)
        with torch_errors("to give up KV"):
            for cache in (self.keys, self.values):
                cache[:, seq, :, :n] = cache[:, seq].index_select(2, index)
        self.positions[seq, :n] = self.positions[seq, kept]
        self.counts[seq] = n

    def add_cells(self, seq: int, positions: NDArray[np.int32]) -> tuple[int, int]:
        """Make cells at these positions behind those of ``seq``; return where they are."""
        start = self.counts[seq]
        stop = start + len(positions)
        self.positions[seq, start:stop] = positions
        self.counts[seq] = stop
        return start, stop

    # ---- computing -------------------------------------------------------------------------

    def decode(self, rows: Rows, out: Activations | None, *, lone_threads: int) -> None:
        """Compute one call: equally many rows of each of neighbouring sequences.

        With ``out``, shape (n, n_embd), it gets what leaves the slice.  ``lone_threads`` is not
        used: torch's threads are set once for a process.  Raises :class:`LimitExceeded`
        (``not_enough_memory``) and :class:`Unavailable` (``decode_failed``); the cells of the call
        are then not there.
        """
        parts = self._slice
        assert parts is not None, "the context is open"
        with torch_errors("to compute"), torch.inference_mode():
            stream = self._stream(rows, parts)
            call = _Call(rows, self)
            for index, layer in enumerate(parts.layers):
                stream = stream + self._attend(index, layer, stream, call)
                stream += feed_forward(
                    layer, stream, self.config.norm_eps, self.device, prefill=call.prefill
                )
            if out is not None:
                out[:] = stream[: len(rows.seqs)].cpu().numpy()
            elif parts.head is not None:
                self._wanted = np.flatnonzero(rows.wanted)
                picked = stream[: len(rows.seqs)][torch.from_numpy(self._wanted)]
                self._logits = self._head(picked, parts) if len(self._wanted) else self._logits[:0]
        end_all(call.watches)
        for seq, start in zip(call.seqs, range(0, len(rows.seqs), call.rows), strict=True):
            self.add_cells(seq, rows.positions[start : start + call.rows])

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return the logits of a wanted row of the last call, shape (n_vocab,)."""
        (at,) = np.flatnonzero(self._wanted == row)
        row_logits: NDArray[np.float32] = self._logits[at]
        return row_logits

    def _stream(self, rows: Rows, parts: SliceLayers) -> Tensor:
        """Return the residual stream at the start, f32, with rows of zeros where there are few."""
        if rows.activations is not None:
            stream = torch.tensor(rows.activations, device=self.device.name)
        else:
            assert rows.tokens is not None, "a row is a token or activations"
            assert parts.embedding is not None, "a whole model takes tokens"
            index = torch.tensor(rows.tokens, device=self.device.name)
            stream = fn.embedding(index, parts.embedding).float()
        return self._enough(stream)

    def _enough(self, rows: Tensor) -> Tensor:
        missing = 0 if self.device.singly else self.device.least_rows - rows.shape[0]
        return fn.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows

    def _head(self, rows: Tensor, parts: SliceLayers) -> NDArray[np.float32]:
        assert parts.head is not None, "there is a head"
        normed = norm(self._enough(rows), parts.head.norm, self.config.norm_eps)
        made = product(normed, parts.head.matrix, self.device, prefill=False)
        logits: NDArray[np.float32] = made[: rows.shape[0]].cpu().numpy()
        return logits

    def _attend(self, index: int, layer: Layer, stream: Tensor, call: _Call) -> Tensor:
        """Write the cells of a call in one layer; return what attention adds to the stream."""
        config, device = self.config, self.device
        n, width = call.n, config.head_dim
        normed = norm(stream, layer.attn_norm, config.norm_eps)
        mixed = product(normed, layer.qkv, device, prefill=call.prefill)[:n]
        if layer.qkv_bias is not None:
            mixed = mixed + layer.qkv_bias
        mixed = mixed.view(n, -1, width)
        turned = config.n_head + config.n_head_kv
        rotated = self.rotation.turn(mixed[:, :turned], call.turns)
        keys = _for_a_cell(rotated[:, config.n_head :])
        values = _for_a_cell(mixed[:, turned:])
        for at, (seq, cell) in enumerate(zip(call.seqs, call.cells, strict=True)):
            mine = slice(at * call.rows, (at + 1) * call.rows)
            place = slice(cell, cell + call.rows)
            self.keys[index, seq, :, place] = keys[mine].transpose(0, 1)
            self.values[index, seq, :, place] = values[mine].transpose(0, 1)
        for watch in call.watches:
            watch.add(index, self._weights(index, watch, rotated))
        # the query heads that share a key head are rows beside each other: it is read once
        s, r, g = len(call.seqs), call.rows, config.n_head // config.n_head_kv
        queries = (
            rotated[:, : config.n_head].to(device.cache).view(s, r, config.n_head_kv, g, width)
        )
        queries = queries.permute(0, 2, 3, 1, 4).reshape(s, config.n_head_kv, g * r, width)
        if g * r < device.least_rows:
            queries = fn.pad(queries, (0, 0, 0, device.least_rows - g * r))
        here = slice(call.seqs[0], call.seqs[0] + s)
        seen = fn.scaled_dot_product_attention(
            queries,
            self.keys[index, here, :, : call.span],
            self.values[index, here, :, : call.span],
            attn_mask=call.mask,
        )[:, :, : g * r]
        seen = seen.view(s, config.n_head_kv, g, r, width).permute(0, 3, 1, 2, 4)
        heads = self._enough(seen.reshape(n, config.n_head * width).float())
        added = product(heads, layer.out, device, prefill=call.prefill)
        return added if layer.out_bias is None else added + layer.out_bias

    def _weights(self, index: int, watch: Watch, rotated: Tensor) -> NDArray[np.float32]:
        """Return where the watched rows attend in one layer, shape (rows, heads, cells)."""
        config = self.config
        group, width = config.n_head // config.n_head_kv, config.head_dim
        queries = rotated[watch.rows, : config.n_head]
        queries = queries.float().view(-1, config.n_head_kv, group, width)
        keys = self.keys[index, watch.seq, :, : watch.cells].float()
        scores = torch.einsum("rkgw,kcw->rkgc", queries, keys) * width**-0.5
        hidden = torch.from_numpy(watch.hidden).to(self.device.name)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        weights = torch.softmax(scores, -1).flatten(1, 2)
        found: NDArray[np.float32] = weights.cpu().numpy()
        return found


def _for_a_cell(rows: Tensor) -> Tensor:
    """Return rows in f16, finite: a cell may be read, times nothing, when it belongs to nobody."""
    return torch.nan_to_num(rows.half(), 0.0, _F16_MAX, -_F16_MAX)


class _Call:
    """Where the rows of a call go, and which cells each of them sees."""

    def __init__(self, rows: Rows, context: TorchContext) -> None:
        self.n = len(rows.seqs)
        self.watches = context.watcher.watches(rows)
        first, last = int(rows.seqs[0]), int(rows.seqs[-1])
        self.seqs = range(first, last + 1)
        self.rows = self.n // len(self.seqs)
        self.prefill = self.rows > MAX_DECODE_ROWS
        assert self.rows * len(self.seqs) == self.n, "equally many rows of neighbours"
        self.cells = [context.counts[seq] for seq in self.seqs]
        self.span = padded_cells(max(self.cells) + self.rows)
        self.turns = context.rotation.turns(rows.positions)
        config, device = context.config, context.device
        group = config.n_head // config.n_head_kv
        visible = np.zeros((len(self.seqs), self.rows, self.span), np.bool_)
        for at, (seq, count) in enumerate(zip(self.seqs, self.cells, strict=True)):
            mine = rows.positions[at * self.rows : (at + 1) * self.rows]
            known = context.positions[seq, :count]
            visible[at, :, :count] = known <= mine[:, None]
            visible[at, :, count : count + self.rows] = mine <= mine[:, None]
        least = max(device.least_rows - group * self.rows, 0)
        mask = torch.from_numpy(np.where(visible, np.float32(0), np.float32(-np.inf)))
        mask = mask.to(device.name).to(device.cache).unsqueeze(1).repeat(1, group, 1, 1)
        mask = mask.view(len(self.seqs), 1, group * self.rows, self.span)
        # rows that are added see everything, so that none of them is all but empty
        self.mask = fn.pad(mask, (0, 0, 0, least)) if least else mask
