"""Moving the cells of an MLX slice in the format that all backends share."""

from __future__ import annotations

import numpy as np

from pyagent_node.inference.backend import KV_ROWS, KvRange, LayerKv, Tokens
from pyagent_node.inference.mlx_backend.context import MlxContext
from pyagent_node.inference.stepping.cell_checks import (
    check_append,
    check_copy,
    checked_rows,
    note_cells,
)
from pyagent_node.inference.stepping.pruning import kept_positions
from pyagent_node.inference.stepping.sequences import SequenceLog


class MlxCells:
    """Implements ``stepping.CellMover``; ``first`` is the slice's first layer."""

    def __init__(self, context: MlxContext, first: int) -> None:
        self._context = context
        self._first = first

    def copy(self, log: SequenceLog, source: SequenceLog, start: int, stop: int) -> None:
        """Append cells of another sequence; errors as for :meth:`load`."""
        picked = check_copy(log, source, start, stop)
        positions = np.arange(start, stop, dtype=np.int32)
        self._context.write(log.seq, positions, self._context.read(source.seq, start, stop))
        log.append(start, source.tokens[picked])

    def shift(self, log: SequenceLog, start: int, stop: int, delta: int) -> None:
        """Move positions; errors as for :meth:`SequenceLog.shift`."""
        log.shift(start, stop, delta)
        self._context.shift(log.seq, start, stop, delta)

    def export(self, log: SequenceLog, start: int, stop: int) -> KvRange:
        """Return the cells of positions ``[start, stop)``; errors as for the port."""
        log.select(start, stop)
        layers = tuple(
            LayerKv(self._first + index, keys.tobytes(), values.tobytes())
            for index, (keys, values) in enumerate(self._context.read(log.seq, start, stop))
        )
        return KvRange(KV_ROWS, start, stop, layers)

    def load(self, log: SequenceLog, kv: KvRange, tokens: Tokens) -> None:
        """Append cells that came from elsewhere; errors as for the port."""
        context = self._context
        width = context.config.n_head_kv * context.config.head_dim
        rows = checked_rows(kv, tokens, self._first, context.n_layers, width)
        check_append(log, kv.start, kv.stop)
        context.write(log.seq, kept_positions(kv), rows)
        note_cells(log, kv, tokens)

    def doubt(self, seq: int) -> None:
        """Do nothing: the context puts a sequence back by itself when a call fails."""
