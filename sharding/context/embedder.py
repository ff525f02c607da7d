"""The ``Embedder`` port: short texts become vectors that are near where meanings are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""One unit vector a row."""


class Embedder(Protocol):
    """An encoder of short texts (about thirty words).

    ``identity`` names the model and its bytes: vectors of two encoders are comparable if and only
    if these are equal.  ``dimensions`` is the length of a vector.
    """

    @property
    def identity(self) -> str:
        """The model and its digest."""
        ...

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        ...

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors ``[len(texts), dimensions]``; blocking, so run it off the event loop.

        A text's vector is that of the text alone up to rounding: which others are asked for with it
        changes nothing else.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Return how many tokens ``text`` has for this encoder, without marks of its own."""
        ...
