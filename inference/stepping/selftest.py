"""What a freshly loaded slice is put through, for backends whose kernels are another library's.

The reference is one row at a time; widths whose results are the same to the bit may be used, so a
kernel that is not invariant costs speed, never bits.  Then cells are exported and loaded again.
Backends with peculiarities worth knowing have a test of their own (``llama.selftest``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    Activations,
    KvRange,
    LayerKv,
    Tokens,
)
from pyagent_node.inference.stepping.backend import CellMover
from pyagent_node.inference.stepping.calls import Computer
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog

TRIED: Final = (8, 4, 2, 3)
"""Widths that are tried, over few cells and over many."""
_STARTS: Final = (1, 300)
"""How many cells come before the rows that are tried."""
_SEED: Final = 256


class Findings(NamedTuple):
    """``widths`` are safe, 1 among them; ``failed`` are not; ``slow`` are safe and not worth it.

    ``portable`` says that cells that were exported and loaded again gave the same bits.
    """

    widths: tuple[int, ...]
    failed: frozenset[int]
    slow: frozenset[int]
    portable: bool


class _Probe:
    """Feeds made-up rows to sequence 0."""

    def __init__(
        self,
        context: Computer,
        *,
        n_ctx: int,
        n_vocab: int,
        takes_tokens: bool,
        head: bool,
        clock: Callable[[], float],
    ) -> None:
        rng = np.random.default_rng(_SEED)
        self.context = context
        self._head = head
        self._clock = clock
        n = min(n_ctx, max(_STARTS) + MAX_DECODE_ROWS)
        self.tokens: Tokens = rng.integers(0, max(1, n_vocab), n).astype(np.int32)
        self._rows: Activations | None = None
        if not takes_tokens:
            self._rows = rng.standard_normal((n, context.n_embd), np.float32)
        self.fastest: dict[int, float] = {}
        """Seconds a row of the fastest call of so many rows."""

    def feed(self, start: int, stop: int) -> NDArray[np.float32]:
        """Compute rows ``[start, stop)`` of the input, at these positions, in one call."""
        n = stop - start
        rows = Rows(
            np.zeros(n, np.int32),
            np.arange(start, stop, dtype=np.int32),
            self.tokens[start:stop] if self._rows is None else None,
            None if self._rows is None else self._rows[start:stop],
            np.ones(n, np.int8),
        )
        out = None if self._head else np.empty((n, self.context.n_embd), np.float32)
        begun = self._clock()
        self.context.decode(rows, out, lone_threads=1)
        seconds = (self._clock() - begun) / n
        self.fastest[n] = min(seconds, self.fastest.get(n, seconds))
        return out if out is not None else np.stack([self.context.logits(i) for i in range(n)])

    def singly(self, start: int, n: int) -> NDArray[np.float32]:
        """Compute ``n`` rows one by one."""
        return np.concatenate([self.feed(at, at + 1) for at in range(start, start + n)])


def run_self_test(
    context: Computer,
    cells: CellMover,
    *,
    n_ctx: int,
    n_vocab: int,
    takes_tokens: bool,
    head: bool,
    clock: Callable[[], float],
) -> Findings:
    """Put a context without cells through its tests, and leave it without cells.

    ``n_vocab`` bounds the made-up tokens, ``clock`` returns seconds.  Raises what computing raises.
    """
    probe = _Probe(
        context, n_ctx=n_ctx, n_vocab=n_vocab, takes_tokens=takes_tokens, head=head, clock=clock
    )
    failed: set[int] = set()
    tried: set[int] = set()
    portable = n_ctx > MAX_DECODE_ROWS
    for start in _STARTS:
        n = min(MAX_DECODE_ROWS, n_ctx - start)
        if n < 2:
            break
        if start == _STARTS[0]:
            probe.feed(0, start)
            first = _exported(probe, cells, start)
        else:
            _fill(probe, cells, first, start)
        reference = probe.singly(start, n)
        if portable and start == _STARTS[0]:
            portable = _round_trip(probe, cells, start, reference)
        for width in TRIED:
            if width > n or width in failed:
                continue
            tried.add(width)
            context.drop(0, start)
            if not _same(probe.feed(start, start + width), reference[:width]):
                failed.add(width)
        context.drop(0, 0)
    kept = sorted(tried - failed)
    alone = probe.fastest.get(1, 0.0)
    slow = frozenset(width for width in kept if width < 4 and probe.fastest[width] > alone)
    return Findings((1, *kept), frozenset(failed), slow, portable)


def _exported(probe: _Probe, cells: CellMover, stop: int) -> KvRange:
    log = SequenceLog(0, stop, None)
    log.append(0, probe.tokens[:stop])
    return cells.export(log, 0, stop)


def _fill(probe: _Probe, cells: CellMover, first: KvRange, n: int) -> None:
    """Give sequence 0, which is empty, ``n`` cells made up from the ones of its first token."""
    # over equal cells attention is their mean in whatever order: shake the bits of each
    rng = np.random.default_rng(_SEED)

    def many(row: bytes) -> bytes:
        one = np.frombuffer(row, "<f2").astype(np.float32)
        noise = rng.standard_normal((n, len(one)), np.float32) * np.abs(one).mean()
        made: bytes = (one + noise).astype("<f2").tobytes()
        return made

    layers = tuple(LayerKv(x.layer, many(x.keys), many(x.values)) for x in first.layers)
    cells.load(SequenceLog(0, n, None), KvRange(first.codec, 0, n, layers), probe.tokens[:n])


def _round_trip(
    probe: _Probe, cells: CellMover, start: int, reference: NDArray[np.float32]
) -> bool:
    """Whether the last row is the same behind cells that were exported and loaded again."""
    last = start + len(reference) - 1
    room = last + 1
    log = SequenceLog(0, room, None)
    log.append(0, probe.tokens[: last + 1])
    kv = cells.export(log, 0, last)
    probe.context.drop(0, 0)
    empty = SequenceLog(0, room, None)
    cells.load(empty, kv, probe.tokens[:last])
    return _same(probe.feed(last, last + 1), reference[-1:])


def _same(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))
