"""What a freshly loaded slice is put through: which shapes of a call leave every bit as it is?

The reference is one row at a time on one thread.  Tried against it, with ``==``:

* one row on all threads;
* 2 to 8 rows of one sequence, and one row each of 2 to 8 sequences;
* several rows of several sequences (``batching.JOINT_SHAPES``), where both numbers passed;
* the same beyond :data:`LONG` cells, where llama.cpp's CPU flash attention splits the cells of a
  lone row over the threads, so that its bits depend on their number (they do, with more than one);
* a row after the cells before it were exported and loaded again.

Only shapes that passed are used, so a kernel that is not invariant costs speed, never bits.  Two or
three rows that take longer together than one by one are not used either (llama.cpp's way with a
single row is a special one).
Measured on AVX-512: for SmolLM2-135M Q4_1 every shape passes at every length, and a lone row beyond
256 cells differs by up to 0.7 in its logits between one thread and two; for Qwen2.5-Coder 0.5B and
1.5B in Q4_K_M what has more than three rows in all does not pass, however they are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import PyAgentError, Unsupported
from pyagent_node.inference.backend import MAX_DECODE_ROWS
from pyagent_node.inference.llama.batching import JOINT_SHAPES, Shape
from pyagent_node.inference.llama.context import CELL_STEP, LlamaContext, Rows
from pyagent_node.inference.llama.kv_state import CellLayout, Cells, build_state, parse_state

LONG: Final = CELL_STEP
"""With more cells than this in a sequence, attention walks over 512 or more."""
BUDGET_SECONDS: Final = 2.0
"""After so long only widths 8, 4 and 2 are still tried; what was not tried is not used."""
SHAPES_SECONDS: Final = 0.4
"""How long shapes of several rows of several sequences are tried: a takeover waits for it too."""

_ORDER: Final = (8, 4, 2, 6, 3, 5, 7)
_NEEDED: Final = (8, 4, 2)
_TRIES: Final = 3
_DOUBTFUL: Final = (2, 3)
"""Widths that may take longer than as many single rows."""
_MOST_SEQUENCES: Final = max(shape.sequences for shape in JOINT_SHAPES)
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
    """``widths`` are safe, 1 among them, and so are ``shapes``; ``slow`` are widths not worth it.

    ``layout`` is ``None`` when KV cannot be moved.
    """

    widths: tuple[int, ...]
    slow: frozenset[int]
    shapes: tuple[Shape, ...]
    lone: LonePolicy
    layout: CellLayout | None
    kv_portable: bool


class _Probe:
    """Feeds made-up rows to a context, from position :data:`_PREFIX` or wherever it is told."""

    def __init__(self, context: LlamaContext, *, tapped: bool, takes_tokens: bool) -> None:
        self._context = context
        self._tapped = tapped
        count = MAX_DECODE_ROWS + _PREFIX
        rng = np.random.default_rng(count)
        self._tokens = rng.integers(0, context.model.n_vocab, count).astype(np.int32)
        self._activations = rng.standard_normal((count, context.n_embd)).astype(np.float32)
        self._takes_tokens = takes_tokens

    def feed(
        self, seqs: Sequence[int], start: int, rows: Sequence[int], threads: int = 1
    ) -> Outputs:
        """Compute ``rows`` of the made-up input in each of the sequences, one after the other."""
        n = len(rows) * len(seqs)
        picked = list(rows) * len(seqs)
        batch = Rows(
            np.repeat(np.array(seqs, np.int32), len(rows)),
            np.tile(np.arange(start, start + len(rows), dtype=np.int32), len(seqs)),
            self._tokens[picked] if self._takes_tokens else None,
            None if self._takes_tokens else self._activations[picked],
            np.ones(n, np.int8),
        )
        out = np.empty((n, self._context.n_embd), np.float32) if self._tapped else None
        self._context.decode(batch, out, lone_threads=threads)
        return out if out is not None else np.stack([self._context.logits(i) for i in range(n)])

    def drop(self, seqs: Sequence[int], start: int) -> None:
        for seq in seqs:
            self._context.drop(seq, start)


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
    probe = _Probe(context, tapped=tapped, takes_tokens=takes_tokens)
    until = clock() + BUDGET_SECONDS
    every = range(context.n_seq)
    prefix = range(MAX_DECODE_ROWS, MAX_DECODE_ROWS + _PREFIX)
    sharing = min(context.n_seq, MAX_DECODE_ROWS)
    for seq in range(min(context.n_seq, _MOST_SEQUENCES)):
        probe.feed([seq], 0, prefix)
    ones = [
        _timed(clock, partial(probe.feed, [0], _PREFIX + i, [i])) for i in range(MAX_DECODE_ROWS)
    ]
    reference = np.concatenate([out for out, _ in ones])
    layout, portable = _round_trip(context, probe, reference)
    probe.drop([0], _PREFIX)

    threads = context.threads
    short = threads
    if threads > 1:
        same = np.array_equal(probe.feed([0], _PREFIX, [0], threads), reference[:1])
        short = threads if same else 1
        probe.drop([0], _PREFIX)

    widths = [1]
    for width in _ORDER:
        if clock() > until and width not in _NEEDED:
            continue
        rows = range(width)
        same = np.array_equal(probe.feed([0], _PREFIX, rows), reference[:width])
        probe.drop([0], _PREFIX)
        if same and 1 < width <= sharing:
            out = probe.feed(range(width), _PREFIX, [0])
            same = all(np.array_equal(row, reference[0]) for row in out)
            probe.drop(range(width), _PREFIX)
        if same:
            widths.append(width)
    one = min(seconds for _, seconds in ones)
    slow = frozenset(
        width for width in _DOUBTFUL if width in widths and _slow(probe, clock, width, one)
    )
    shapes = _joint(probe, reference, widths, n_seq=context.n_seq, clock=clock)
    probe.drop(every, 0)

    lone = LonePolicy(short, 1, companion=False)
    if n_cells >= 2 * CELL_STEP and layout is not None:
        widths, shapes, lone = _long(context, probe, layout, widths, shapes, short, clock)
        probe.drop(every, 0)
    return Findings(tuple(sorted(widths)), slow, tuple(sorted(shapes)), lone, layout, portable)


def _slow(probe: _Probe, clock: Callable[[], float], width: int, one: float) -> bool:
    """Return whether so many rows take longer than as many single ones, of ``one`` second each."""
    tries: list[float] = []
    for _ in range(_TRIES):
        tries.append(_timed(clock, partial(probe.feed, [0], _PREFIX, range(width)))[1])
        probe.drop([0], _PREFIX)
    return min(tries) > width * one


def _joint(
    probe: _Probe,
    reference: Outputs,
    widths: Sequence[int],
    *,
    n_seq: int,
    clock: Callable[[], float],
) -> list[Shape]:
    """Return the joint shapes that pass behind the prefix, which all sequences hold."""
    until = clock() + SHAPES_SECONDS
    kept: list[Shape] = []
    for shape in JOINT_SHAPES:
        if clock() > until:
            break
        each = {shape.rows, min(shape.sequences, MAX_DECODE_ROWS)}
        if shape.sequences > n_seq or not each <= set(widths):
            continue
        seqs, rows = range(shape.sequences), range(shape.rows)
        if _all_equal(probe.feed(seqs, _PREFIX, rows), reference[: shape.rows]):
            kept.append(shape)
        probe.drop(seqs, _PREFIX)
    return kept


def _all_equal(out: Outputs, reference: Outputs) -> bool:
    """Return whether each of the sequences in ``out`` got the rows of the reference."""
    n = len(reference)
    return all(np.array_equal(out[at : at + n], reference) for at in range(0, len(out), n))


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
    again = probe.feed([0], _PREFIX + half, [half])
    return state.layout, np.array_equal(again[0], reference[half])


def _long(  # noqa: PLR0917 - private, one caller
    context: LlamaContext,
    probe: _Probe,
    layout: CellLayout,
    widths: list[int],
    shapes: list[Shape],
    short: int,
    clock: Callable[[], float],
) -> tuple[list[int], list[Shape], LonePolicy]:
    """Repeat the tests over made-up cells; return what is left and how to compute lone rows.

    Of the shapes with equally many rows a sequence only the widest is tried: the number of cells
    matters to attention alone, where each sequence is by itself.
    """
    sharing = min(context.n_seq, MAX_DECODE_ROWS)
    if any(kind.type != _F16 for kind in (*layout.keys, *layout.values)):
        return [1], [], LonePolicy(short, 1, companion=False)
    most = max((shape.sequences for shape in shapes), default=1)
    for seq in range(max(most, min(sharing, max(widths)))):
        context.write_state(seq, _made_up_cells(layout, seq=seq, n_streams=context.n_seq))
    start = _LONG_CELLS
    pair = _timed(clock, lambda: probe.feed([0], start, [0, 1], context.threads))
    probe.drop([0], start)
    alone = _timed(clock, lambda: probe.feed([0], start, [0]))
    reference = alone[0][0]
    probe.drop([0], start)
    kept = [1]
    for width in sorted(w for w in widths if w > 1):
        rows = probe.feed([0], start, range(width))[0] if width != 2 else pair[0][0]
        same = np.array_equal(rows, reference)
        probe.drop([0], start)
        if same and width <= sharing and width in (2, max(widths)):
            out = probe.feed(range(width), start, [0])
            same = all(np.array_equal(row, reference) for row in out)
            probe.drop(range(width), start)
        if same:
            kept.append(width)
    joint = _joint_long(probe, shapes, kept)
    if context.threads == 1:
        return kept, joint, LonePolicy(short, 1, companion=False)
    if np.array_equal(probe.feed([0], start, [0], context.threads)[0], reference):
        return kept, joint, LonePolicy(short, context.threads, companion=False)
    companion = 2 in kept and pair[1] < alone[1]
    return kept, joint, LonePolicy(short, 1, companion=companion)


def _joint_long(probe: _Probe, shapes: Sequence[Shape], widths: Sequence[int]) -> list[Shape]:
    """Return those of ``shapes`` that pass over long sequences too."""
    start, kept = _LONG_CELLS, list[Shape]()
    for rows in {shape.rows for shape in shapes} & set(widths):
        alike = [shape for shape in shapes if shape.rows == rows]
        seqs = range(max(shape.sequences for shape in alike))
        reference = np.concatenate([probe.feed([0], start + i, [i]) for i in range(rows)])
        probe.drop([0], start)
        if _all_equal(probe.feed(seqs, start, range(rows)), reference):
            kept += alike
        probe.drop(seqs, start)
    return kept


def _timed(clock: Callable[[], float], work: Callable[[], Outputs]) -> tuple[Outputs, float]:
    begun = clock()
    return work(), clock() - begun


def _made_up_cells(layout: CellLayout, *, seq: int, n_streams: int) -> NDArray[np.uint8]:
    """The same finite f16 cells for every sequence."""
    rng = np.random.default_rng(_LONG_CELLS)

    def rows(nbytes: int) -> NDArray[np.uint8]:
        values = rng.standard_normal((_LONG_CELLS, nbytes // 2), np.float32).astype("<f2")
        return values.view(np.uint8).reshape(_LONG_CELLS, nbytes)

    cells = Cells(
        np.arange(_LONG_CELLS, dtype=np.int32),
        tuple(rows(kind.nbytes) for kind in layout.keys),
        tuple(rows(kind.nbytes) for kind in layout.values),
    )
    return build_state(layout, [cells], seq=seq, n_streams=n_streams)
