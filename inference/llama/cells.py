"""Moving KV cells between sequences, slices and processes, in the format of ``kv_state``.

llama.cpp reads and writes the cells of a sequence only as a whole: that costs a copy of all of them
(about a millisecond for a thousand tokens of a small model).  Where the cells of a sequence lie in
the order of their positions ranges are read, and appended, in memory (``cache_view``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, PyAgentError, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import KV_ROWS, KvRange, LayerKv, Tokens
from pyagent_node.inference.llama.cache_view import CacheView
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.llama.kv_state import (
    CellLayout,
    Cells,
    SequenceState,
    build_state,
    parse_state,
)
from pyagent_node.inference.stepping.cell_checks import check_append, check_codec, check_copy
from pyagent_node.inference.stepping.pruning import kept_positions
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog

GGML_F16: Final = 1
"""``GGML_TYPE_F16``."""


class CellStore:
    """Reads and writes the cells of a context; ``layout`` is ``None`` when they cannot be moved."""

    def __init__(
        self,
        context: LlamaContext,
        part: Slice,
        layout: CellLayout | None,
        cache: CacheView | None,
        *,
        appends: bool,
        takes_tokens: bool,
    ) -> None:
        """``cache`` reads cells in memory, and writes them where ``appends`` says so."""
        self._context = context
        self._part = part
        self._layout = layout
        self._cache = cache
        self._appends = appends
        self._doubtful: set[int] = set()
        self._takes_tokens = takes_tokens
        self._shifted = False

    def shift(self, log: SequenceLog, start: int, stop: int, delta: int) -> None:
        """Move positions; errors as for :meth:`SequenceLog.shift`, or ``no_shift``."""
        if not self._context.can_shift:
            raise Unsupported("Positions in this model cannot be moved.", code="no_shift")
        log.shift(start, stop, delta)
        self._context.shift(log.seq, start, stop, delta)
        self._shifted = True

    def doubt(self, seq: int) -> None:
        """Read this sequence through llama.cpp from now on: a call on it has failed half-way."""
        self._doubtful.add(seq)

    def export(self, log: SequenceLog, start: int, stop: int) -> KvRange:
        """Return the cells of positions ``[start, stop)``; errors as for the port."""
        log.select(start, stop)
        self._portable()
        if self._cache is not None and self._is_straight(log):
            rows = self._cache.read(log.seq, start, stop)
        else:
            cells = _picked(self._state(log), start, stop)
            pairs = zip(cells.keys, cells.values, strict=True)
            rows = [(key.tobytes(), value.tobytes()) for key, value in pairs]
        first = self._part.first
        layers = tuple(LayerKv(first + i, key, value) for i, (key, value) in enumerate(rows))
        return KvRange(KV_ROWS, start, stop, layers)

    def _is_straight(self, log: SequenceLog) -> bool:
        """Whether a sequence's cells are known to lie in the order of their positions."""
        return log.straight and log.seq not in self._doubtful

    def load(self, log: SequenceLog, kv: KvRange, tokens: Tokens) -> None:
        """Append cells that came from elsewhere; errors as for the port."""
        check_codec(kv)
        layout = self._portable()
        check_append(log, kv.start, kv.stop)
        positions = kept_positions(kv)
        count = kv.stop - kv.start
        if tokens.shape != (count,) or tokens.dtype != np.int32:
            raise CorruptData(f"{count} cells need {count} tokens.", code="kv_malformed")
        cells = self._checked(layout, kv, positions)
        before = log.count
        self._append(log, kv.start, tokens, cells)
        if len(positions) < count:
            old = np.arange(before, dtype=np.intp)
            log.prune(np.concatenate([old, before + (positions - kv.start).astype(np.intp)]))

    def copy(self, log: SequenceLog, source: SequenceLog, start: int, stop: int) -> None:
        """Append cells of another sequence; errors as for :meth:`load`."""
        self._portable()
        picked = check_copy(log, source, start, stop)
        tokens = source.tokens[picked]
        self._append(log, start, tokens, _picked(self._state(source), start, stop))

    @property
    def cache(self) -> CacheView | None:
        """The cells in memory, where they are known to be."""
        return self._cache

    def in_order(self, log: SequenceLog) -> bool:
        """Whether cell number i of a sequence is known to be the i-th of its log."""
        return log.ordered and log.seq not in self._doubtful

    def prune(self, log: SequenceLog, kept: NDArray[np.intp]) -> None:
        """Keep only the cells at the indices ``kept`` of an ordered log, side by side, and note it.

        What is kept is copied once on the way.  When llama.cpp refuses, the sequence is emptied.
        """
        layout, cache, context = self._portable(), self._cache, self._context
        assert cache is not None, "a backend that prunes sees the cells"
        positions = log.positions[kept]
        if self.in_order(log):
            cells = cache.pick(log.seq, kept, positions)
        else:
            state = self._state(log).cells
            picked = np.flatnonzero(np.isin(state.positions, positions))
            cells = state.pick(picked[np.argsort(state.positions[picked])])
        data = build_state(layout, [cells], seq=log.seq, n_streams=context.n_seq, rows=False)
        try:
            context.write_state(log.seq, data)
            cache.write(log.seq, 0, cells)
        except BaseException:
            context.drop(log.seq, 0)
            log.trim(0)
            raise
        self._doubtful.discard(log.seq)
        log.prune(kept)
        cache.release(log.seq, log.count)

    def _portable(self) -> CellLayout:
        if self._layout is None:
            raise Unsupported("The KV cache of this model cannot be moved.", code="kv_not_portable")
        return self._layout

    def _checked(self, layout: CellLayout, kv: KvRange, positions: NDArray[np.int32]) -> Cells:
        count = len(positions)
        expected = list(range(self._part.first, self._part.last))
        if [layer.layer for layer in kv.layers] != expected:
            raise CorruptData(
                f"KV of the layers {self._part} was expected in order; {len(kv.layers)} came.",
                code="kv_malformed",
            )
        keys: list[NDArray[np.uint8]] = []
        values: list[NDArray[np.uint8]] = []
        for layer, key, value in zip(kv.layers, layout.keys, layout.values, strict=True):
            for kind, data, rows in ((key, layer.keys, keys), (value, layer.values, values)):
                if len(data) != count * kind.nbytes:
                    raise CorruptData(
                        f"Layer {layer.layer} has {len(data)} bytes for {count} cells of"
                        f" {kind.nbytes}.",
                        code="kv_malformed",
                        layer=layer.layer,
                    )
                if kind.type == GGML_F16 and not np.isfinite(np.frombuffer(data, "<f2")).all():
                    # it would stay behind and reach the next user of the sequence
                    raise CorruptData(
                        f"The KV of layer {layer.layer} is not all finite.", code="not_finite"
                    )
                rows.append(np.frombuffer(data, np.uint8).reshape(count, kind.nbytes))
        return Cells(positions, tuple(keys), tuple(values))

    def _state(self, log: SequenceLog) -> SequenceState:
        """Read all cells of a sequence that has some."""
        if self._shifted:
            self._settle(log)
        state = parse_state(self._context.read_state(log.seq), self._context.n_seq)
        assert state is not None, "a sequence with cells has a state"
        return state

    def _settle(self, log: SequenceLog) -> None:
        """Make llama.cpp rotate the keys of shifted cells, which it puts off until a call."""
        one = np.ones(1, np.int32)
        context = self._context
        tapped = None if self._part.head else np.empty((1, context.n_embd), np.float32)
        rows = Rows(
            one * log.seq,
            one * log.end,
            one * 0 if self._takes_tokens else None,
            None if self._takes_tokens else np.zeros((1, context.n_embd), np.float32),
            np.zeros(1, np.int8),
        )
        context.decode(rows, tapped, lone_threads=1)
        context.drop(log.seq, log.end)
        self._shifted = False

    def _append(self, log: SequenceLog, start: int, tokens: Tokens, new: Cells) -> None:
        """Write checked cells of ``tokens`` behind those that are there, which stay if that fails.

        There may be fewer cells than tokens.
        """
        count = len(new.positions)
        if (
            self._cache is not None
            and self._appends
            and count == len(tokens)
            and start == log.count > 0
            and self._is_straight(log)
        ):
            try:
                self._context.claim(log.seq, start, count, takes_tokens=self._takes_tokens)
                self._cache.write(log.seq, start, new)
            except BaseException:
                self.doubt(log.seq)
                self._context.drop(log.seq, start)
                raise
            log.append(start, tokens)
            return
        layout, pieces = self._portable(), [new]
        if log.count:
            pieces.insert(0, self._state(log).cells)
        context = self._context

        def write(cells: Sequence[Cells]) -> None:
            data = build_state(layout, cells, seq=log.seq, n_streams=context.n_seq)
            context.write_state(log.seq, data)

        try:
            write(pieces)
        except PyAgentError:
            self.doubt(log.seq)
            if log.count:
                write(pieces[:1])
            raise
        log.append(start, tokens)


def _picked(state: SequenceState, start: int, stop: int) -> Cells:
    """Return the cells of positions ``[start, stop)``, by position."""
    positions = state.cells.positions
    inside = np.flatnonzero((positions >= start) & (positions < stop))
    return state.cells.pick(inside[np.argsort(positions[inside])])
