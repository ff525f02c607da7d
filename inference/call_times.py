"""How long a runner's computations take: of single tokens, and of pieces of prompts.  Pure."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

PIECE_ROWS: Final = 16
"""Rows from which on a computation counts as a piece of a prompt."""
KEPT: Final = 64
"""Computations of each kind that are remembered."""
FEWEST: Final = 16
"""Single tokens that must have been computed before their time is told."""
FEWEST_PIECES: Final = 2


class CallTimes:
    """The latest computations of one runner, in seconds."""

    def __init__(self) -> None:
        self._tokens: deque[float] = deque(maxlen=KEPT)
        self._pieces: deque[float] = deque(maxlen=KEPT)

    def took(self, rows: int, seconds: float) -> None:
        """Note a computation of so many rows; what is neither kind does not count."""
        if rows == 1:
            self._tokens.append(seconds)
        elif rows >= PIECE_ROWS:
            self._pieces.append(seconds / rows)

    def clear(self) -> None:
        """Forget what was measured."""
        self._tokens.clear()
        self._pieces.clear()

    @property
    def token_seconds(self) -> float | None:
        """The median time of a single token; ``None`` until enough were computed."""
        return statistics.median(self._tokens) if len(self._tokens) >= FEWEST else None

    @property
    def prompt_seconds(self) -> float | None:
        """The median time of a token in pieces of prompts; ``None`` until there were some."""
        return statistics.median(self._pieces) if len(self._pieces) >= FEWEST_PIECES else None
