"""How many cells a session may hold, and what giving up the others came to.  Plain values.

Measured on SmolLM2-135M, the cells that carry 90 % of the attention of the last tokens of a text
are about 100 of 256 and 600 of 8,192: they grow with the square root of the context, not with the
context.  So that is how the automatic budget grows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
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
GUESSES: Final = WINDOW - 8
"""Guesses that may be on their way in a session that is pruned, behind up to eight tokens."""
SPARE: Final = 512
"""Cells that may come before the next pruning: a piece of a prompt, or guesses on their way."""
MIN_CELLS: Final = 256
"""The smallest budget that can be asked for."""
MAX_CELLS: Final = 1 << 24
MAX_COUNT: Final = 1 << 53
"""The greatest number of cells or bytes that is believed of another node."""
OFF: Final = "off"
AUTO: Final = "auto"
ROLLING: Final = "rolling"


class Pruning(msgspec.Struct, frozen=True, gc=False):
    """How many cells a session may hold on a rank; ``cells`` is 0 for the automatic budget.

    ``rolling`` has cells given up while the prompt is read, piece by piece; otherwise all of the
    prompt is held until the first token of the answer is there.
    """

    cells: int = 0
    rolling: bool = False

    def __str__(self) -> str:
        """Return what :func:`read_budget` would read."""
        if not self.rolling:
            return str(self.cells) if self.cells else AUTO
        return f"{ROLLING}:{self.cells}" if self.cells else ROLLING


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


def believable(evicted: Evicted | None) -> bool:
    """Whether what another node says of cells that were given up can be."""
    return all(0 <= number <= MAX_COUNT for number in numbers_of(evicted))


def read_budget(text: str) -> Pruning | None:
    """Return what a budget means, ``None`` for ``off``.

    The others are ``auto``, a number of cells, ``rolling`` and ``rolling:`` with such a number.
    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    if text == OFF:
        return None
    if text in (AUTO, ROLLING):
        return Pruning(rolling=text == ROLLING)
    cells = text.removeprefix(f"{ROLLING}:")
    if cells.isascii() and cells.isdecimal() and len(cells) <= len(str(MAX_CELLS)):
        pruning = Pruning(int(cells) or -1, rolling=cells != text)
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


def due(pruning: Pruning, held: int, seen: int, *, reading: bool = False) -> bool:
    """Whether ``held`` cells are so many too many that pruning is worth the trouble.

    To prune moves cells in memory and breaks off work on the session; so it is done for
    :data:`SLACK` cells or a quarter of the budget at once, never for one.  Behind a piece of a
    prompt that is still ``reading`` it is done for any: beside computing the piece it is little.
    """
    most = budget(pruning, seen)
    return held > most + (0 if reading else max(SLACK, most // 4))


def positions(pruning: Pruning | None, prompt: int, *, n_ctx: int, trained: int) -> int:
    """Return how many positions a session has whose slots hold ``n_ctx`` cells.

    Cells that are given up make room for others, so these are up to the ``trained`` ones of the
    model, as long as the budget, what may come before the next pruning, and a prompt that is held
    whole fit into a slot.  Otherwise they are ``n_ctx``, like those of a session that keeps all.
    """

    def most(seen: int) -> int:
        cells = budget(pruning or Pruning(), seen)
        return cells + max(SLACK, cells // 4) + SPARE

    held = pruning is not None and not pruning.rolling and prompt + SPARE > n_ctx
    if pruning is None or held or trained <= n_ctx:
        return n_ctx
    return max(n_ctx, n_ctx - 1 + bisect_right(range(n_ctx, trained + 1), n_ctx, key=most))


def _bad(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{what}.",
        code="bad_parameter",
        parameter="kv_budget",
        remedy=f"Say off, auto, a number of cells from {MIN_CELLS} to {MAX_CELLS}, rolling, or"
        " rolling: and a number.",
    )
