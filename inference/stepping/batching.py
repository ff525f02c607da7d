"""How steps become ``llama_decode`` calls, so that no session's bits depend on another's.

llama.cpp picks its kernels by the shape of a batch, and with the kernel the last bits of a result
change.  So a session's rows are only ever computed in shapes that follow from its own steps, or in
shapes that were measured to make no difference (see ``selftest``, ``shapes``).  The rules:

* A step is cut at positions that are multiples of :data:`PREFILL_CHUNK`, as a plain llama.cpp
  process with ``n_batch = 512`` cuts a prompt.  A piece of more than :data:`MAX_DECODE_ROWS`
  tokens, or one that begins a sequence, is *prefill* and is computed alone.  (From 64 rows on
  flash attention works on tiles, whose results differ from those of single rows: which rows share
  a call matters there.)
* Smaller pieces are *decode rows*, and so are all rows of a step with guesses.  A call of decode
  rows takes equally many of each of its sequences, in a shape that is known to be safe or to be
  tried now (``shapes``): of one sequence, one row of each of several, or several rows of several.
  The call of most rows goes first.
* Only neighbouring sequences share a call: each has its own KV stream, and llama.cpp attends over a
  contiguous range of streams.  Whoever hands out sequences should prefer the lowest free one.

Every call is one ubatch of llama.cpp (equal rows a sequence, neighbours in order), so the rows of
the tapped tensor come out in the order of the call.

The calls are planned one by one: what was sampled may show that the rest of a step need not be
computed, and then other rows share the calls that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK

WIDTHS: Final = tuple(range(2, MAX_DECODE_ROWS + 1))
"""Widths that may be used once they were tried; 1 is the reference."""


class Shape(NamedTuple):
    """``rows`` of each of ``sequences``."""

    sequences: int
    rows: int

    @property
    def total(self) -> int:
        """Rows of the call."""
        return self.sequences * self.rows


JOINT_SHAPES: Final = (
    Shape(2, 4),
    Shape(4, 4),
    Shape(8, 4),
    Shape(4, 2),
    Shape(8, 2),
    Shape(4, 8),
    Shape(2, 8),
    Shape(2, 2),
    Shape(3, 4),
    Shape(16, 1),
    Shape(6, 4),
    Shape(3, 8),
    Shape(16, 2),
    Shape(12, 1),
)
"""Shapes beyond the widths in which rows may be computed once they were tried, see ``shapes``."""


class StepShape(NamedTuple):
    """What planning needs to know of a step."""

    seq: int
    position: int
    n: int
    drafts: int = 0


class Part(NamedTuple):
    """Rows ``[offset, offset + n)`` of step number ``step``."""

    step: int
    offset: int
    n: int


Call = tuple[Part, ...]
"""The parts of one ``llama_decode``: one part, or equal ones of neighbouring sequences."""


def preference(widths: Sequence[int], shapes: Sequence[Shape] = ()) -> tuple[Shape, ...]:
    """Return the safe shapes, those to be used first before the others.

    ``widths`` contain 1: so many rows of one sequence, or one row each of so many.
    """
    safe = {*shapes, *(Shape(1, width) for width in widths), *(Shape(width, 1) for width in widths)}
    return tuple(sorted(safe, key=lambda shape: (-shape.total, shape.rows)))


class CallPlanner:
    """Cuts ``steps`` (of distinct sequences) into calls of the given shapes, one after the other.

    The parts of one step come in order.
    """

    def __init__(self, steps: Sequence[StepShape], shapes: Sequence[Shape]) -> None:
        self._steps = steps
        self._order = shapes
        self._pieces = [list(_pieces(step)) for step in steps]

    def use(self, shapes: Sequence[Shape]) -> None:
        """Plan the calls that are left in ``shapes``, which contain (1, 1)."""
        self._order = shapes

    def drop(self, step: int) -> None:
        """Plan no more of step number ``step``."""
        self._pieces[step].clear()

    def next(self) -> Call | None:
        """Return the next call, ``None`` after the last."""
        rows: list[tuple[int, int, int]] = []
        for index, pieces in enumerate(self._pieces):
            if not pieces:
                continue
            step, (offset, n) = self._steps[index], pieces[0]
            if is_prefill(step.drafts, step.position + offset, n):
                pieces.pop(0)
                return (Part(index, offset, n),)
            rows.append((step.seq, index, n))
        if not rows:
            return None
        return self._take(*self._widest(list(_neighbours(sorted(rows)))))

    def _widest(self, runs: list[list[tuple[int, int, int]]]) -> tuple[Sequence[int], int]:
        """Return the steps that share the call of most rows, and how many rows each has in it."""
        for shape in self._order:
            for run in runs:
                for at in range(len(run) - shape.sequences + 1):
                    window = run[at : at + shape.sequences]
                    if all(n >= shape.rows for _, _, n in window):
                        return [index for _, index, _ in window], shape.rows
        raise AssertionError("one row alone is always safe")

    def _take(self, steps: Sequence[int], n: int) -> Call:
        call: list[Part] = []
        for index in steps:
            offset, left = self._pieces[index][0]
            if left == n:
                self._pieces[index].pop(0)
            else:
                self._pieces[index][0] = (offset + n, left - n)
            call.append(Part(index, offset, n))
        return tuple(call)


def is_prefill(drafts: int, position: int, n: int) -> bool:
    """Whether ``n`` rows from ``position`` on are a piece of a prompt, to be computed alone."""
    return (n > MAX_DECODE_ROWS and not drafts) or position == 0


def _pieces(step: StepShape) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the pieces between canonical boundaries."""
    offset = 0
    while offset < step.n:
        room = PREFILL_CHUNK - (step.position + offset) % PREFILL_CHUNK
        n = min(room, step.n - offset)
        yield offset, n
        offset += n


def _neighbours(rows: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Group (sequence, step, rows), sorted, into runs of consecutive sequences."""
    run: list[tuple[int, int, int]] = []
    for item in rows:
        if run and item[0] != run[-1][0] + 1:
            yield run
            run = []
        run.append(item)
    if run:
        yield run
