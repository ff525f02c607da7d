"""Rows in, activations or logits out, and the cells of each sequence, on MLX.

Cells are kept a sequence and a layer, in the order in which they came: keys and values of shape
(heads, cells, width), rounded to f16 as llama.cpp keeps them and on the wire, in the type that is
computed with.  Rows of several sequences share the matrix products; attention is computed for each
sequence alone.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import MAX_CALL_ROWS, Activations
from pyagent_node.inference.formats.weights import Weights
from pyagent_node.inference.mlx_backend.layers import Ends, Projections, Rope, load_layers
from pyagent_node.inference.mlx_backend.library import mapped_errors
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.watching import Watch, Watcher, end_all

GROWTH: Final = 256
"""Cells are made in steps of so many."""

Floats = NDArray[np.float16]


class _Sequence:
    """The cells of one sequence: ``count`` of those that its arrays have room for."""

    def __init__(self, n_layers: int) -> None:
        self.keys: list[mx.array | None] = [None] * n_layers
        self.values: list[mx.array | None] = [None] * n_layers
        self.positions: NDArray[np.int32] = np.zeros(0, np.int32)

    @property
    def count(self) -> int:
        return len(self.positions)

    @property
    def straight(self) -> bool:
        """Whether the cells lie in the order of their positions, which begin at 0."""
        return np.array_equal(self.positions, np.arange(self.count))


class _Group(NamedTuple):
    """Rows ``[offset, offset + n)`` of a call: one sequence's, from ``position`` on."""

    seq: int
    offset: int
    n: int
    position: int


