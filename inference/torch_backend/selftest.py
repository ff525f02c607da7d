"""What a torch slice finds out about itself when it is loaded: which widths change no bit."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import MAX_DECODE_ROWS
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.torch_backend.context import CELL_STEP, TorchContext

_PREFIX: Final = CELL_STEP - MAX_DECODE_ROWS // 2
"""Cells before the rows that are tried: those begin in one run of cells and end in the next."""
WIDTHS: Final = (2, 4, 8)


class Findings(NamedTuple):
    """Widths of one sequence that gave the bits of single rows, and those that did not."""

    passed: tuple[int, ...]
    failed: tuple[int, ...]


def run_self_test(context: TorchContext, *, n_ctx: int, head: bool, tokens: bool) -> Findings:
    """Compute the same made-up rows in calls of every width and compare; sequence 0 must be empty.

    A slice with too little room is taken to fail.
    """
    if n_ctx < _PREFIX + MAX_DECODE_ROWS:
        return Findings((1,), WIDTHS)
    rng = np.random.default_rng(0)
    n = _PREFIX + MAX_DECODE_ROWS
    made = rng.standard_normal((n, context.n_embd)).astype(np.float32)
    ids = rng.integers(0, context.config.n_vocab, n).astype(np.int32)

    def feed(start: int, stop: int) -> NDArray[np.float32]:
        span = slice(start, stop)
        rows = Rows(
            np.zeros(stop - start, np.int32),
            np.arange(start, stop, dtype=np.int32),
            ids[span] if tokens else None,
            None if tokens else made[span],
            np.ones(stop - start, np.int8),
        )
        out = None if head else np.empty((stop - start, context.n_embd), np.float32)
        context.decode(rows, out, lone_threads=1)
        if out is not None:
            return out
        return np.stack([context.logits(row) for row in range(stop - start)])

    def widths(width: int) -> NDArray[np.uint32]:
        context.drop(0, _PREFIX)
        pieces = [feed(at, at + width) for at in range(_PREFIX, n, width)]
        return np.concatenate(pieces).view(np.uint32)

    feed(0, _PREFIX)
    reference = widths(1)
    same = {width: np.array_equal(widths(width), reference) for width in WIDTHS}
    context.drop(0, 0)
    return Findings(
        (1, *(width for width in WIDTHS if same[width])),
        tuple(width for width in WIDTHS if not same[width]),
    )
