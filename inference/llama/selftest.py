"""What a freshly loaded slice is put through: which widths of a call leave every bit as it is?

The reference is one row at a time on one thread.  Tried against it, with ``==``:

* one row on all threads;
* :data:`TRIED` rows of one sequence;
* the same beyond :data:`LONG` cells, where llama.cpp's CPU flash attention splits the cells of a
  lone row over the threads, so that its bits depend on their number (they do, with more than one);
* a row after the cells before it were exported and loaded again.

Only widths that passed are used, so a kernel that is not invariant costs speed, never bits.  Two or
three rows that take longer together than one by one are not used either (llama.cpp's way with a
single row is a special one).  A takeover waits for all this, so what a session can do without at
first is tried later, when it comes up: the widths between, and several sequences (see ``shapes``).

Measured on AVX-512: for SmolLM2-135M Q4_1 every shape passes at every length, and a lone row beyond
256 cells differs by up to 0.7 in its logits between one thread and two; for Qwen2.5-Coder 0.5B and
1.5B in Q4_K_M what has more than three rows in all does not pass, however they are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import PyAgentError, Unsupported
from pyagent_node.inference.backend import MAX_DECODE_ROWS
from pyagent_node.inference.llama.context import CELL_STEP, LlamaContext, Rows
from pyagent_node.inference.llama.kv_state import CellLayout, Cells, build_state, parse_state
from pyagent_node.inference.llama.shapes import LONG

TRIED: Final = (8, 4, 2, 3)
"""Widths that are tried at loading."""
BUDGET_SECONDS: Final = 2.0
"""After so long the last of them is left out; it is tried later."""

_NEEDED: Final = (8, 4, 2)
_DOUBTFUL: Final = (2, 3)
"""Widths that may take longer than as many single rows."""
_PREFIX: Final = 1
_LONG_CELLS: Final = LONG + 40
_F16: Final = 1
"""``GGML_TYPE_F16``."""

Outputs = NDArray[np.float32]


class LonePolicy(NamedTuple):
    """How a call of a single row is computed.

    ``long_threads`` counts beyond :data:`LONG` cells; with ``companion`` the row is computed there
    next to a copy of itself that is dropped afterwards, which keeps llama.cpp from splitting.
    """

    short_threads: int
    long_threads: int
    companion: bool


class Findings(NamedTuple):
    """``widths`` are safe, 1 among them; ``failed`` are not; ``slow`` are safe and not worth it.

    ``layout`` is ``None`` when KV cannot be moved.
    """

    widths: tuple[int, ...]
    failed: frozenset[int]
    slow: frozenset[int]
    lone: LonePolicy
    layout: CellLayout | None
    kv_portable: bool


class _Probe:
    """Feeds made-up rows to sequence 0 of a context."""

    def __init__(
        self,
        context: LlamaContext,
        clock: Callable[[], float],
        *,
        tapped: bool,
        takes_tokens: bool,
    ) -> None:
        self._context = context
        self._clock = clock
        self._tapped = tapped
        count = MAX_DECODE_ROWS + _PREFIX
        rng = np.random.default_rng(count)
        self._tokens = rng.integers(0, context.model.n_vocab, count).astype(np.int32)
        self._activations = rng.standard_normal((count, context.n_embd)).astype(np.float32)
        self._takes_tokens = takes_tokens
        self.fastest: dict[int, float] = {}
        """Seconds of the fastest call of so many rows."""

    def feed(self, start: int, rows: range, threads: int = 1) -> Outputs:
        """Compute ``rows`` of the made-up input at position ``start`` and after."""
        n = len(rows)
        batch = Rows(
            np.zeros(n, np.int32),
            np.arange(start, start + n, dtype=np.int32),
            self._tokens[rows.start : rows.stop] if self._takes_tokens else None,
            None if self._takes_tokens else self._activations[rows.start : rows.stop],
            np.ones(n, np.int8),
        )
        out = np.empty((n, self._context.n_embd), np.float32) if self._tapped else None
        begun = self._clock()
        self._context.decode(batch, out, lone_threads=threads)
        seconds = self._clock() - begun
        self.fastest[n] = min(seconds, self.fastest.get(n, seconds))
        return out if out is not None else np.stack([self._context.logits(i) for i in range(n)])

    def singly(self, start: int) -> Outputs:
        """Compute :data:`MAX_DECODE_ROWS` rows one by one, on one thread: the reference."""
        ones = [self.feed(start + i, range(i, i + 1)) for i in range(MAX_DECODE_ROWS)]
        return np.concatenate(ones)

    def same(self, start: int, width: int, reference: Outputs, threads: int = 1) -> bool:
        """Whether so many rows in one call are those of the reference; they are dropped again."""
        out = self.feed(start, range(width), threads)
        self.drop(start)
        return np.array_equal(out, reference[:width])

    def slow(self, widths: Iterable[int]) -> frozenset[int]:
        """Return those of ``widths`` whose rows took longer together than one by one."""
        fast = self.fastest
        return frozenset(w for w in widths if w in _DOUBTFUL and fast[w] > w * fast[1])

    def drop(self, start: int) -> None:
        """Remove the cells from ``start`` on."""
        self._context.drop(0, start)


def run_self_test(
    context: LlamaContext,
    *,
    n_cells: int,
    tapped: bool,
    takes_tokens: bool,
    clock: Callable[[], float],
) -> Findings:
    """Put a context without cells through its tests, and leave it without cells.

    ``clock`` returns seconds.  Raises :class:`Unavailable` when the slice cannot compute at all.
    """
    probe = _Probe(context, clock, tapped=tapped, takes_tokens=takes_tokens)
    until = clock() + BUDGET_SECONDS
    probe.feed(0, range(MAX_DECODE_ROWS, MAX_DECODE_ROWS + _PREFIX))
    reference = probe.singly(_PREFIX)
    layout, portable = _round_trip(context, probe, reference)
    probe.drop(_PREFIX)

    short = context.threads
    if short > 1 and not probe.same(_PREFIX, 1, reference, short):
        short = 1
    tried = [width for width in TRIED if width in _NEEDED or clock() < until]
    kept = [width for width in tried if probe.same(_PREFIX, width, reference)]
    slow = probe.slow(kept)
    probe.drop(0)

    lone = LonePolicy(short, 1, companion=False)
    if n_cells >= 2 * CELL_STEP and layout is not None:
        probe.fastest.clear()
        kept, lone = _long(context, probe, layout, kept, short)
        slow &= probe.slow(kept)
        probe.drop(0)
    failed = frozenset(tried) - set(kept)
    return Findings((1, *sorted(kept)), failed, slow, lone, layout, portable)


def _round_trip(
    context: LlamaContext, probe: _Probe, reference: Outputs
) -> tuple[CellLayout | None, bool]:
    """Export what sequence 0 holds, load half of it again and repeat the next row."""
    half = MAX_DECODE_ROWS // 2
    try:
        state = parse_state(context.read_state(0), context.n_seq)
    except Unsupported:
        return None, False
    if state is None or len(state.cells.positions) != MAX_DECODE_ROWS + _PREFIX:
        return None, False
    kept = state.cells.pick(np.flatnonzero(state.cells.positions < _PREFIX + half))
    data = build_state(state.layout, [kept], seq=0, n_streams=context.n_seq)
    try:
        context.write_state(0, data)
    except PyAgentError:
        return None, False
    again = probe.feed(_PREFIX + half, range(half, half + 1))
    return state.layout, np.array_equal(again[0], reference[half])


def _long(
    context: LlamaContext, probe: _Probe, layout: CellLayout, widths: Iterable[int], short: int
) -> tuple[list[int], LonePolicy]:
    """Repeat the tests over made-up cells; return the widths left and how to compute lone rows."""
    if any(kind.type != _F16 for kind in (*layout.keys, *layout.values)):
        # what cannot be tried is not used
        return [], LonePolicy(short, 1, companion=False)
    context.write_state(0, _made_up_cells(layout, n_streams=context.n_seq))
    start, threads = _LONG_CELLS, context.threads
    reference = probe.singly(start)
    probe.drop(start)
    kept = [width for width in widths if probe.same(start, width, reference)]
    if threads == 1:
        return kept, LonePolicy(short, 1, companion=False)
    if probe.same(start, 1, reference, threads):
        return kept, LonePolicy(short, threads, companion=False)
    companion = 2 in kept and probe.fastest[2] < probe.fastest[1]
    return kept, LonePolicy(short, 1, companion=companion)


def _made_up_cells(layout: CellLayout, *, n_streams: int) -> NDArray[np.uint8]:
    """Finite f16 cells for sequence 0: the same few numbers in every layer."""
    widest = max(kind.nbytes for kind in (*layout.keys, *layout.values))
    numbers = np.random.default_rng(_LONG_CELLS).standard_normal(
        (_LONG_CELLS, widest // 2), np.float32
    )
    rows = numbers.astype("<f2").view(np.uint8)

    def cut(nbytes: int) -> NDArray[np.uint8]:
        return rows[:, :nbytes]

    cells = Cells(
        np.arange(_LONG_CELLS, dtype=np.int32),
        tuple(cut(kind.nbytes) for kind in layout.keys),
        tuple(cut(kind.nbytes) for kind in layout.values),
    )
    return build_state(layout, [cells], seq=0, n_streams=n_streams)
