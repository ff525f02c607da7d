"""The blocks of one session on one rank: its tokens, and how far they are settled.  Pure.

A position is *settled* when no token before it is a guess any more.  A step without a parent begins
at such a position, and its own tokens up to its guesses are known; a step with a parent says by
itself how far the answer has come.  Cells of settled positions are never computed again.
"""

from __future__ import annotations

from array import array

import numpy as np

from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.pipeline.frames import Step
from pyagent_node.inference.pipeline.origins import Source
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, block_chain, rest_links


class SessionBlocks:
    """What a rank knows of the tokens whose cells it holds, guesses included.

    ``cut`` is the greatest ``prefill_cut`` of the ranks up to this one.  The names of its blocks
    begin with ``root``; those of the blocks that it begins from are of ``source``, which is another
    one where these are of other classes (see ``origins``).
    """

    __slots__ = (
        "_chain",
        "_seconds",
        "_tokens",
        "cut",
        "prompt_tokens",
        "root",
        "seen",
        "settled",
        "shown",
        "source",
    )

    def __init__(
        self, root: bytes, prompt_tokens: int, cut: int, source: Source | None = None
    ) -> None:
        self.root = root
        self.source = source or Source(root, cut)
        self.cut = cut
        self.prompt_tokens = prompt_tokens
        self.settled = 0
        """Where the tokens that may be guesses begin."""
        self.seen = 0
        """The leading blocks that were shown to the shelf."""
        self.shown = 0
        """The leading blocks that the shelf was shown, and given if it wants them."""
        self._tokens = array("i")
        self._chain: tuple[bytes, ...] = ()
        self._seconds: dict[int, float] = {}

    @property
    def due(self) -> int:
        """How many settled blocks the shelf has not been shown."""
        return self.settled // BLOCK_TOKENS - self.seen

    def computed(self, step: Step, tokens: Tokens, seconds: float) -> None:
        """Note a step that was computed, in ``seconds``."""
        position, known = step.position, step.known
        if position < self.settled:
            self.back(position)
        if position > len(self._tokens):
            return  # what came between was given up on the way; whatever follows begins before
        del self._tokens[position:]
        kept = tokens[: step.stop - position]
        self._tokens.frombytes(kept.astype(np.intc, copy=False).tobytes())
        settled = position + known if step.parent is None else min(step.settled, position)
        self.settled = max(self.settled, settled)
        each = seconds / len(kept)
        for index in range(position // BLOCK_TOKENS, (step.stop - 1) // BLOCK_TOKENS + 1):
            first = max(position, index * BLOCK_TOKENS)
            last = min(step.stop, (index + 1) * BLOCK_TOKENS)
            self._seconds[index] = self._seconds.get(index, 0.0) + (last - first) * each

    def restored(self, start: int, tokens: Tokens) -> None:
        """Note cells that were imported from ``start`` on."""
        del self._tokens[start:]
        self._tokens.frombytes(tokens.astype(np.intc, copy=False).tobytes())
        self.settled = len(self._tokens)

    def back(self, position: int) -> None:
        """Forget everything from ``position`` on."""
        self.settled = min(self.settled, position)
        self.seen = min(self.seen, position // BLOCK_TOKENS)
        self._chain = self._chain[: position // BLOCK_TOKENS]
        del self._tokens[position:]

    def rest(self) -> tuple[int, bytes, tuple[bytes, ...]]:
        """Return the settled tokens behind the last block that another rank may see ended, too.

        (Ranks of a session that ends here may be one token apart.)  That is where they begin, the
        name of what is before, and their own names (``rest_links``).
        """
        start = max(0, self.settled - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        tokens: Tokens = np.array(self._tokens[: self.settled], dtype=np.int32)
        chain = block_chain(
            self.root, tokens[:start], self.prompt_tokens, prefill_cut=self.cut, known=self._chain
        )
        parent = chain[-1] if start else self.root
        return start, parent, rest_links(parent, tokens[start:], self.prompt_tokens)

    def link(self, count: int) -> bytes:
        """Return the name of the last of the leading ``count`` blocks, which are settled."""
        tokens: Tokens = np.array(self._tokens[: count * BLOCK_TOKENS], dtype=np.int32)
        chain = block_chain(
            self.root, tokens, self.prompt_tokens, prefill_cut=self.cut, known=self._chain
        )
        return chain[count - 1]

    def show(self, most: int) -> list[tuple[int, bytes, float]]:
        """Return the next settled blocks, at most so many: index, chain hash and seconds."""
        count = min(most, self.due)
        if count <= 0:
            return []
        stop = self.seen + count
        tokens: Tokens = np.frombuffer(self._tokens, dtype=np.intc)[: stop * BLOCK_TOKENS]
        self._chain = block_chain(
            self.root, tokens, self.prompt_tokens, prefill_cut=self.cut, known=self._chain
        )
        shown = [
            (index, self._chain[index], self._seconds.pop(index, 0.0))
            for index in range(self.seen, stop)
        ]
        self.seen = stop
        return shown
