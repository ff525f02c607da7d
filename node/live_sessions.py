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
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, NamedTuple, Protocol

import trio

from pyagent_node.base.errors import Conflict, InvalidRequest, PyAgentError, Unavailable
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import (
    Engine,
    Finished,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.engine import new_session_id
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.node.api.errors import as_pyagent_error
from pyagent_node.node.nurseries import background

log = logging.getLogger("pyagent_node.sessions")

READ_AHEAD: Final = 32
"""Events that may wait for a slow reader; then the generation waits too."""
MAX_UNREAD: Final = 64
"""Sessions that go on without a reader."""
RESUMED_SECONDS: Final = 30.0
"""How long a session that was taken over is waited for, at least, when its reader is lost again."""
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


class LiveSession:
    """One session and what it has answered; ``seconds`` is how long it waits for a reader."""

    def __init__(self, session: SessionId, model: str, label: str, seconds: float) -> None:
        self.session = session
        self.model = model
        self.label = label
        self.seconds = seconds
        self.events: list[GenerationEvent] = []
        self.failure: PyAgentError | None = None
        self.done = trio.Event()
        """Set when the generation is over."""
        self.scope = trio.CancelScope()
        self.reader: Reader | None = None
        self.visits = 0
        self._room = trio.Event()

    def put(self, event: GenerationEvent) -> None:
        """Take an event."""
        self.events.append(event)
        if self.reader is not None:
            self.reader.wake.set()

    async def room(self) -> None:
        """Wait while a reader is there and lags behind."""
        while self.reader is not None and len(self.events) - self.reader.at >= READ_AHEAD:
            self._room = trio.Event()
            await self._room.wait()

    def make_room(self) -> None:
        """Let the generation look whether it may go on."""
        self._room.set()

    def end(self) -> None:
        """The generation is over."""
        if self.failure is None and not (self.events and isinstance(self.events[-1], Finished)):
            self.failure = Unavailable(
                "The session was ended by this node.",
                code="session_ended",
                remedy="Its client was away for too long, or the node is stopping.",
            )
        self.done.set()
        if self.reader is not None:
            self.reader.wake.set()


class Reader:
    """The events of a session from the token with index ``after`` on."""

    def __init__(self, live: LiveSession, after: int) -> None:
        self.live = live
        self.after = after
        self.at = 0
        self.wake = trio.Event()
        self.replaced = False
        self.complete = False
        """Whether the end of the answer, or its error, was given out."""

    @property
    def skipped(self) -> list[GenerationEvent]:
        """The events before ``after`` that there are."""
        return self.live.events[: self.after]

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> GenerationEvent:
        """Return the next event.

        Raises the error that ended the session, :class:`Conflict` (``session_read_elsewhere``),
        and :class:`InvalidRequest` (``beyond_end``) when the answer ended before ``after``.
        """
        live = self.live
        while True:
            if self.replaced:
                raise Conflict(
                    "Another connection reads this session now.", code="session_read_elsewhere"
                )
            if self.at < len(live.events):
                event = live.events[self.at]
                if self.at < self.after and isinstance(event, Finished):
                    raise _beyond_end(self.after, self.at)
                self.at += 1
                live.make_room()
                if self.at > self.after or isinstance(event, Finished):
                    self.complete = isinstance(event, Finished)
                    return event
            elif self.complete:
                raise StopAsyncIteration
            elif live.done.is_set():
                self.complete = True
                raise live.failure or StopAsyncIteration
            else:
                self.wake = trio.Event()
                await self.wake.wait()


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
                async with start() as events:
                    async for event in events:
                        live.put(event)
                        await live.room()
        except Exception as error:
            live.failure = as_pyagent_error(error)
        finally:
            live.end()

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


def _beyond_end(after: int, tokens: int) -> InvalidRequest:
    return InvalidRequest(
        f"The answer has {tokens} tokens; there is nothing from {after} on.",
        code="beyond_end",
        tokens=tokens,
        parameter="from",
    )


@asynccontextmanager
async def open_live_sessions(
    engine: ResumableEngine, retainer: Retainer, recover: Recover
) -> AsyncIterator[LiveSessions]:
    """Run sessions while the context lasts; leaving it ends them."""
    async with background() as nursery:
        yield LiveSessions(engine, retainer, recover, nursery)
