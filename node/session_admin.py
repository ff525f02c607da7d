"""What operators ask of sessions; implements ``SessionServices``.

A session that is written out is its journal as holders keep it, signed by its head: the request in
tokens and the tokens so far.  That is all of it: whoever has the model computes the same rest.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

import msgspec

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.generation import Engine
from pyagent_node.node.api.session_schema import (
    ImportReply,
    MoveReply,
    MoveRequest,
    SessionRow,
    SessionsReply,
)
from pyagent_node.node.draining import find_member
from pyagent_node.node.identity import verify
from pyagent_node.node.journal_holding import JournalHolder
from pyagent_node.node.journal_messages import JournalCopy, public_id, read_copy
from pyagent_node.node.live_session import Successor
from pyagent_node.node.live_sessions import LiveSessions
from pyagent_node.node.session_moves import ask

FORM: Final = "pyagent-session/1"
"""Names the form of a session that was written out."""
MAX_BYTES: Final = 64 * 1024 * 1024


class SessionFile(msgspec.Struct, frozen=True):
    """A session that was written out; ``journal`` is what a holder keeps, in base64."""

    form: str
    session: SessionId
    claim: int
    signer: PeerId
    signature: str
    journal: str


_FILE: Final = msgspec.json.Decoder(SessionFile)


class SessionAdmin:
    """The sessions of a node, for its operator."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        engine: Engine,
        live: LiveSessions,
        book: JournalHolder,
    ) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._engine = engine
        self._live = live
        self._book = book

    async def list(self) -> SessionsReply:
        """See ``SessionServices``."""
        state, here = self._consensus.state, self._mesh.peer_id
        rows: dict[SessionId, SessionRow] = {}
        name = self._name_of
        for view in self._engine.sessions():
            public = public_id(view.session)
            known = state.checkpoints.get(public)
            head = PeerId(view.head)
            rows[public] = SessionRow(
                session=view.session if head == here else None,
                public=public,
                part="head" if head == here else "rank",
                model=view.model,
                head=head,
                head_name=name(head),
                prompt_tokens=view.prompt_tokens,
                completion_tokens=view.completion_tokens,
                tokens_per_second=view.tokens_per_second,
                suspended=view.suspended,
                holders=tuple(map(name, known.holders)) if known is not None else (),
            )
        for public, known in state.checkpoints.items():
            if public not in rows:
                record = state.models.get(known.model)
                rows[public] = SessionRow(
                    session=None,
                    public=public,
                    part="away",
                    model=record.name if record is not None else known.model[:12],
                    head=known.head,
                    head_name=name(known.head),
                    holders=tuple(map(name, known.holders)),
                )
        return SessionsReply(tuple(rows.values()))

    async def move(self, request: MoveRequest) -> MoveReply:
        """See ``SessionServices``.

        Raises as ``LiveSessions.move``, ``find_member`` and ``session_moves.ask`` do, and
        :class:`Conflict` (``session_here``) when this node is its head already.
        """
        peer = find_member(self._consensus, request.to)
        if peer == self._mesh.peer_id:
            self._live.running(request.session)
            raise Conflict("This node heads the session already.", code="session_here")

        async def give_away(session: SessionId, seconds: float) -> Successor:
            return await ask(self._mesh, peer, session, seconds)

        tokens = await self._live.move(request.session, give_away)
        return MoveReply(
            session=request.session, peer_id=peer, name=self._name_of(peer), tokens=tokens
        )

    async def write_out(self, session: SessionId) -> dict[str, str]:
        """See ``SessionServices``.  Raises :class:`NotFound` (``session_not_here``)."""
        found = self._book.find(public_id(session))
        if found is None:
            raise NotFound(
                f"No session {session[:40]!r} is in progress on this node, or kept by it.",
                code="session_not_here",
                remedy="See 'pyagent-node session list'; ask its head.",
            )
        copy, tail = found
        file = SessionFile(
            FORM, session, copy.claim, copy.signer, _text(copy.signature), _text(tail)
        )
        built: dict[str, str] = msgspec.to_builtins(file)
        return built

    async def read_in(self, data: bytes) -> ImportReply:
        """See ``SessionServices``.

        Raises :class:`InvalidRequest` (``bad_session_file``), :class:`CorruptData`
        (``bad_journal``) and :class:`Unavailable` (``model_not_placed``).
        """
        file = read_file(data)
        copy = JournalCopy(file.claim, file.signer, _bytes(file.signature))
        signers = frozenset({file.signer})
        journal = read_copy(file.session, copy, _bytes(file.journal), signers, verify)
        placed = self._consensus.state.placements.get(journal.model)
        if placed is None:
            raise Unavailable(
                f"The model of this session ({journal.model[:12]}) is not loaded here.",
                code="model_not_placed",
                remedy="Load it, then import the session again.",
                model=journal.model,
            )
        session = self._live.new_id()
        seconds = float(self._consensus.state.settings["session_ttl"])
        self._live.adopt(msgspec.structs.replace(journal, session=session), seconds)
        record = self._consensus.state.models.get(journal.model)
        return ImportReply(
            session=session,
            model=journal.model,
            name=record.name if record is not None else journal.model[:12],
            prompt_tokens=len(journal.prompt),
            completion_tokens=len(journal.tokens),
            seconds=seconds,
        )

    def _name_of(self, peer: PeerId) -> str:
        member = self._consensus.state.members.get(peer)
        return member.name if member is not None else peer[-8:]


def read_file(data: bytes) -> SessionFile:
    """Return what is in a file.  Raises :class:`InvalidRequest` (``bad_session_file``)."""
    if len(data) > MAX_BYTES:
        raise _bad_file(f"{len(data)} bytes, which is too much")
    try:
        file = _FILE.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad_file(f"something else ({error})") from None
    if file.form != FORM:
        raise _bad_file(f"the form {file.form[:40]!r} instead of {FORM!r}")
    return file


def _text(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _bad_file("something that is no base64") from None


def _bad_file(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"This is no session that was written out: it has {what}.",
        code="bad_session_file",
        remedy="Write it again with 'pyagent-node session export'.",
    )
