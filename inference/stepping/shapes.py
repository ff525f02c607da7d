"""Which shapes of a call are used: those that passed, and others once, to find out.

The self-test at loading tries what every session needs (a few rows of one sequence).  There are
many more shapes, a takeover waits for loading, and most slices never meet most of them.  So each
of the others is tried when rows for it come up for the first time, on those very rows (``calls``):
they are computed together, dropped, computed again in calls that are known to be safe, and compared
to the bit.  The second result is the one that counts: a trial costs time once and never bits.

A trial of w rows of one sequence computes w single rows besides, and saves a call or two each time
after: a short answer never earns that.  So a width is tried when its rows have come up
:data:`PATIENCE` times, and is cut into calls of safe widths until then.  Several sessions at once
gain more, and more often: their shapes are tried at once.

Attention walks over 256 cells or over more of them by different ways, so a shape passes once for
sequences of up to :data:`LONG` cells and once beyond.  What fails in one is used in neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final

from pyagent_node.inference.backend import MAX_CALL_ROWS
from pyagent_node.inference.stepping.batching import JOINT_SHAPES, WIDTHS, Shape, preference

PATIENCE: Final = 8
"""How often rows of one sequence are cut into safe widths before their own width is tried."""
LONG: Final = 256
"""llama.cpp's attention walks over multiples of so many cells; beyond, over 512 or more."""


class ShapeBook:
    """What is known of the shapes that a slice of ``n_seq`` sequences may use.

    ``passed`` are widths of one sequence, 1 among them, that are safe at every length; ``failed``
    are not.  ``slow`` widths are safe and not worth it.
    """

    def __init__(
        self, passed: Iterable[int], failed: Iterable[int], slow: Iterable[int], *, n_seq: int
    ) -> None:
        exact, idle = set(passed), set(slow)
        wrong = min(failed, default=MAX_CALL_ROWS + 1)
        assert 1 in exact, "a row alone is the reference"
        self._safe = {(Shape(1, width), long) for width in exact for long in (False, True)}
        self._wished: Counter[tuple[Shape, bool]] = Counter()
        # Several rows of several sequences are compared with as many rows of one, which must be
        # safe.  Kernels are chosen by the number of rows in all: with as many as were wrong once,
        # or more, a trial is hardly worth it.
        self._joint = tuple(
            shape
            for shape in JOINT_SHAPES
            if shape.sequences <= n_seq and shape.rows in exact and shape.total < wrong
        )
        widths = [1, *(width for width in WIDTHS if width < wrong and width not in idle)]
        self._order = preference(widths, self._joint)

    @property
    def joint(self) -> tuple[Shape, ...]:
        """The shapes beyond the widths that were not seen to fail when the slice was loaded."""
        return self._joint

    @property
    def order(self) -> Sequence[Shape]:
        """The shapes to plan with, those to be used first before the others."""
        return self._order

    def is_safe(self, shape: Shape, cells: int) -> bool:
        """Whether calls of this shape are known to be exact for sequences of so many cells."""
        return shape.sequences == shape.rows == 1 or (shape, cells > LONG) in self._safe

    def is_due(self, shape: Shape, cells: int) -> bool:
        """Whether a shape that is not known to be safe is to be tried, now that it comes up."""
        if shape.sequences > 1:
            return True
        place = shape, cells > LONG
        self._wished[place] += 1
        return self._wished[place] > PATIENCE

    def safe_width(self, rows: int, cells: int) -> int:
        """Return how many of ``rows`` rows of one sequence to compute at once, behind ``cells``."""
        widths = (shape.rows for shape in self._order if shape.sequences == 1)
        able = (w for w in widths if w <= rows and self.is_safe(Shape(1, w), cells + w))
        return max(able, default=1)

    def note(self, shape: Shape, cells: int, *, passed: bool) -> None:
        """Remember the outcome of a trial; what failed is not planned any more."""
        if passed:
            self._safe.add((shape, cells > LONG))
            return
        self._order = tuple(known for known in self._order if known != shape)
        self._safe -= {(shape, False), (shape, True)}
