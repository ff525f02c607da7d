"""The benchmark reads a prompt as a rank does: what is given up, when, and what is held at most."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_node.benchmarks.served_pruning import ServedPrompt
from pyagent_node.inference.backend import CellAttention, PruneSequence, SequenceOp, WatchSequence
from pyagent_node.inference.kv.budgets import Pruning, budget


class Cells:
    """Cells that all are attended to alike."""

    def __init__(self) -> None:
        self.held = np.zeros(0, np.int32)
        self.watched = 0

    def apply(self, op: SequenceOp) -> None:
        if isinstance(op, WatchSequence):
            self.watched += 1
        else:
            assert isinstance(op, PruneSequence)
            self.held = np.concatenate([np.arange(*part, dtype=np.int32) for part in op.keep])

    def attention(self, seq: int) -> CellAttention:
        n = len(self.held)
        even = np.ones((2, n), np.float32)
        return CellAttention(self.held, even, even[0], np.ones(n, np.int32), even[:, 0], 32)


@pytest.mark.parametrize("cells", [0, 300])
def test_never_more_than_the_budget_and_a_piece_is_held(cells: int) -> None:
    backend, pruning = Cells(), Pruning(cells)
    prompt = ServedPrompt(backend, 0, cells, 8192, n_ctx=8192)
    prompt.watch()
    for start in range(0, 8192, 512):
        stop = start + 512
        backend.held = np.concatenate([backend.held, np.arange(start, stop, dtype=np.int32)])
        prompt.read(start, stop)
        assert len(backend.held) == min(stop, budget(pruning, stop))
        assert prompt.most <= budget(pruning, stop) + 512
    assert prompt.most > budget(pruning, 8192)
    assert prompt.rows == 32 * 16