class MlxContext:
    """Implements ``stepping.Computer`` for the slice ``part`` of ``weights``.

    Raises what reading raises, and :class:`LimitExceeded` (``not_enough_memory``).
    """

    def __init__(
        self, weights: Weights, part: Slice, *, n_ctx: int, n_seq: int, dtype: mx.Dtype
    ) -> None:
        config = weights.config
        self.config = config
        self.n_layers = part.last - part.first
        self.dtype = dtype
        self._n_ctx = n_ctx
        self._scale = config.head_dim**-0.5
        self._head = part.head
        with mapped_errors("loading a slice"):
            self._layers = load_layers(weights, part, dtype)
            self._ends = Ends(weights, part, dtype)
        self._rope = Rope(config)
        self._sequences = [_Sequence(self.n_layers) for _ in range(n_seq)]
        self.watcher = Watcher(self.n_layers)
        self._watches: list[Watch] = []
        self._logits: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._logit_rows: dict[int, int] = {}

    @property
    def n_embd(self) -> int:
        """Length of a row of activations."""
        return self.config.n_embd

    def close(self) -> None:
        """Forget weights and cells; idempotent."""
        self._layers = []
        self._sequences = []
        mx.clear_cache()

    # ---- computing -------------------------------------------------------------------------

    def decode(self, rows: Rows, out: Activations | None, *, lone_threads: int) -> None:
        """Compute one call; see ``Computer``.  MLX chooses its threads by itself."""
        n = len(rows.seqs)
        groups = _groups(rows)
        for seq, _, count, _ in groups:
            if self._sequences[seq].count + count > self._n_ctx:
                raise LimitExceeded("No KV cell is free for these tokens.", code="kv_full")
        self._watches = self.watcher.watches(rows)
        before = [(self._sequences[seq], self._sequences[seq].positions) for seq, *_ in groups]
        try:
            with mapped_errors("computing"):
                self._compute(rows, groups, n, out)
        except BaseException:
            for sequence, positions in before:
                sequence.positions = positions
            raise
        end_all(self._watches)

    def _compute(self, rows: Rows, groups: list[_Group], n: int, out: Activations | None) -> None:
        if rows.tokens is not None:
            x = self._ends.embed(mx.array(rows.tokens))
        else:
            assert rows.activations is not None, "a row is a token or activations"
            x = mx.array(rows.activations).astype(self.dtype)
        masks: list[mx.array | str | None] = []
        for seq, offset, count, position in groups:
            sequence = self._sequences[seq]
            sequence.positions = np.concatenate(
                (sequence.positions, rows.positions[offset : offset + count])
            )
            masks.append(_mask(sequence, count, position))
        for index, layer in enumerate(self._layers):
            parts = layer.project(x)
            attended = [
                self._attend(group, mask, index, parts)
                for group, mask in zip(groups, masks, strict=True)
            ]
            x = layer.finish(x, attended[0] if len(attended) == 1 else mx.concatenate(attended))
        touched = [a for seq, *_ in groups for a in self._arrays(seq)]
        if out is not None:
            x = x.astype(mx.float32)
            mx.eval(x, *touched)
            out[:] = np.array(x)
        else:
            self._keep_logits(x, rows, n, touched)

    def _keep_logits(self, x: mx.array, rows: Rows, n: int, touched: list[mx.array]) -> None:
        # of a few rows all, since how many share the product may show in the bits
        wanted = np.flatnonzero(rows.wanted) if n > MAX_CALL_ROWS else np.arange(n)
        if not rows.wanted.any():
            mx.eval(*touched)
            self._logit_rows = {}
            return
        picked = x if len(wanted) == n else x[mx.array(wanted)]
        logits = self._ends.logits(picked).astype(mx.float32)
        mx.eval(logits, *touched)
        self._logits = np.array(logits)
        self._logit_rows = {int(row): i for i, row in enumerate(wanted)}

    def _attend(
        self, group: _Group, mask: mx.array | str | None, layer: int, parts: Projections
    ) -> mx.array:
        """Append the rows' cells and return attention's output, shape (n, heads * width)."""
        sequence, offset, n = self._sequences[group.seq], group.offset, group.n

        def heads(x: mx.array) -> mx.array:
            return x[offset : offset + n].transpose(1, 0, 2)[None]

        queries = self._rope(heads(parts.queries), group.position)
        keys = self._rope(heads(parts.keys), group.position)
        stop = sequence.count
        all_keys, all_values = self._put(sequence, layer, stop - n, keys[0], heads(parts.values)[0])
        for watch in self._watches:
            if watch.seq == group.seq:
                watch.add(layer, self._weights(watch, queries, all_keys, offset))
        attended = mx.fast.scaled_dot_product_attention(
            queries,
            all_keys[None, :, :stop],
            all_values[None, :, :stop],
            scale=self._scale,
            mask=mask,
        )
        return attended[0].transpose(1, 0, 2).reshape(n, -1)

    def _weights(
        self, watch: Watch, queries: mx.array, keys: mx.array, offset: int
    ) -> NDArray[np.float32]:
        """Return where the watched rows attend in one layer, shape (rows, heads, cells)."""
        rows = slice(watch.rows.start - offset, watch.rows.stop - offset)
        wanted = queries[0, :, rows].astype(mx.float32)
        heads, n, width = wanted.shape
        wanted = wanted.reshape(self.config.n_head_kv, -1, n, width)
        seen = keys[:, None, : watch.cells].astype(mx.float32)
        scores = (wanted @ seen.swapaxes(-1, -2)) * self._scale
        visible = mx.array((~watch.hidden).astype(np.uint8)).astype(mx.bool_)
        scores = mx.where(visible, scores, -float("inf"))
        weights = mx.softmax(scores, axis=-1).reshape(heads, n, -1).transpose(1, 0, 2)
        found: NDArray[np.float32] = np.array(weights)
        return found

    def _put(
        self, sequence: _Sequence, layer: int, at: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Write cells at index ``at``; shapes (heads, n, width)."""
        made: list[mx.array] = []
        for store, new in ((sequence.keys, keys), (sequence.values, values)):
            rounded = new.astype(mx.float16).astype(self.dtype)
            stop = at + new.shape[1]
            held = store[layer]
            if held is None or held.shape[1] < stop:
                more = -(-stop // GROWTH) * GROWTH - (0 if held is None else held.shape[1])
                blank = mx.zeros((new.shape[0], more, new.shape[2]), self.dtype)
                held = blank if held is None else mx.concatenate([held, blank], axis=1)
            held[:, at:stop] = rounded
            store[layer] = held
            made.append(held)
        return made[0], made[1]

    def logits(self, row: int) -> NDArray[np.float32]:
        """Return the logits of a wanted row of the last call, shape (n_vocab,)."""
        found: NDArray[np.float32] = self._logits[self._logit_rows[row]]
        return found

    # ---- cells -----------------------------------------------------------------------------

    def drop(self, seq: int, start: int) -> None:
        """Remove the cells of ``seq`` at positions ``[start, ...)``."""
        sequence = self._sequences[seq]
        keep = np.flatnonzero(sequence.positions < start)
        if len(keep) == sequence.count:
            return
        if len(keep) == 0:
            self._sequences[seq] = _Sequence(self.n_layers)
            return
        if not np.array_equal(keep, np.arange(len(keep))):
            self._rearrange(sequence, keep)
        sequence.positions = sequence.positions[keep]

    def shift(self, seq: int, start: int, stop: int, delta: int) -> None:
        """Add ``delta`` to positions ``[start, stop)`` and turn their keys on."""
        sequence = self._sequences[seq]
        moved = np.flatnonzero((sequence.positions >= start) & (sequence.positions < stop))
        if not len(moved):
            return
        with mapped_errors("moving cells"):
            at = mx.array(moved)
            for layer, keys in enumerate(sequence.keys):
                assert keys is not None, "a sequence with cells has keys"
                cells = keys[:, at].transpose(1, 0, 2)[:, :, None]
                turned = self._rope(cells, delta)[:, :, 0].transpose(1, 0, 2)
                keys[:, at] = turned.astype(mx.float16).astype(self.dtype)
                sequence.keys[layer] = keys
            mx.eval(*self._arrays(seq))
        sequence.positions = sequence.positions.copy()
        sequence.positions[moved] += delta

    def read(self, seq: int, start: int, stop: int) -> list[tuple[Floats, Floats]]:
        """Return keys and values of positions ``[start, stop)``, a pair a layer.

        Each has shape (cells, heads * width), by position.
        """
        sequence = self._sequences[seq]
        inside = np.flatnonzero((sequence.positions >= start) & (sequence.positions < stop))
        at = mx.array(inside[np.argsort(sequence.positions[inside])])

        def rows(held: mx.array | None) -> Floats:
            assert held is not None, "a sequence with cells has arrays"
            picked = held[:, at].transpose(1, 0, 2).reshape(len(inside), -1)
            return np.array(picked.astype(mx.float16))

        with mapped_errors("reading cells"):
            return [
                (rows(keys), rows(values))
                for keys, values in zip(sequence.keys, sequence.values, strict=True)
            ]

    def write(
        self, seq: int, positions: NDArray[np.int32], layers: list[tuple[Floats, Floats]]
    ) -> None:
        """Append cells at ``positions``; shapes as :meth:`read` gives them."""
        sequence = self._sequences[seq]
        n, at = len(layers[0][0]), sequence.count
        if at + n > self._n_ctx:
            raise LimitExceeded("No KV cell is free for these tokens.", code="kv_full")
        shape = (n, self.config.n_head_kv, self.config.head_dim)

        def heads(rows: Floats) -> mx.array:
            return mx.array(rows).reshape(shape).transpose(1, 0, 2)

        with mapped_errors("writing cells"):
            for layer, (keys, values) in enumerate(layers):
                self._put(sequence, layer, at, heads(keys), heads(values))
            mx.eval(*self._arrays(seq))
        sequence.positions = np.concatenate((sequence.positions, positions))

    def _arrays(self, seq: int) -> list[mx.array]:
        sequence = self._sequences[seq]
        return [held for held in (*sequence.keys, *sequence.values) if held is not None]

    def keep(self, seq: int, kept: NDArray[np.intp]) -> None:
        """Keep the cells at these indices, which ascend, and no others; their memory goes."""
        sequence = self._sequences[seq]
        with mapped_errors("giving up cells"):
            self._rearrange(sequence, kept)
        sequence.positions = sequence.positions[kept]

    def _rearrange(self, sequence: _Sequence, keep: NDArray[np.intp]) -> None:
        """Keep the cells of these indices, in this order."""
        at = mx.array(keep)
        for store in (sequence.keys, sequence.values):
            for layer, held in enumerate(store):
                assert held is not None, "a sequence with cells has arrays"
                store[layer] = held[:, at]
        mx.eval(*(held for held in (*sequence.keys, *sequence.values) if held is not None))


def _groups(rows: Rows) -> list[_Group]:
    """Return (sequence, offset, rows, first position) of each sequence's rows, in order."""
    starts = np.flatnonzero(np.diff(rows.seqs, prepend=-1))
    stops = np.append(starts[1:], len(rows.seqs))
    return [
        _Group(int(rows.seqs[a]), int(a), int(b - a), int(rows.positions[a]))
        for a, b in zip(starts, stops, strict=True)
    ]


def _mask(sequence: _Sequence, n: int, position: int) -> mx.array | str | None:
    """Say which cells ``n`` new rows from ``position`` on may see: those up to their own."""
    if sequence.straight:
        return None if n == 1 else "causal"
    seen = sequence.positions[None, :] <= np.arange(position, position + n)[:, None]
    return mx.array(seen.astype(np.uint8)).astype(mx.bool_)
