"""The sessions that this node heads, apart from whoever reads them.

A generation runs in a task of its own and keeps its events, so that a reader can come back: by the
session's id, from any token on.  One reader at a time: the last one to come gets the answer, the
one before is told so (a client whose connection is half dead must be able to come back).

A session that nobody reads ends at once, unless its request asked to be waited for
(``resume_seconds``).  Then it is also there for a while after it was sent to its end: what was sent
need not have arrived.  A session that is not here is taken over from its former head.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Final, NamedTuple, Protocol

import trio

from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import (
    Engine,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.engine import new_session_id
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.node.api.errors import as_pyagent_error
from pyagent_node.node.live_session import RESUMED_SECONDS, LiveSession, Reader, Successor
from pyagent_node.node.nurseries import background

log = logging.getLogger("pyagent_node.sessions")

MAX_UNREAD: Final = 64
"""Sessions that go on without a reader."""
SENT_SECONDS: Final = 30.0
"""How long a whole answer is kept, at most, after it was sent."""
LEAVE_SECONDS: Final = 5.0
"""Longest wait for a generation to end on all ranks after its reader left."""


class ResumableEngine(Engine, Protocol):
    """An engine whose sessions can be gone on with elsewhere; see ``PipelineEngine``."""

    def resume(
        self, journal: SessionJournal, after: int
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Go on with a generation that another head began."""
        ...

    def fail(self, session: SessionId, error: PyAgentError) -> bool:
        """End a session with ``error``."""
        ...


class Retainer(Protocol):
    """Who keeps journals; see ``JournalKeeper``."""

    def retain(self, session: SessionId, claim: int = 1) -> None:
        """Keep the journal until it is released."""
        ...

    def release(self, session: SessionId) -> None:
        """The answer was read, or never will be."""
        ...


class Recovered(NamedTuple):
    """A session's journal, and the number under which this node heads it now."""

    journal: SessionJournal
    claim: int


Start = Callable[[], AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]]
Recover = Callable[[SessionId], Awaitable[Recovered]]
GiveAway = Callable[[SessionId, float], Awaitable[Successor]]
"""Has another node become the head of a session, which waits so many seconds for its reader."""


