"""Moves a session that is being read from one head to another, over ``/pyagent/session/1``.

The head asks the other node to take the session over (:class:`TakeOver`); that node claims it in
the log and fetches its journal, as after a head's death (see ``session_recovery``).  The former
head then is a reader like any other: it asks for the events from where its own end (:class:`Read`)
and passes them on to its client, who notices nothing.  The tokens are those it would have made.

What a peer may ask: only the head of a session, by the log, may give it away, and it must know the
session's id, which the log does not tell.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    CorruptData,
    ErrorInfo,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    Refused,
    error_from_info,
)
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.generation import Finished, Generated, GenerationEvent
from pyagent_node.node.journal_messages import public_id
from pyagent_node.node.live_session import RESUMED_SECONDS, Reader
from pyagent_node.node.nurseries import background, deadline

log = logging.getLogger("pyagent_node.sessions")

PROTOCOL: Final = "/pyagent/session/1"
TAKE_SECONDS: Final = 45.0
"""Longest time in which a node takes a session over: it may have to become head first."""
READ_SECONDS: Final = 30.0
"""How long a new head waits for the former one to say from where on it reads."""
BARRIER_SECONDS: Final = 5.0
MAX_MOVED: Final = 32
"""Sessions that a node reads out to their former heads at the same time."""
MAX_SECONDS: Final = 86_400.0


class TakeOver(msgspec.Struct, frozen=True, tag="take_over"):
    """Become the head of a session; it waits ``seconds`` for a reader that went away."""

    session: SessionId
    seconds: float


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """It is so: ``tokens`` are known here already."""

    tokens: int


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Send the events from the token with index ``after`` on."""

    after: int


class Token(msgspec.Struct, frozen=True, tag="token"):
    """One token."""

    event: Generated


class End(msgspec.Struct, frozen=True, tag="end"):
    """The end of the answer."""

    event: Finished


class Broken(msgspec.Struct, frozen=True, tag="broken"):
    """The session was not taken, or has ended with an error."""

    error: ErrorInfo


TO_NEW_HEAD: Final[Codec[TakeOver | Read]] = Codec("session", TakeOver, Read)
TO_FORMER_HEAD: Final[Codec[Taken | Token | End | Broken]] = Codec(
    "session", Taken, Token, End, Broken
)

Attach = Callable[[SessionId, int], AbstractAsyncContextManager[Reader]]


