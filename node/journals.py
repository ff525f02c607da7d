"""The head's side of journals: copies at other nodes, manifests in the log, the end of both.

A session's journal goes to ``journal_copies`` peers (a mesh setting) once it has lasted
:data:`SETTLE_SECONDS`; when they have it, the log learns who they are.  From then on any node can
go on with the session, for ``session_ttl`` seconds after its head was last heard of.  A holder that
is lost is replaced.  If the log says that another node took a session over, this one stops it.

Nothing here is waited for by a token: the engine's calls note what happened, tasks do the rest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.commands import ClaimSession
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.pipeline.journal import Outcome, SessionJournal
from pyagent_node.inference.sampling import Sampled
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.journal_book import JournalBook, Writer, claimed
from pyagent_node.node.journal_choice import choose_holders, usable_peers
from pyagent_node.node.journal_holding import JournalHolder, keep_seconds
from pyagent_node.node.journal_lanes import JournalLane
from pyagent_node.node.journal_manifests import Manifests
from pyagent_node.node.journal_messages import Begin, JournalCopy
from pyagent_node.node.journal_session import HeadedSession
from pyagent_node.node.kv_messages import Report
from pyagent_node.node.kv_rights import computed
from pyagent_node.node.nurseries import background
from pyagent_node.node.rpc import Rpc
from pyagent_node.node.telemetry import Sample

log = logging.getLogger("pyagent_node.journals")

SETTLE_SECONDS: Final = 0.5
"""A session that is over sooner is never copied."""
GRACE_SECONDS: Final = 5.0
"""How long a finished session can still be resumed, should its last tokens have been lost."""
LOOK_SECONDS: Final = 5.0
"""How often a session's holders are looked over even if nothing happened."""
SHUN_SECONDS: Final = 10.0
"""How long a peer that failed as a holder is given nothing new."""
FLUSH_SECONDS: Final = 1.0
"""Longest time that a node which ends takes to hand out the last tokens."""
WIRE_DIGITS: Final = 16
"""Digits of a session's id with which the ids of its attempts begin."""
RENEWALS: Final = 4
"""Renewals of a manifest in one ``session_ttl``."""


