"""The ``Embedder`` port: short texts become vectors that are near where meanings are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest, LimitExceeded

Vectors = NDArray[np.float32]
"""One unit vector a row."""
MAX_TEXTS: Final = 1 << 16
"""The most texts in one call."""
MAX_CHARACTERS: Final = 1 << 16
"""The most characters of one text."""


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

    @property
    def centre(self) -> NDArray[np.float32] | None:
        """The mean of its vectors over texts of many kinds; ``None`` where axes were learned.

        Machines may differ in the last digits, so the one that makes a context says in the log
        what its centre is, and all others take that one.
        """
        ...

    def embed_question(self, question: str) -> NDArray[np.float32]:
        """Return the unit vector of a question; some encoders want other words before those."""
        ...

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32] | None:
        """Return how well the words of a question are found in each text (``rerank``); blocking.

        ``rarities`` says what words of the question weigh, in small letters; one that is not there
        counts as the rarest.  What a text gets depends on which others it is compared with.
        ``None`` from an encoder that has no states of single words to tell.
        """
        ...

    def count_tokens(self, text: str) -> int:
        """Return how many tokens ``text`` has for this encoder, without marks of its own."""
        ...


def check_texts(texts: Sequence[str]) -> None:
    """Check what an encoder is given.

    Raises :class:`LimitExceeded` (``too_many_texts``, ``text_too_large``) and
    :class:`InvalidRequest` (``bad_context_text``).
    """
    if len(texts) > MAX_TEXTS:
        raise LimitExceeded(
            f"{len(texts)} texts were given at once; the most is {MAX_TEXTS}.",
            code="too_many_texts",
        )
    for text in texts:
        if len(text) > MAX_CHARACTERS:
            raise LimitExceeded(
                f"A text has {len(text)} characters; the most is {MAX_CHARACTERS}.",
                code="text_too_large",
                remedy="Cut it into windows first.",
            )
        if not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
            raise InvalidRequest("A text holds half characters.", code="bad_context_text")
