"""What a freshly loaded slice is put through: which widths of a call leave every bit as it is?

The reference is one row at a time on one thread.  Tried against it, with ``==``:

* one row on all threads;
* :data:`TRIED` rows of one sequence;
* the same beyond :data:`LONG` cells, where llama.cpp's CPU flash attention splits the cells of a
  lone row over the threads, so that its bits depend on their number (they do, with more than one);
* a row after the cells before it were exported and loaded again;
* cells read from memory (``cache_view``), against llama.cpp's own export;
* a prompt cut at a multiple of 64 positions, see :func:`_prefill_cut`.

Only widths that passed are used, so a kernel that is not invariant costs speed, never bits.  Two or
three rows that take longer together than one by one are not used either (llama.cpp's way with a
single row is a special one).  A takeover waits for all this, so what a session can do without at
first is tried later, as it comes up: the widths between, and several sequences (see ``shapes``).

Measured on AVX-512: for SmolLM2-135M Q4_1 every shape passes at every length, and a lone row beyond
256 cells differs by up to 0.7 in its logits between one thread and two; for Qwen2.5-Coder 0.5B and
1.5B in Q4_K_M what has more than three rows in all does not pass, however they are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np

from pyagent_node.base.errors import PyAgentError, Unsupported
from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK
from pyagent_node.inference.llama.cache_view import CacheView, find_cache
from pyagent_node.inference.llama.context import CELL_STEP, LlamaContext
from pyagent_node.inference.llama.kv_state import CellLayout, Cells, build_state, parse_state
from pyagent_node.inference.llama.probe import LONG_CELLS, PREFIX, Outputs, Probe, made_up_cells
from pyagent_node.inference.stepping.calls import LonePolicy
from pyagent_node.inference.stepping.shapes import LONG
from pyagent_node.native import HeldTensor
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

TRIED: Final = (8, 4, 2, 3)
"""Widths that are tried at loading."""
BUDGET_SECONDS: Final = 2.0
"""After so long width 3 is left out; it is tried later."""
CUT_SECONDS: Final = 2.0
"""Where trying cuts would take longer prompts are not cut."""

_NEEDED: Final = (8, 4, 2)
_DOUBTFUL: Final = (2, 3)
"""Widths that may take longer than as many single rows."""
_CUT_CELLS: Final = LONG - BLOCK_TOKENS
_CUT_ROWS: Final = 2 * BLOCK_TOKENS + MAX_DECODE_ROWS
_F16: Final = 1
"""``GGML_TYPE_F16``."""


class Moving(NamedTuple):
    """How cells can be moved: not at all without a layout, not from memory without a cache.

    ``appends`` says whether cells can be written into memory, too, ``queried`` whether queries of
    the expected size were seen.
    """

    layout: CellLayout | None
    exact: bool
    cache: CacheView | None
    appends: bool = False
    queried: bool = False


class Findings(NamedTuple):
    """``widths`` are safe, 1 among them; ``failed`` are not; ``slow`` are safe and not worth it.

    A prompt may be cut at multiples of ``prefill_cut`` positions.
    """

    widths: tuple[int, ...]
    failed: frozenset[int]
    slow: frozenset[int]
    lone: LonePolicy
    moving: Moving
    prefill_cut: int


def run_self_test(
    context: LlamaContext,
    *,
    n_cells: int,
    tapped: bool,
    takes_tokens: bool,
    clock: Callable[[], float],
    query_width: int = 0,
) -> Findings:
    """Put a context without cells through its tests, and leave it without cells.

    ``clock`` returns seconds, ``query_width`` is how many numbers a layer's queries should have, 0
    where that is not known.  Raises :class:`Unavailable` when the slice cannot compute at all.
    """
    probe = Probe(context, clock, tapped=tapped, takes_tokens=takes_tokens)
    until = clock() + BUDGET_SECONDS
    context.watch_cache()
    if query_width:
        out = np.empty((context.model.n_layers, PREFIX, query_width), np.float32)
        context.query(out, np.arange(PREFIX, dtype=np.int32), PREFIX)
    probe.feed(0, range(MAX_DECODE_ROWS, MAX_DECODE_ROWS + PREFIX))
    queried = query_width > 0 and context.queried()
    found = context.found_cache()
    reference = probe.singly(PREFIX)
    moving = _round_trip(probe, reference, found, n_cells)._replace(queried=queried)
    probe.drop(PREFIX)

    short = context.threads
    if short > 1 and not probe.same(PREFIX, 1, reference, short):
        short = 1
    tried = [width for width in TRIED if width in _NEEDED or clock() < until]
    kept = [width for width in tried if probe.same(PREFIX, width, reference)]
    slow = _slow(probe, kept)
    probe.drop(0)

    lone, cut = LonePolicy(short, 1, companion=False), PREFILL_CHUNK
    if n_cells >= 2 * CELL_STEP and moving.layout is not None:
        probe.fastest.clear()
        context.write_state(0, made_up_cells(moving.layout, n_streams=context.n_seq))
        kept, lone = _long(probe, moving.layout, kept, short)
        slow &= _slow(probe, kept)
        if moving.cache is not None and not _reads_alike(context, moving.cache, 0):
            moving = moving._replace(cache=None)
        if moving.exact:
            probe.drop(_CUT_CELLS)
            cut = _prefill_cut(probe) if context.can_decode_early else _whole_cut(probe)
        probe.drop(0)
    failed = frozenset(tried) - set(kept)
    return Findings((1, *sorted(kept)), failed, slow, lone, moving, cut)


def _slow(probe: Probe, widths: Iterable[int]) -> frozenset[int]:
    """Return those of ``widths`` whose rows took longer together than one by one."""
    fast = probe.fastest
    return frozenset(w for w in widths if w in _DOUBTFUL and fast[w] > w * fast[1])


def _round_trip(
    probe: Probe, reference: Outputs, found: Iterable[HeldTensor], n_cells: int
) -> Moving:
    """Export what sequence 0 holds, load half of it again and repeat the next row.

    The last sequence gets cells, too, and loses them again.
    """
    context, half = probe.context, MAX_DECODE_ROWS // 2
    nothing = Moving(None, exact=False, cache=None)
    try:
        state = parse_state(context.read_state(0), context.n_seq)
    except Unsupported:
        return nothing
    if state is None or len(state.cells.positions) != MAX_DECODE_ROWS + PREFIX:
        return nothing
    layout, n_seq = state.layout, context.n_seq
    cache = find_cache(found, layout, n_cells=n_cells, n_seq=n_seq)
    alike = cache is not None and _holds(cache, 0, state.cells)
    kept = state.cells.pick(np.flatnonzero(state.cells.positions < PREFIX + half))
    try:
        for seq in {0, n_seq - 1}:
            context.write_state(seq, build_state(layout, [kept], seq=seq, n_streams=n_seq))
    except PyAgentError:
        return nothing
    again = probe.feed(PREFIX + half, range(half, half + 1))
    exact = np.array_equal(again[0], reference[half])
    for seq in {0, n_seq - 1}:
        alike = alike and cache is not None and _reads_alike(context, cache, seq)
    appends = alike and cache is not None and _appends(probe, cache, state.cells, reference)
    if n_seq > 1:
        context.drop(n_seq - 1, 0)
    return Moving(layout, exact, cache if alike else None, appends)


def _appends(probe: Probe, cache: CacheView, cells: Cells, reference: Outputs) -> bool:
    """Whether cells written into memory are there for llama.cpp, and for the row behind them.

    Both sequences hold the first ``half`` of ``cells``, sequence 0 one more.
    """
    context, half, last = probe.context, PREFIX + MAX_DECODE_ROWS // 2, len(cells.positions) - 1
    for seq in sorted({0, context.n_seq - 1}):
        start = half + (seq == 0)
        stop = last if seq == 0 else last + 1
        context.claim(seq, start, stop - start, takes_tokens=probe.takes_tokens)
        cache.write(seq, start, cells.pick(np.arange(start, stop)))
    again = probe.feed(last, range(MAX_DECODE_ROWS - 1, MAX_DECODE_ROWS))
    if not np.array_equal(again[0], reference[-1]):
        return False
    for seq in sorted({0, context.n_seq - 1}):
        state = parse_state(context.read_state(seq), context.n_seq)
        if state is None or not _equal(state.cells, cells):
            return False
    return True


def _equal(one: Cells, other: Cells) -> bool:
    """Whether cells are the same ones."""
    mine, theirs = (*one.keys, *one.values), (*other.keys, *other.values)
    return np.array_equal(one.positions, other.positions) and all(
        np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)
    )


def _reads_alike(context: LlamaContext, cache: CacheView, seq: int) -> bool:
    """Whether the cells of a sequence in memory are those that llama.cpp exports."""
    state = parse_state(context.read_state(seq), context.n_seq)
    return state is not None and _holds(cache, seq, state.cells)


def _holds(cache: CacheView, seq: int, cells: Cells) -> bool:
    """Whether the memory of a sequence holds these cells, in the order of their positions."""
    count = len(cells.positions)
    if not np.array_equal(cells.positions, np.arange(count)):
        return False
    pairs = zip(cells.keys, cells.values, strict=True)
    return all(
        keys == key.tobytes() and values == value.tobytes()
        for (keys, values), (key, value) in zip(cache.read(seq, 0, count), pairs, strict=True)
    )


def _long(
    probe: Probe, layout: CellLayout, widths: Iterable[int], short: int
) -> tuple[list[int], LonePolicy]:
    """Repeat the tests over made-up cells; return the widths left and how to compute lone rows."""
    if any(kind.type != _F16 for kind in (*layout.keys, *layout.values)):
        # what cannot be tried is not used
        return [], LonePolicy(short, 1, companion=False)
    start, threads = LONG_CELLS, probe.context.threads
    reference = probe.singly(start)
    probe.drop(start)
    kept = [width for width in widths if probe.same(start, width, reference)]
    if threads == 1:
        return kept, LonePolicy(short, 1, companion=False)
    companion = 2 in kept and probe.fastest[2] < probe.fastest[1]
    if probe.same(start, 1, reference, threads):
        return kept, LonePolicy(short, threads, companion=False)
    return kept, LonePolicy(short, 1, companion=companion)


def _prefill_cut(probe: Probe) -> int:
    """Return 64 when a prompt may be cut at multiples of 64, else :data:`PREFILL_CHUNK`.

    llama.cpp's flash attention walks over tiles of 64 rows once there are as many, so that a piece
    of a prompt can have the same bits however it was cut, if every part begins at a tile and has 64
    rows.  Tried behind :data:`_CUT_CELLS` cells with 64 rows, with 72 more, and with all of them at
    once: the first part then walks over 256 cells and the others over 512.

    Only as many layers are computed as show each kind of layer that the slice has; the rest would
    repeat the same kernels, and takes longer than all other tests together.
    """
    first, rest = range(BLOCK_TOKENS), range(BLOCK_TOKENS, _CUT_ROWS)
    begun = probe.clock()
    parts = [probe.early(_CUT_CELLS, first)]
    took = probe.clock() - begun
    if took * (len(rest) + _CUT_ROWS) / len(first) > CUT_SECONDS:
        return PREFILL_CHUNK
    parts.append(probe.early(_CUT_CELLS + len(first), rest))
    probe.drop(_CUT_CELLS)
    whole = probe.early(_CUT_CELLS, range(_CUT_ROWS))
    return BLOCK_TOKENS if np.array_equal(np.concatenate(parts), whole) else PREFILL_CHUNK


def _whole_cut(probe: Probe) -> int:
    """Do as :func:`_prefill_cut` where only the rows that are wanted leave the layers.

    So it is when the slice has the output head and all of its layers are needed, as one layer alone
    is.  What counts is the last row of a prompt, and the cells of all rows.
    """
    context, first, stop = probe.context, BLOCK_TOKENS, _CUT_CELLS + _CUT_ROWS
    begun = probe.clock()
    probe.last(_CUT_CELLS, range(first))
    took = probe.clock() - begun
    if took * (2 * _CUT_ROWS - first) / first > CUT_SECONDS:
        return PREFILL_CHUNK
    parts = probe.last(_CUT_CELLS + first, range(first, _CUT_ROWS))
    state = parse_state(context.read_state(0), context.n_seq)
    probe.drop(_CUT_CELLS)
    whole = probe.last(_CUT_CELLS, range(_CUT_ROWS))
    again = parse_state(context.read_state(0), context.n_seq)
    if state is None or again is None or len(again.cells.positions) != stop:
        return PREFILL_CHUNK
    same = np.array_equal(parts, whole) and _equal(state.cells, again.cells)
    return BLOCK_TOKENS if same else PREFILL_CHUNK