class Successor:
    """A session's new head, as its former one sees it; get one from :func:`ask`."""

    def __init__(self, stream: FrameStream, known: int) -> None:
        self.peer = stream.peer
        self.known = known
        """How many tokens the new head knew when it took the session over."""
        self._stream = stream

    async def events(self, after: int) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events from the token with index ``after`` on.

        Raises the error that ended the session there, :class:`Unavailable` (``stream_closed``)
        when the new head is lost, and :class:`CorruptData` (``bad_session_event``).
        """
        await self._stream.send(Frame(TO_NEW_HEAD.encode(Read(after))))
        while (frame := await self._stream.receive()) is not None:
            match TO_FORMER_HEAD.decode(frame.header):
                case Token(event):
                    yield event
                case End(event):
                    yield event
                    return
                case Broken(error):
                    raise error_from_info(error)
                case Taken():
                    break
        raise CorruptData("A session's new head broke off.", code="bad_session_event")

    async def aclose(self) -> None:
        """Say that nobody reads there any more; idempotent."""
        await self._stream.aclose()


async def ask(mesh: Mesh, peer: PeerId, session: SessionId, seconds: float) -> Successor:
    """Have ``peer`` become the head of ``session``, which this node heads.

    ``seconds`` is how long the session waits for a reader that went away.  Raises what the peer
    refused it with, :class:`Unavailable` (``peer_unreachable``, ``stream_closed``) and
    :class:`DeadlineExceeded` (``session_not_taken``).
    """
    with deadline(TAKE_SECONDS, "The node did not take it in time.", code="session_not_taken"):
        stream = await mesh.open(peer, PROTOCOL)
        taken = False
        try:
            await stream.send(Frame(TO_NEW_HEAD.encode(TakeOver(session, seconds))))
            frame = await stream.receive()
            answer = None if frame is None else TO_FORMER_HEAD.decode(frame.header)
            if isinstance(answer, Broken):
                raise error_from_info(answer.error)
            if not isinstance(answer, Taken):
                raise CorruptData("A node answered a session's move wrongly.", code="bad_answer")
            taken = True
            return Successor(stream, answer.tokens)
        finally:
            if not taken:
                with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                    await stream.aclose()


class MovedSessions:
    """Takes sessions that their heads give to this node, and reads them out to those heads."""

    def __init__(self, mesh: Mesh, consensus: Consensus, attach: Attach) -> None:
        self.refused: Counter[str] = Counter()
        """What peers asked and was refused, by the error's code."""
        self._consensus = consensus
        self._attach = attach
        self._serving = 0
        mesh.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: FrameStream) -> None:
        try:
            if self._serving >= MAX_MOVED:
                raise LimitExceeded(
                    f"This node reads out {MAX_MOVED} moved sessions already.",
                    code="too_many_sessions",
                )
            self._serving += 1
            try:
                await self._hand_out(stream)
            finally:
                self._serving -= 1
        except PyAgentError as error:
            if error.code == "stream_closed":
                raise
            self.refused[error.code] += 1
            log.info("a session of %s: %s", stream.peer, error)
            await stream.send(Frame(TO_FORMER_HEAD.encode(Broken(error.to_info()))))

    async def _hand_out(self, stream: FrameStream) -> None:
        take = await self._receive(stream)
        if not isinstance(take, TakeOver):
            raise InvalidRequest("A session is taken over before it is read.", code="bad_order")
        if not 0 <= take.seconds <= MAX_SECONDS:
            raise InvalidRequest("A session waits 0 s to a day.", code="bad_parameter")
        await self._check_head(stream.peer, take.session)
        async with self._attach(take.session, 0) as reader:
            live = reader.live
            live.seconds = RESUMED_SECONDS  # should the former head die now, its client may come
            await stream.send(Frame(TO_FORMER_HEAD.encode(Taken(len(live.events)))))
            read = await self._receive(stream)
            if isinstance(read, Read) and read.after >= 0:
                reader.after = read.after
                if await self._read_out(stream, reader):
                    return
            live.seconds = take.seconds  # its own client is gone, as it says

    async def _receive(self, stream: FrameStream) -> TakeOver | Read | None:
        with deadline(READ_SECONDS, "Nothing was said of a moved session.", code="session_idle"):
            frame = await stream.receive()
        return None if frame is None else TO_NEW_HEAD.decode(frame.header)

    async def _check_head(self, peer: PeerId, session: SessionId) -> None:
        with deadline(BARRIER_SECONDS, "The log could not be read in time.", code="no_leader"):
            await self._consensus.read_barrier()
        known = self._consensus.state.checkpoints.get(public_id(session))
        if known is None or known.head != peer:
            raise Refused(
                "Only the head of a session that the mesh knows can give it away.",
                code="not_its_head",
                remedy="A session is known half a second after it began.",
            )

    async def _read_out(self, stream: FrameStream, reader: Reader) -> bool:
        """Send what is read; returns whether the former head was there to the end."""
        left = False

        async def watch() -> None:
            nonlocal left
            try:
                await stream.receive()  # its orderly end: there is nothing else to say
                left = True
            except PyAgentError as error:
                log.info("the former head of a session is gone: %s", error)
            nursery.cancel_scope.cancel()

        async with background() as nursery:
            nursery.start_soon(watch)
            async for event in reader:
                message = End(event) if isinstance(event, Finished) else Token(event)
                await stream.send(Frame(TO_FORMER_HEAD.encode(message)))
        return not left
