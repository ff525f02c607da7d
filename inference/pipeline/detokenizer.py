"""From token bytes to text that may be shown: UTF-8 and stop strings over token boundaries.

The text of an answer is the concatenation of its pieces decoded as UTF-8 with U+FFFD for what can
never become a character, cut before the first stop string.  It is given out as early as possible:
held back is only an incomplete character, and an ending that could grow into a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Turns the pieces of one answer into text.

    Of several stop strings, the one that is complete first counts; of those complete at once, the
    one that begins first.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; nothing more is given out then."""
        return self._stopped

    def push(self, piece: bytes) -> str:
        """Add one token's bytes and return the text that may be shown now."""
        return self._advance(self._decode(piece), final=False)

    def finish(self) -> str:
        """Return what was held back, at the end of an answer without a stop string."""
        return self._advance(self._decode(b"", True), final=True)

    def _advance(self, new: str, *, final: bool) -> str:
        if self._stopped:
            return ""
        text = self._held + new
        if not self._stop:
            return text
        found = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self._stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = 0 if final else max(_overlap(text, s) for s in self._stop)
        shown = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest ending of ``text`` that begins ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
