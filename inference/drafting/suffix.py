"""Drafts from text that has been seen: what followed the same tokens earlier.

By default a session is guessed from its own prompt and answer alone.  With ``corpus_bytes`` the
texts of a tenant's ended sessions are kept too (in memory, the oldest dropped), and then how fast
an answer comes tells that tenant, and nobody else, that something like it was written before.
That is why it is off unless the owner of a node asks for it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.drafting.growth import WIDTH, Candidate, Growth
from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft
from pyagent_node.inference.drafting.tree import ROOT
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.native import SuffixCorpus, SuffixIndex

NAME: Final = "suffix"
SESSION_TOKENS: Final = 65_536
"""Tokens of a session that are remembered: 8 to 13 MB at most."""
MAX_CORPORA: Final = 16
"""Tenants (and vocabularies) whose past is kept; of more, those not used for longest go."""
MIN_CORPUS_BYTES: Final = 1 << 16
MAX_CORPUS_BYTES: Final = 1 << 31
PROMPT_WEIGHT: Final = 0.25
"""How much a token of the prompt says about how predictable the answer is."""
MIN_MATCH: Final = 2
MIN_CORPUS_MATCH: Final = 4
"""A short match says more in one's own text than in somebody's."""
TAIL: Final = 64


class SuffixDrafter:
    """Guesses by suffix; some microseconds a draft, and it never fails."""

    def __init__(self, corpus: SuffixCorpus | None = None) -> None:
        self._index = SuffixIndex(SESSION_TOKENS)
        self._corpus = corpus
        self._text: deque[int] = deque(maxlen=SESSION_TOKENS if corpus is not None else 0)
        self._tail: deque[int] = deque(maxlen=TAIL)
        self._began = False

    @property
    def name(self) -> str:
        """The name it was chosen by."""
        return NAME

    @property
    def nbytes(self) -> int:
        """The memory that the session's text takes, in bytes."""
        return self._index.nbytes

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first."""
        self._index.extend(tokens, 1.0 if self._began else PROMPT_WEIGHT)
        self._began = True
        self._text.extend(tokens)
        self._tail.extend(tokens)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what followed the longest match, of the session's own text or of the corpus."""
        return self.look(ahead, limit, floor=floor)

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Do what :meth:`propose` does."""
        limit = max(0, min(limit, MAX_DRAFT))
        own = _draft(self._index.propose(ahead, limit, MIN_MATCH, floor))
        if self._corpus is None:
            return own
        past = _draft(self._corpus.propose([*self._tail, *ahead], limit, MIN_CORPUS_MATCH, floor))
        return past if expected(past) > expected(own) else own

    def expect_trees(self) -> None:
        """Do nothing: it is always ready."""

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what followed the longest matches, in several ways."""
        return self.look_tree(ahead, limit, floor=floor)

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Do what :meth:`propose_tree` does."""
        growth = Growth(limit, floor=floor)
        at: int | None = ROOT
        while at is not None:
            place = (*ahead, *growth.path(at))
            found = self._index.alternatives(place, WIDTH, MIN_MATCH)
            growth.add(at, [Candidate(*guess) for guess in zip(*found, strict=True)])
            at = growth.next()
        own = growth.draft(NAME)
        if self._corpus is None:
            return own
        past = self.look(ahead, limit, floor=floor)
        return past if expected(past) > expected(own.straight) else own

    async def aclose(self) -> None:
        """Leave the session's text to the corpus, if there is one; idempotent."""
        if self._corpus is not None:
            self._corpus.add(self._text)
        self._corpus = None


def _draft(guesses: tuple[list[int], list[float]]) -> Draft:
    tokens, confidence = guesses
    return Draft(tuple(tokens), tuple(confidence), NAME)


def expected(draft: Draft) -> float:
    """Return how many of a draft's guesses are accepted on average, by its confidences."""
    total, together = 0.0, 1.0
    for value in draft.confidence:
        together *= value
        total += together
    return total


class SuffixDrafters:
    """Makes suffix drafters; ``corpus_bytes`` of memory for each tenant's past, 0 for none."""

    def __init__(self, corpus_bytes: int = 0) -> None:
        """Raises :class:`InvalidRequest` (``bad_parameter``)."""
        if corpus_bytes and not MIN_CORPUS_BYTES <= corpus_bytes <= MAX_CORPUS_BYTES:
            raise InvalidRequest(
                f"The memory for past sessions is {corpus_bytes} bytes; it must be 0 (none) or"
                f" between {MIN_CORPUS_BYTES} and {MAX_CORPUS_BYTES}.",
                code="bad_parameter",
                parameter="corpus_bytes",
            )
        self._corpus_bytes = corpus_bytes
        self._corpora: OrderedDict[tuple[str, bytes], SuffixCorpus] = OrderedDict()

    @property
    def name(self) -> str:
        """The name that requests choose it by."""
        return NAME

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> SuffixDrafter:
        """Return a drafter for a session; any vocabulary will do."""
        if not self._corpus_bytes:
            return SuffixDrafter()
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        key = tenant, digest.digest()
        corpus = self._corpora.get(key)
        if corpus is None:
            corpus = self._corpora[key] = SuffixCorpus(self._corpus_bytes)
        self._corpora.move_to_end(key)
        while len(self._corpora) > MAX_CORPORA:
            self._corpora.popitem(last=False)
        return SuffixDrafter(corpus)