class JournalKeeper:
    """Implements ``JournalSink``; get one from :func:`open_journals`."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        key: NodeKey,
        holder: JournalHolder,
        *,
        wall: Callable[[], float],
        nursery: trio.Nursery,
    ) -> None:
        self.on_claimed: Callable[[SessionId, PyAgentError], None] = lambda _id, _error: None
        """Told of a session that another node took over; it must be stopped."""
        self.holder = holder
        self._mesh = mesh
        self._consensus = consensus
        self._key = key
        self._nursery = nursery
        self._manifests = Manifests(consensus, mesh.peer_id, wall)
        self._manifests.committed = self._check
        self._own = Writer(mesh.peer_id)
        self._sessions: dict[SessionId, HeadedSession] = {}
        """By public id."""
        self._by_id: dict[SessionId, HeadedSession] = {}
        self._claims: dict[SessionId, int] = {}
        """The sessions that somebody reads, by their own ids, with how many heads they had."""
        self._lanes: dict[PeerId, JournalLane] = {}
        self._shunned: dict[PeerId, float] = {}
        self._stopping = False
        self._bytes_sent = 0
        self._holders_lost = 0
        self._claimed = 0
        holder.own = self._export
        nursery.start_soon(self._manifests.run)
        nursery.start_soon(self._follow_claims)
        nursery.start_soon(self._follow_peers)

    # ---- the engine's word ---------------------------------------------------------------------

    def begin(self, journal: SessionJournal) -> None:
        """See ``JournalSink``."""
        claim = self._claims.get(journal.session)
        session = HeadedSession(journal, self._mesh.peer_id, claim or 1, self._key.sign)
        session.retained = claim is not None
        self._sessions[session.public] = session
        self._by_id[journal.session] = session
        self._nursery.start_soon(self._tend, session)

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """See ``JournalSink``."""
        known = self._by_id.get(session)
        if known is not None:
            known.append(start, tokens)
            for peer in known.wanted:
                if (lane := self._lanes.get(peer)) is not None:
                    lane.touch(known.public)

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """See ``JournalSink``."""
        known = self._by_id.get(session)
        if known is not None:
            known.outcome = outcome
            known.kept = known.kept or outcome == "failed" or self._stopping
            known.touch()

    # ---- who reads the answers ---------------------------------------------------------------

    def retain(self, session: SessionId, claim: int = 1) -> None:
        """Keep the session's journal until :meth:`release`, even when its last token is made.

        Call it before the engine begins the session; ``claim`` counts its heads.
        """
        self._claims[session] = claim

    def release(self, session: SessionId) -> None:
        """The session's answer was read to its end, or nobody will."""
        self._claims.pop(session, None)
        known = self._by_id.get(session)
        if known is not None:
            known.retained = False
            known.touch()

    def blocks_held(self, peer: PeerId, report: Report) -> None:
        """Take a rank's word about who holds the KV blocks of sessions that this node heads.

        What somebody says of layers that he does not compute, or of an unknown session, is not
        heard.  A session's ids on the wire begin as its own does.
        """
        sessions = {session[:WIRE_DIGITS]: known for session, known in self._by_id.items()}
        for each in report.sessions:
            known = sessions.get(each.session[:WIRE_DIGITS])
            layers = range(each.first_layer, each.last_layer)
            if known is None or known.model != each.model:
                continue
            if computed(self._consensus.state, each.model, peer).issuperset(layers):
                known.kv.learn(each)
                known.touch()

    def stop(self) -> None:
        """This node is ending: whatever ends from now on may go on elsewhere."""
        self._stopping = True
        for session in self._sessions.values():
            if session.outcome != "finished" or session.retained:
                session.kept = True
                session.touch()

    async def flush(self) -> None:
        """Wait until every holder was sent all there is."""
        while not all(lane.idle for lane in self._lanes.values()):  # noqa: ASYNC110 - many lanes
            await trio.sleep(0.01)

    def samples(self) -> Iterator[Sample]:
        """Yield what is counted here."""
        book = self.holder.book
        gauges = (
            ("sessions_headed", "Sessions whose journal this node writes.", len(self._sessions)),
            ("journals_kept", "Journals kept for other heads.", len(book)),
            ("journal_bytes", "Bytes of journals kept for other heads.", book.size),
        )
        for name, text, value in gauges:
            yield Sample(name, text, value, "gauge")
        sent = self._bytes_sent + sum(lane.bytes_sent for lane in self._lanes.values())
        yield Sample("journal_sent_bytes", "Bytes of journals sent to holders.", sent)
        yield Sample("journal_holders_lost", "Holders that were lost.", self._holders_lost)
        yield Sample("sessions_claimed", "Sessions that other nodes took over.", self._claimed)

    # ---- what lanes say ----------------------------------------------------------------------

    def held(self, peer: PeerId, session: SessionId, tokens: int) -> None:
        """See ``LaneOwner``."""
        known = self._sessions.get(session)
        if known is not None and peer in known.wanted:
            known.holders[peer] = tokens
            if known.registered is None or peer not in known.registered:
                known.touch()

    def lost(self, peer: PeerId, session: SessionId, error: PyAgentError) -> None:
        """See ``LaneOwner``."""
        self._shunned[peer] = trio.current_time() + SHUN_SECONDS
        known = self._sessions.get(session)
        if known is not None and peer in known.wanted:
            log.info("%s keeps a journal no more: %s", peer, error)
            self._holders_lost += 1
            known.wanted.discard(peer)
            known.holders.pop(peer, None)
            known.touch()
            if error.code == "session_claimed":
                self._nursery.start_soon(self._ask_log, known)

    # ---- a session's life --------------------------------------------------------------------

    async def _tend(self, session: HeadedSession) -> None:
        try:
            if session.claim == 1:
                with trio.move_on_after(SETTLE_SECONDS):
                    while session.outcome is None:
                        await session.changed()
                if session.outcome is not None:
                    return
            renew = 0.0
            while not session.over:
                now = trio.current_time()
                self._assign(session, now)
                if session.holders and (
                    session.registered != session.holders.keys()
                    or now >= renew
                    or session.kv.due(now)
                ):
                    self._manifests.put(session)
                    renew = now + self._consensus.state.settings["session_ttl"] / RENEWALS
                with trio.move_on_at(min(now + LOOK_SECONDS, max(renew, now + 1))):
                    await session.changed()
            if session.outcome == "finished" and not session.kept:
                with trio.move_on_after(GRACE_SECONDS):
                    while not session.kept:
                        await session.changed()
        finally:
            self._close(session)

    def _assign(self, session: HeadedSession, now: float) -> None:
        state = self._consensus.state
        peers = usable_peers(self._mesh.peers(), state)
        chosen = choose_holders(
            session.public,
            state.settings["journal_copies"],
            peers,
            current=session.wanted or self._former_holders(session),
            shunned=[peer for peer, until in self._shunned.items() if until > now],
        )
        for peer in session.wanted - set(chosen):
            self._leave(peer, session, end=True)
            session.wanted.discard(peer)
            session.holders.pop(peer, None)
        for peer in chosen:
            if peer not in session.wanted:
                session.wanted.add(peer)
                self._lane(peer).add(session)

    def _former_holders(self, session: HeadedSession) -> tuple[PeerId, ...]:
        """Return who keeps copies of the head before this one, which ours then replace."""
        known = self._consensus.state.checkpoints.get(session.public)
        return known.holders if known is not None else ()

    def _close(self, session: HeadedSession) -> None:
        if self._sessions.get(session.public) is session:
            del self._sessions[session.public]
        if self._by_id.get(session.session) is session:
            del self._by_id[session.session]
        for peer in session.wanted:
            self._leave(peer, session, end=not session.kept)
        if session.kept:
            self._manifests.leave(session)
            self._shelve(session)
        else:
            self._manifests.drop(session)

    def _shelve(self, session: HeadedSession) -> None:
        """Keep the journal here as a holder does, for whoever goes on with the session."""
        message = Begin(session.public, session.claim, session.signature())
        now = trio.current_time()
        try:
            copy = self.holder.book.begin(self._own, message, list(session.pieces), now)
            copy.expires = now + keep_seconds(self._consensus)
        except PyAgentError as error:
            log.info("the journal of an ended session is not kept here: %s", error)

    def _export(self, public: SessionId) -> tuple[JournalCopy, bytes] | None:
        session = self._sessions.get(public)
        return None if session is None else session.export()

    # ---- lanes -------------------------------------------------------------------------------

    def _lane(self, peer: PeerId) -> JournalLane:
        lane = self._lanes.get(peer)
        if lane is None:
            lane = self._lanes[peer] = JournalLane(self._mesh, peer, self)
            self._nursery.start_soon(self._run_lane, lane)
        return lane

    def _leave(self, peer: PeerId, session: HeadedSession, *, end: bool) -> None:
        if (lane := self._lanes.get(peer)) is not None:
            lane.remove(session.public, end=end)

    async def _run_lane(self, lane: JournalLane) -> None:
        try:
            await lane.run()
        finally:
            self._bytes_sent += lane.bytes_sent
            del self._lanes[lane.peer]

    async def _follow_peers(self) -> None:
        """Look for holders anew when a peer comes."""
        async with self._mesh.events() as events:
            async for event in events:
                if event.change == "up":
                    self._shunned.pop(event.peer_id, None)
                    for session in self._sessions.values():
                        session.touch()

    # ---- who heads what ----------------------------------------------------------------------

    async def _follow_claims(self) -> None:
        while True:
            try:
                async with self._consensus.applied(self._consensus.state.index) as entries:
                    for session in list(self._sessions.values()):
                        self._check(session)
                    async for entry in entries:
                        if isinstance(entry.command, ClaimSession) and entry.error is None:
                            claimed_one = self._sessions.get(entry.command.session)
                            if claimed_one is not None:
                                self._check(claimed_one)
            except LimitExceeded as error:
                log.info("reading the state anew: %s", error)

    async def _ask_log(self, session: HeadedSession) -> None:
        """A holder says that the session is another's; only the log's word counts."""
        try:
            await self._consensus.read_barrier()
        except PyAgentError as error:
            log.info("who heads a session could not be read: %s", error)
        self._check(session)

    def _check(self, session: HeadedSession) -> None:
        """Stop a session that another node took over."""
        known = self._consensus.state.checkpoints.get(session.public)
        mine = (session.claim, self._mesh.peer_id)
        if known is None or known.claim < session.claim or (known.claim, known.head) == mine:
            return
        if session.kept and session.over:
            return
        session.kept = True
        session.touch()
        self._claimed += 1
        self.on_claimed(session.session, claimed(known.head))


@asynccontextmanager
async def open_journals(
    mesh: Mesh,
    consensus: Consensus,
    rpc: Rpc,
    key: NodeKey,
    *,
    wall: Callable[[], float] = time.time,
    book: JournalBook | None = None,
) -> AsyncIterator[JournalKeeper]:
    """Write this node's journals and keep those of others while the context lasts.

    ``wall`` gives Unix seconds.
    """
    holder = JournalHolder(mesh, consensus, rpc, JournalBook() if book is None else book)
    async with background() as nursery:
        nursery.start_soon(holder.sweep)
        keeper = JournalKeeper(mesh, consensus, key, holder, wall=wall, nursery=nursery)
        try:
            yield keeper
        finally:
            with trio.move_on_after(FLUSH_SECONDS, shield=True):
                await keeper.flush()