class LiveSessions:
    """All of them; get one from :func:`open_live_sessions`."""

    def __init__(
        self,
        engine: ResumableEngine,
        retainer: Retainer,
        recover: Recover,
        nursery: trio.Nursery,
        *,
        session_ids: Callable[[], SessionId] = new_session_id,
    ) -> None:
        self.taken_over = 0
        self._engine = engine
        self._retainer = retainer
        self._recover = recover
        self._nursery = nursery
        self._session_ids = session_ids
        self._live: dict[SessionId, LiveSession] = {}
        self._coming: dict[SessionId, trio.Lock] = {}

    def __len__(self) -> int:
        return len(self._live)

    def new_id(self) -> SessionId:
        """Return a fresh session id."""
        return self._session_ids()

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest, *, resume_seconds: float = 0.0
    ) -> AsyncIterator[Reader]:
        """Run one generation, whose ``session`` is given, and read it while the context lasts.

        Leaving it before the end cancels the generation on every rank, or, with ``resume_seconds``,
        lets it go on for so long.  Raises as ``Engine.generate`` does, from iterating.
        """
        assert request.session is not None, "whoever asks names the session"
        live = LiveSession(request.session, request.model, request.label, resume_seconds)
        self._start(live, 1, lambda: self._engine.generate(request))
        async with self._reading(live, 0) as reader:
            yield reader

    @asynccontextmanager
    async def attach(self, session: SessionId, after: int) -> AsyncIterator[Reader]:
        """Read a session from the token with index ``after`` on; takes it over if need be.

        Raises what ``SessionRecovery.recover`` raises, and while iterating what :class:`Reader`
        and ``PipelineEngine.resume`` do.
        """
        live = self._live.get(session) or await self._take_over(session)
        async with self._reading(live, after) as reader:
            yield reader

    def claimed(self, session: SessionId, error: PyAgentError) -> None:
        """Another node heads the session now: stop it."""
        self._engine.fail(session, error)

    def running(self, session: SessionId) -> LiveSession:
        """Return a session in progress here.  Raises :class:`NotFound` (``session_not_here``)."""
        live = self._live.get(session)
        if live is None or live.done.is_set():
            raise NotFound(
                f"No session {session[:40]!r} is in progress here.",
                code="session_not_here",
                remedy="See 'pyagent-node session list'.",
            )
        return live

    async def move(self, session: SessionId, give_away: GiveAway) -> int:
        """Let another node head the session; its reader here goes on reading.

        Returns how many tokens there were then.  Raises :class:`NotFound` (``session_not_here``),
        :class:`Conflict` (``session_moving``) and what ``give_away`` raises; the session then goes
        on here, unless it was claimed all the same.
        """
        live = self.running(session)
        if live.moving or live.successor is not None:
            raise Conflict("The session is being moved already.", code="session_moving")
        live.moving = True
        live.settled = trio.Event()
        try:
            live.successor = await give_away(session, live.seconds)
        finally:
            live.moving = False
            live.settled.set()
        return len(live.events)

    def adopt(self, journal: SessionJournal, seconds: float) -> None:
        """Head a session that nobody reads yet; it waits ``seconds`` for somebody who does.

        Raises :class:`Conflict` (``session_exists``) and :class:`LimitExceeded`
        (``too_many_unread``).
        """
        if sum(live.reader is None for live in self._live.values()) >= MAX_UNREAD:
            raise LimitExceeded(
                f"{MAX_UNREAD} sessions wait for a reader already.",
                code="too_many_unread",
                remedy="Read some of them, or wait until they are forgotten.",
            )
        live = LiveSession(journal.session, journal.model, journal.label, seconds)
        self._start(live, 1, lambda: self._engine.resume(journal, 0))
        self._nursery.start_soon(self._expire, live, live.visits, seconds)

    # ---- inside ------------------------------------------------------------------------------

    async def _take_over(self, session: SessionId) -> LiveSession:
        lock = self._coming.setdefault(session, trio.Lock())
        try:
            async with lock:
                live = self._live.get(session)  # of who came first
                if live is None:
                    journal, claim = await self._recover(session)
                    live = LiveSession(session, journal.model, journal.label, RESUMED_SECONDS)
                    self._start(live, claim, lambda: self._engine.resume(journal, 0))
                    self.taken_over += 1
                return live
        finally:
            if not lock.statistics().tasks_waiting and self._coming.get(session) is lock:
                del self._coming[session]

    def _start(self, live: LiveSession, claim: int, start: Start) -> None:
        if live.session in self._live:
            raise Conflict("This node heads that session already.", code="session_exists")
        self._live[live.session] = live
        self._retainer.retain(live.session, claim)
        self._nursery.start_soon(self._run, live, start)

    async def _run(self, live: LiveSession, start: Start) -> None:
        try:
            with live.scope:
                try:
                    async with start() as events:
                        await _pass_on(events, live)
                except PyAgentError as error:
                    if error.code != "session_claimed":
                        raise
                    await live.settled.wait()  # the claim may be here before the new head's word
                    if live.successor is None:
                        raise
                    await self._follow(live, live.successor)
        except Exception as error:
            live.failure = as_pyagent_error(error)
        finally:
            live.end()
            if live.successor is not None:
                with trio.move_on_after(LEAVE_SECONDS, shield=True):
                    await live.successor.aclose()

    async def _follow(self, live: LiveSession, successor: Successor) -> None:
        """Pass on what a session's new head makes; take it back should that one be lost."""
        try:
            async with aclosing(successor.events(len(live.events))) as events:
                await _pass_on(events, live)
        except PyAgentError as error:
            if error.code != "stream_closed":
                raise
            log.info("a session's new head is lost, it is taken back: %s", error)
            journal, claim = await self._recover(live.session)
            self._retainer.retain(live.session, claim)
            async with self._engine.resume(journal, len(live.events)) as events:
                await _pass_on(events, live)

    @asynccontextmanager
    async def _reading(self, live: LiveSession, after: int) -> AsyncIterator[Reader]:
        reader = Reader(live, after)
        if live.reader is not None:
            live.reader.replaced = True
            live.reader.wake.set()
        live.reader = reader
        live.visits += 1
        live.make_room()
        whole = False
        try:
            yield reader
            whole = reader.complete
        except PyAgentError:
            whole = reader.complete
            raise
        finally:
            if live.reader is reader:
                live.reader = None
                await self._leave(live, whole)

    async def _leave(self, live: LiveSession, whole: bool) -> None:
        """A session's only reader is gone; ``whole``: it was given everything."""
        seconds = live.seconds
        if whole:
            seconds = 0.0 if live.failure is not None else min(seconds, SENT_SECONDS)
        unread = [each for each in self._live.values() if each.reader is None]
        if seconds and len(unread) > MAX_UNREAD:
            over = [each for each in unread if each.done.is_set()]
            if over:
                await self._stop(over[0])
            else:
                seconds = 0.0
        if not seconds:
            await self._stop(live)
            return
        live.make_room()
        self._nursery.start_soon(self._expire, live, live.visits, seconds)

    async def _expire(self, live: LiveSession, visits: int, seconds: float) -> None:
        await trio.sleep(seconds)
        if live.reader is None and live.visits == visits:
            log.info("a session is forgotten that nobody has read for %g s", seconds)
            await self._stop(live)

    async def _stop(self, live: LiveSession) -> None:
        live.scope.cancel()
        with trio.move_on_after(LEAVE_SECONDS, shield=True):
            await live.done.wait()
        if self._live.get(live.session) is live:
            del self._live[live.session]
            self._retainer.release(live.session)


async def _pass_on(events: AsyncIterator[GenerationEvent], live: LiveSession) -> None:
    """Hand events to whoever reads the session."""
    async for event in events:
        live.put(event)
        await live.room()


@asynccontextmanager
async def open_live_sessions(
    engine: ResumableEngine, retainer: Retainer, recover: Recover
) -> AsyncIterator[LiveSessions]:
    """Run sessions while the context lasts; leaving it ends them."""
    async with background() as nursery:
        yield LiveSessions(engine, retainer, recover, nursery)
