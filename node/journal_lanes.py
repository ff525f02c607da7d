"""The stream to one holder: what is new goes out together, and nobody waits for it.

A lane remembers how far each session is at its holder, and sends what is missing whenever it gets a
turn; tokens that come meanwhile go with the next message.  So a slow holder costs memory of the
journal only, which the head keeps anyway.  A lane that fails tells each session's owner once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import (
    DeadlineExceeded,
    LimitExceeded,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import DIAL_SECONDS, MIB
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.node.journal_messages import (
    PROTOCOL,
    TO_HEAD,
    TO_HOLDER,
    Append,
    Begin,
    End,
    Held,
    ToHolder,
)
from pyagent_node.node.journal_session import HeadedSession

log = logging.getLogger("pyagent_node.journals")

MAX_COPY: Final = 32 * MIB
"""Bytes of a journal that is copied to others; a larger one is not."""
ACK_SECONDS: Final = 1.0
"""How often a holder is asked how far it is."""


class LaneOwner(Protocol):
    """Who hears of a lane; both methods return at once and never raise."""

    def held(self, peer: PeerId, session: SessionId, tokens: int) -> None:
        """``peer`` holds so many tokens of a session (public id)."""
        ...

    def lost(self, peer: PeerId, session: SessionId, error: PyAgentError) -> None:
        """``peer`` does not hold the session (public id) any more."""
        ...


class JournalLane:
    """The journals that this node has copied to ``peer``."""

    def __init__(self, mesh: Mesh, peer: PeerId, owner: LaneOwner) -> None:
        self.peer = peer
        self.bytes_sent = 0
        self._mesh = mesh
        self._owner = owner
        self._sessions: dict[SessionId, HeadedSession] = {}
        self._sent: dict[SessionId, int] = {}
        self._asked: dict[SessionId, float] = {}
        self._dirty: dict[SessionId, None] = {}
        self._over: dict[SessionId, None] = {}
        self._wake = trio.Event()
        self._failure: PyAgentError | None = None

    @property
    def idle(self) -> bool:
        """Whether everything was sent."""
        return not self._dirty and not self._over

    def __contains__(self, session: SessionId) -> bool:
        return session in self._sessions

    def add(self, session: HeadedSession) -> None:
        """Copy a session from now on, from its beginning."""
        self._sessions[session.public] = session
        self._sent.pop(session.public, None)
        self._over.pop(session.public, None)
        self.touch(session.public)

    def touch(self, session: SessionId) -> None:
        """Send what is new of a session."""
        if session in self._sessions:
            self._dirty[session] = None
            self._wake.set()

    def remove(self, session: SessionId, *, end: bool) -> None:
        """Copy a session no more; ``end`` tells the holder to forget it."""
        if self._sessions.pop(session, None) is not None:
            self._dirty.pop(session, None)
            self._asked.pop(session, None)
            if self._sent.pop(session, None) is not None and end:
                self._over[session] = None
                self._wake.set()

    async def run(self) -> None:
        """Serve the lane until its stream fails; never raises a :class:`PyAgentError`."""
        try:
            with trio.fail_after(DIAL_SECONDS):
                stream = await self._mesh.open(self.peer, PROTOCOL)
            try:
                await self._drive(stream)
            finally:
                with trio.move_on_after(1, shield=True):
                    await stream.aclose()
        except trio.TooSlowError:
            self._failure = DeadlineExceeded("The holder did not answer.", code="peer_unreachable")
        except PyAgentError as error:
            self._failure = error
        failure = self._failure or Unavailable(
            "The holder closed the stream.", code="stream_closed"
        )
        log.debug("no more journals to %s: %s", self.peer, failure)
        for session in list(self._sessions):
            self._lose(session, failure)

    async def _drive(self, stream: FrameStream) -> None:
        async with trio.open_nursery() as nursery:

            async def guard(task: Callable[[FrameStream], Awaitable[None]]) -> None:
                try:
                    await task(stream)
                except PyAgentError as error:
                    self._failure = error
                nursery.cancel_scope.cancel()

            nursery.start_soon(guard, self._pump)
            nursery.start_soon(guard, self._hear)

    def _lose(self, session: SessionId, error: PyAgentError) -> None:
        self.remove(session, end=False)
        self._owner.lost(self.peer, session, error)

    async def _hear(self, stream: FrameStream) -> None:
        while (frame := await stream.receive()) is not None:
            answer = TO_HEAD.decode(frame.header)
            session = self._sessions.get(answer.session)
            if session is None:
                continue
            if isinstance(answer, Held):
                tokens = min(max(answer.tokens, 0), session.tokens)
                self._owner.held(self.peer, answer.session, tokens)
            else:
                self._lose(answer.session, error_from_info(answer.error))

    async def _pump(self, stream: FrameStream) -> None:
        while True:
            self._wake = trio.Event()
            if self._over:
                public, _ = self._over.popitem()
                await self._send(stream, End(public))
            elif self._dirty:
                public = next(iter(self._dirty))
                del self._dirty[public]
                await self._copy(stream, self._sessions[public])
            else:
                await self._wake.wait()

    async def _copy(self, stream: FrameStream, session: HeadedSession) -> None:
        public, sent, now = session.public, self._sent.get(session.public), trio.current_time()
        if session.size > MAX_COPY:
            too_long = LimitExceeded(
                f"A journal of {session.size} bytes is not copied.", code="journals_full"
            )
            self._lose(public, too_long)
            return
        if sent is None:
            message: ToHolder = Begin(public, session.claim, session.signature())
            tail = session.tail()
        elif sent < session.tokens:
            ask = now >= self._asked.get(public, 0.0) + ACK_SECONDS
            message = Append(public, sent, session.signature(), ack=ask)
            tail = session.tail(sent)
            if ask:
                self._asked[public] = now
        else:
            return
        self._sent[public] = session.tokens
        await self._send(stream, message, tail)

    async def _send(self, stream: FrameStream, message: ToHolder, tail: bytes = b"") -> None:
        frame = Frame(TO_HOLDER.encode(message), tail)
        self.bytes_sent += len(frame.header) + len(tail)
        if not stream.try_send(frame):
            await stream.send(frame)
