"""Takes a session over from a head that is gone: claim it in the log, then fetch its journal."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import trio

from pyagent_node.base.errors import CorruptData, NotFound, PyAgentError, Unavailable
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.consensus.commands import Checkpoint, ClaimSession, DropCheckpoints
from pyagent_node.consensus.port import Consensus
from pyagent_node.consensus.state import is_member
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.node.identity import verify
from pyagent_node.node.journal_book import claimed
from pyagent_node.node.journal_holding import JournalHolder
from pyagent_node.node.journal_messages import FetchJournal, JournalCopy, public_id, read_copy
from pyagent_node.node.journals import JournalKeeper
from pyagent_node.node.live_sessions import (
    LiveSessions,
    Recovered,
    ResumableEngine,
    open_live_sessions,
)
from pyagent_node.node.rpc import Rpc
from pyagent_node.node.session_moves import MovedSessions

log = logging.getLogger("pyagent_node.journals")

FETCH_SECONDS: Final = 8.0
"""Longest time in which one holder must have answered."""
MORE_SECONDS: Final = 0.25
"""How long other holders are waited for once a good copy is here: theirs may be longer."""


class SessionRecovery:
    """Takes sessions over for the node ``peer_id``; ``wall`` gives Unix seconds.

    ``can_serve`` says whether this node can be the head for a model, now or in a moment.
    """

    def __init__(
        self,
        peer_id: PeerId,
        consensus: Consensus,
        rpc: Rpc,
        holder: JournalHolder,
        *,
        can_serve: Callable[[Digest], bool],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.bad_copies = 0
        self._peer_id = peer_id
        self._consensus = consensus
        self._rpc = rpc
        self._holder = holder
        self._can_serve = can_serve
        self._wall = wall

    async def recover(self, session: SessionId) -> Recovered:
        """Claim ``session`` for this node and return its journal.

        Its former head, if it lives, stops when it sees the claim.  Raises :class:`NotFound`
        (``session_not_found``) for one that is unknown, ended, expired or lost because every node
        that kept it was restarted or left the mesh, :class:`Conflict`
        (``session_claimed``) when another node claimed it at the same moment, and
        :class:`Unavailable`: ``no_leader``, ``model_not_placed``, or ``journal_unavailable`` when
        no holder can be reached (it can be tried again until the session expires).
        """
        public = public_id(session)
        await self._consensus.read_barrier()
        known = self._consensus.state.checkpoints.get(public)
        now = self._wall()
        if known is None or known.expires < now:
            raise session_not_found(session)
        if not self._can_serve(known.model):
            raise Unavailable(
                "The model of this session is not loaded any more.",
                code="model_not_placed",
                remedy="Load it again, then resume.",
                model=known.model,
            )
        await self._consensus.propose(
            ClaimSession(public, self._peer_id, after_claim=known.claim, at=int(now))
        )
        journal = await self._fetch(session, known)
        return Recovered(journal, known.claim + 1)

    async def _fetch(self, session: SessionId, known: Checkpoint) -> SessionJournal:
        """Return the longest good copy among those that come in time."""
        signers = frozenset({known.head, *((known.signer,) if known.signer else ())})
        found: list[SessionJournal] = []
        failures: list[PyAgentError] = []

        def take(where: PeerId, copy: JournalCopy, tail: bytes) -> None:
            if copy.claim < known.claim and copy.signer not in signers:
                log.debug("%s keeps a copy of an earlier head only", where)
                failures.append(NotFound("No such journal.", code="journal_not_held"))
                return
            try:
                journal = read_copy(session, copy, tail, signers, verify)
                if journal.model != known.model:
                    raise CorruptData("The copy is of another model.", code="bad_journal")
            except PyAgentError as error:
                self.bad_copies += 1
                log.warning("a copy of a journal on %s was refused: %s", where, error)
                failures.append(error)
            else:
                found.append(journal)

        async def ask(peer: PeerId) -> None:
            try:
                copy, tail = await self._rpc.call(
                    peer, FetchJournal(session), JournalCopy, seconds=FETCH_SECONDS
                )
            except PyAgentError as error:
                log.info("no journal from %s: %s", peer, error)
                failures.append(error)
            else:
                take(peer, copy, tail)
            waiting.discard(peer)
            look()

        def look() -> None:
            """Wait for other holders while it may be worth it, never for the former head."""
            if found:
                patience = MORE_SECONDS if waiting else 0.0
                enough.deadline = min(enough.deadline, trio.current_time() + patience)

        own = self._holder.find(public_id(session))
        if own is not None:
            take(self._peer_id, *own)
        others = {*known.holders, *signers} - {self._peer_id, *self._outsiders()}
        waiting = set(known.holders) & others
        with trio.CancelScope() as enough:
            look()
            await _all(ask, others)
        if found:
            return max(found, key=lambda journal: len(journal.tokens))
        if all(error.code == "journal_not_held" for error in failures):
            await self._give_up(public_id(session))
            raise session_not_found(session)
        raise _unavailable(failures)

    def _outsiders(self) -> set[PeerId]:
        """Return who left the mesh or was shut out, and so will never give a copy."""
        members = self._consensus.state.members.values()
        return {member.peer_id for member in members if not is_member(member)}

    async def _give_up(self, public: SessionId) -> None:
        """Have the mesh forget a session of which no copy is left: holders keep them in memory."""
        log.warning("every node that kept a session's journal was restarted, or left the mesh")
        await self._consensus.propose(DropCheckpoints((public,), self._peer_id))
        known = self._consensus.state.checkpoints.get(public)
        if known is not None:
            raise claimed(known.head)


async def _all(ask: Callable[[PeerId], Awaitable[None]], peers: Iterable[PeerId]) -> None:
    async with trio.open_nursery() as nursery:
        for peer in sorted(peers):
            nursery.start_soon(ask, peer)


def session_not_found(session: SessionId) -> NotFound:
    """Return the error for a session that cannot be resumed."""
    return NotFound(
        f"There is no session {session[:40]!r} to go on with.",
        code="session_not_found",
        remedy="It has ended, lasted too briefly, was lost when every node that kept it restarted,"
        " or the time for resuming it is over; ask anew.",
    )


def _unavailable(failures: list[PyAgentError]) -> PyAgentError:
    if all(isinstance(error, CorruptData | NotFound) for error in failures):
        return CorruptData(
            "Every copy of this session's journal that is left was tampered with.",
            code="bad_journal",
            remedy="See the log for the nodes that gave them; ask anew.",
        )
    return Unavailable(
        "None of the nodes that keep this session's journal gave it.",
        code="journal_unavailable",
        remedy="Try again in a moment; see 'pyagent-node status' for nodes that are away.",
    )


class Sessions(NamedTuple):
    """A node's part in sessions: those it heads, and how it comes to head others."""

    live: LiveSessions
    recovery: SessionRecovery
    moved: MovedSessions


@asynccontextmanager
async def open_sessions(
    peer_id: PeerId,
    consensus: Consensus,
    rpc: Rpc,
    journals: JournalKeeper,
    engine: ResumableEngine,
    *,
    wall: Callable[[], float] = time.time,
) -> AsyncIterator[Sessions]:
    """Run sessions on ``engine`` while the context lasts, with journals and resuming."""
    recovery = SessionRecovery(
        peer_id,
        consensus,
        rpc,
        journals.holder,
        can_serve=lambda model: model in consensus.state.placements,
        wall=wall,
    )
    async with open_live_sessions(engine, journals, recovery.recover) as live:
        journals.on_claimed = live.claimed
        yield Sessions(live, recovery, MovedSessions(rpc.mesh, consensus, live.attach))
