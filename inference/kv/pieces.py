"""Pieces of a prompt whose KV may be that of the piece alone; see ``chunks``.  Plain values."""

from __future__ import annotations

from typing import Final

import msgspec

MAX_PIECES: Final = 64
"""The most pieces of one prompt."""
MAX_PIECE: Final = 4096
"""The most tokens of a piece."""
SKIP_TOKENS: Final = 16
"""Tokens at the beginning of a piece that a session computes itself by default."""
MAX_SKIP: Final = 512


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The tokens ``[start, stop)`` of a prompt."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.stop - self.start


class Marks(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which landmarks to make of a piece that is computed alone (``kv.landmarks``).

    It has ``tokens``, and what follows up to the end of the prompt is padding; the first ``skip``
    are computed anew by whoever joins it; ``probe`` tokens are read behind the prompt to choose by.
    """

    tokens: int
    skip: int
    probe: int


class JoinPlan(msgspec.Struct, frozen=True):
    """The ``pieces`` of a prompt, in order; of each the session computes ``skip`` tokens itself."""

    pieces: tuple[Piece, ...]
    skip: int = SKIP_TOKENS
