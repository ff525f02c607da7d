"""Keeps copies of other heads' journals, and gives one to the node that took its session over."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, NotFound, PyAgentError, Refused
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.journal_book import JournalBook, Writer, claimed
from pyagent_node.node.journal_messages import (
    PROTOCOL,
    TO_HEAD,
    TO_HOLDER,
    Append,
    Begin,
    Declined,
    End,
    FetchJournal,
    Held,
    JournalCopy,
    ToHead,
    ToHolder,
    public_id,
    unpack,
)
from pyagent_node.node.nurseries import deadline
from pyagent_node.node.rpc import Rpc

log = logging.getLogger("pyagent_node.journals")

BARRIER_SECONDS: Final = 5.0
"""Longest wait for the log before a holder judges who heads a session."""
SWEEP_SECONDS: Final = 10.0
"""How often expired copies are looked for."""
BEHIND_SECONDS: Final = 60.0
"""How long a copy is kept whose head is gone and whose session the log does not know here."""
KEEP_FACTOR: Final = 1.25
"""Copies and manifests outlive ``session_ttl`` by this much, so that it can be relied upon."""

Find = Callable[[SessionId], tuple[JournalCopy, bytes] | None]
"""Returns the journal of a session (by its public id) that this node heads."""


def keep_seconds(consensus: Consensus) -> float:
    """Return for how long a lost session's journal is kept."""
    return KEEP_FACTOR * consensus.state.settings["session_ttl"]


class JournalHolder:
    """The holder's side; :meth:`find` also serves this node itself."""

    def __init__(self, mesh: Mesh, consensus: Consensus, rpc: Rpc, book: JournalBook) -> None:
        self.book = book
        self.refused: Counter[str] = Counter()
        """What heads asked to keep and was not, by the error's code."""
        self.own: Find = lambda _session: None
        self._consensus = consensus
        mesh.handle(PROTOCOL, self._serve)
        rpc.register(FetchJournal, self._give)

    def find(self, session: SessionId) -> tuple[JournalCopy, bytes] | None:
        """Return the copy of a session (by its public id) that is kept on this node."""
        own = self.own(session)
        if own is not None:
            return own
        copy = self.book.get(session, trio.current_time())
        return None if copy is None else copy.export()

    async def sweep(self) -> None:
        """Forget the copies that nobody will ask for, for ever."""
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self.tidy(trio.current_time())

    def tidy(self, now: float) -> None:
        """Forget the copies that have expired, and those of sessions that went on without them.

        A copy whose head is gone serves only a session that the log still knows (this node may be
        a while behind), until a later head has registered copies of its own.
        """
        self.book.expire(now)
        known = self._consensus.state.checkpoints
        long_gone = now - BEHIND_SECONDS + keep_seconds(self._consensus)
        for session, copy in self.book.left():
            manifest = known.get(session)
            if manifest is None:
                unknown = copy.expires <= long_gone
            else:
                unknown = manifest.claim > copy.claim and manifest.signer != copy.head
            if unknown:
                self.book.drop(session)

    # ---- what heads write --------------------------------------------------------------------

    async def _serve(self, stream: FrameStream) -> None:
        writer = Writer(stream.peer)
        try:
            while (frame := await stream.receive()) is not None:
                answer = await self._take(writer, TO_HOLDER.decode(frame.header), frame.tail)
                if answer is not None:
                    await stream.send(Frame(TO_HEAD.encode(answer)))
        finally:
            self.book.leave(writer, trio.current_time() + keep_seconds(self._consensus))

    async def _take(
        self, writer: Writer, message: ToHolder, tail: bytes | bytearray | memoryview
    ) -> ToHead | None:
        try:
            match message:
                case Begin():
                    await self._check_head(writer.peer, message)
                    copy = self.book.begin(writer, message, unpack(tail), trio.current_time())
                    return Held(message.session, copy.tokens)
                case Append():
                    self._check_still_head(writer.peer, message.session)
                    copy = self.book.append(writer, message, unpack(tail))
                    return Held(message.session, copy.tokens) if message.ack else None
                case End():
                    self.book.end(writer, message.session)
                    return None
        except PyAgentError as error:
            level = logging.DEBUG if isinstance(error, LimitExceeded | NotFound) else logging.INFO
            log.log(level, "a journal of %s is not kept: %s", writer.peer, error)
            self.refused[error.code] += 1
            return Declined(message.session, error.to_info())

    async def _check_head(self, peer: PeerId, message: Begin) -> None:
        """Refuse who is not the session's head as far as the log says; a new one heads claim 1."""
        if message.claim < 1:
            raise Refused("A session's first head has the claim 1.", code="bad_claim")
        if self._heads(peer, message):
            return
        with deadline(BARRIER_SECONDS, "The log could not be read in time.", code="no_leader"):
            await self._consensus.read_barrier()
        if not self._heads(peer, message):
            known = self._consensus.state.checkpoints.get(message.session)
            if known is None:
                raise NotFound("There is no such session.", code="session_not_found")
            raise claimed(known.head)

    def _heads(self, peer: PeerId, message: Begin) -> bool:
        known = self._consensus.state.checkpoints.get(message.session)
        if known is None:
            return message.claim == 1
        return (known.head, known.claim) == (peer, message.claim)

    def _check_still_head(self, peer: PeerId, session: SessionId) -> None:
        known = self._consensus.state.checkpoints.get(session)
        if known is not None and known.head != peer:
            raise claimed(known.head)

    # ---- what the next head reads ------------------------------------------------------------

    async def _give(
        self, asker: PeerId, ask: FetchJournal, _tail: bytes
    ) -> tuple[JournalCopy, bytes]:
        session = public_id(ask.session)
        with deadline(BARRIER_SECONDS, "The log could not be read in time.", code="no_leader"):
            await self._consensus.read_barrier()
        known = self._consensus.state.checkpoints.get(session)
        if known is None or known.head != asker:
            raise Refused("The session was not claimed by the node that asks.", code="not_claimed")
        found = self.find(session)
        if found is None:
            raise NotFound("No such journal is kept here.", code="journal_not_held")
        return found
