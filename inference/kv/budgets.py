"""How many cells a session may hold, and what giving up the others came to.  Plain values.

Measured on SmolLM2-135M, the cells that carry 90 % of the attention of the last tokens of a text
are about 100 of 256 and 600 of 8,192: they grow with the square root of the context, not with the
context.  So that is how the automatic budget grows.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest

SINKS: Final = 4
"""First tokens that are always kept, as in StreamingLLM."""
WINDOW: Final = 128
"""Last tokens that are always kept; no more may be taken back at once."""
ROOT: Final = 16
"""Cells in the automatic budget for the square root of the context."""
SLACK: Final = 64
"""So many cells too many are put up with, or a quarter of the budget where that is more."""
MIN_CELLS: Final = 256
"""The smallest budget that can be asked for."""
MAX_CELLS: Final = 1 << 24
MAX_COUNT: Final = 1 << 53
"""The greatest number of cells or bytes that is believed of another node."""
OFF: Final = "off"
AUTO: Final = "auto"


class Pruning(msgspec.Struct, frozen=True, gc=False):
    """How many cells a session may hold on a rank; ``cells`` is 0 for the automatic budget."""

    cells: int = 0

    def __str__(self) -> str:
        """Return what :func:`read_budget` would read."""
        return str(self.cells) if self.cells else AUTO


class Evicted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What pruning came to in a session: cells ``held`` and given up, each counted on every rank.

    ``bytes`` are those of the cells that were given up.
    """

    held: int = 0
    cells: int = 0
    bytes: int = 0


def numbers_of(evicted: Evicted | None) -> tuple[int, ...]:
    """Return what another node says of cells that were given up, to be checked."""
    return () if evicted is None else (evicted.held, evicted.cells, evicted.bytes)


def read_budget(text: str) -> Pruning | None:
    """Return what ``off``, ``auto`` or a number of cells means; ``None`` for ``off``.

    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    if text == OFF:
        return None
    if text == AUTO:
        return Pruning()
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_CELLS)):
        pruning = Pruning(int(text) or -1)
        check(pruning)
        return pruning
    raise _bad(f"kv_budget is {text[:40]!r}")


def check(pruning: Pruning) -> None:
    """Raise :class:`InvalidRequest` (``bad_parameter``) for a budget that nobody can keep."""
    if pruning.cells and not MIN_CELLS <= pruning.cells <= MAX_CELLS:
        raise _bad(f"kv_budget is {max(0, pruning.cells)} cells")


def budget(pruning: Pruning, seen: int) -> int:
    """Return how many cells may be held after ``seen`` tokens of context.

    The automatic budget is sinks, window, and :data:`ROOT` times the square root of the context:
    644 cells of 1,024, 1,580 of 8,192.  It never falls as the context grows.
    """
    return pruning.cells or SINKS + WINDOW + ROOT * math.isqrt(max(0, seen))


def due(pruning: Pruning, held: int, seen: int) -> bool:
    """Whether ``held`` cells are so many too many that pruning is worth the trouble.

    To prune moves cells in memory and breaks off work on the session; so it is done for
    :data:`SLACK` cells or a quarter of the budget at once, never for one.
    """
    most = budget(pruning, seen)
    return held > most + max(SLACK, most // 4)


def _bad(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what}.",
        code="bad_parameter",
        parameter="kv_budget",
        remedy=f"Say off, auto, or a number of cells from {MIN_CELLS} to {MAX_CELLS}.",
    )
