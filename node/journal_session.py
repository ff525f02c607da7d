"""One session's journal at its head: what is there, what is signed, who holds how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

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
from pyagent_node.node.kv_manifest import SessionKv

Sign = Callable[[bytes], bytes]


class HeadedSession:
    """A session that this node heads; ``claim`` counts its heads, this one included.

    ``wanted`` are the peers that get a copy, ``holders`` says how many tokens each of them is known
    to hold, ``registered`` are the holders in the newest manifest.  ``retained``: somebody still
    reads the answer, or may; ``kept``: others may go on with it, so its end drops nothing.
    ``kv`` says who holds the session's KV blocks.
    """

    def __init__(self, journal: SessionJournal, head: PeerId, claim: int, sign: Sign) -> None:
        self.session = journal.session
        self.public = public_id(journal.session)
        self.model = journal.model
        self.head = head
        self.claim = claim
        self.pieces = [encode_header(journal)]
        self.size = len(self.pieces[0])
        self.wanted: set[PeerId] = set()
        self.holders: dict[PeerId, int] = {}
        self.registered: frozenset[PeerId] | None = None
        self.outcome: Outcome | None = None
        self.retained = False
        self.kept = False
        self.kv = SessionKv()
        self._changed = trio.Event()
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

    @property
    def over(self) -> bool:
        """Whether it ended and nobody needs it here any more."""
        return self.outcome is not None and (
            self.kept or self.outcome == "left" or not self.retained
        )

    def touch(self) -> None:
        """Wake whoever tends the session: something but its tokens changed."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait for the next :meth:`touch`; one that came since the last wait counts."""
        await self._changed.wait()
        self._changed = trio.Event()

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
