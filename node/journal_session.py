"""One session's journal at its head: what is there, what is signed, who holds how much.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyagent_node.base.types import PeerId
from pyagent_node.inference.pipeline.journal import Outcome, SessionJournal
from pyagent_node.inference.sampling import Sampled
from pyagent_node.node.journal_messages import (
    JournalCopy,
    chain_of,
    encode_header,
    encode_token,
    extend,
    pack,
    public_id,
    signed_bytes,
)

Sign = Callable[[bytes], bytes]


class HeadedSession:
    """A session that this node heads; ``claim`` counts its heads, this one included.

    ``holders`` says how many tokens each peer is known to hold.  ``changed`` is called when
    somebody who tends the session should look again.
    """

    def __init__(
        self, journal: SessionJournal, head: PeerId, claim: int, sign: Sign, now: float
    ) -> None:
        self.session = journal.session
        self.public = public_id(journal.session)
        self.model = journal.model
        self.head = head
        self.claim = claim
        self.began = now
        self.pieces = [encode_header(journal)]
        self.size = len(self.pieces[0])
        self.holders: dict[PeerId, int] = {}
        self.outcome: Outcome | None = None
        self.registered: frozenset[PeerId] | None = None
        """The holders in the newest manifest that was sent to the log."""
        self._sign = sign
        self._chain = chain_of(self.pieces[0])
        self._signed: tuple[int, bytes] | None = None
        self.append(0, journal.tokens)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return len(self.pieces) - 1

    def append(self, start: int, tokens: Sequence[Sampled]) -> None:
        """Add tokens; those that are there already count once."""
        for token in tokens[max(0, self.tokens - start) :]:
            piece = encode_token(token)
            self.pieces.append(piece)
            self.size += len(piece)
            self._chain = extend(self._chain, piece)

    def signature(self) -> bytes:
        """Return this head's signature over all there is."""
        if self._signed is None or self._signed[0] != self.tokens:
            data = signed_bytes(self.public, self.claim, self.tokens, self._chain)
            self._signed = (self.tokens, self._sign(data))
        return self._signed[1]

    def tail(self, start: int = -1) -> bytes:
        """Return the tail of a message: the tokens from ``start`` on, or everything."""
        return pack(self.pieces[start + 1 :])

    def export(self) -> tuple[JournalCopy, bytes]:
        """Return the journal as a holder would."""
        return JournalCopy(self.claim, self.head, self.signature()), self.tail()
