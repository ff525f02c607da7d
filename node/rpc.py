"""Requests to peers and their answers, over one long-lived stream to each peer.

A request and a reply are tagged ``msgspec`` structs with an optional raw tail.  Many requests share
a stream, told apart by a number; a slow one holds up no other.  A deadline travels with the
request, a caller that gives up cancels the work at the other end, and an error comes back as
:class:`~pyagent_node.base.errors.ErrorInfo` and is raised as what it was.

>>> async with open_rpc(mesh) as rpc:                                     # doctest: +SKIP
...     rpc.register(Ready, handle_ready)
...     answer, tail = await rpc.call(peer, AskFacts(), NodeFacts)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, TypeVar

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    Unavailable,
    Unsupported,
    error_from_info,
)
from pyagent_node.base.limits import RPC_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Codec, Frame, tag_of
from pyagent_node.node.nurseries import background

log = logging.getLogger("pyagent_node.rpc")

PROTOCOL: Final = "/pyagent/rpc/1"
MAX_CALLS: Final = 64
"""Requests that one stream may have in progress."""
MAX_SECONDS: Final = 600.0
"""Longest deadline that a server takes from a caller."""

Tail = bytes | bytearray | memoryview
Request = TypeVar("Request", bound=msgspec.Struct)
Reply = TypeVar("Reply", bound=msgspec.Struct)
Handler = Callable[[PeerId, Request, bytes], Awaitable[tuple[msgspec.Struct, Tail]]]
"""``handler(peer, message, tail) -> (reply, tail)``; raises :class:`PyAgentError` to refuse."""


class _Call(msgspec.Struct, frozen=True, tag="call"):
    id: int
    seconds: float
    body: msgspec.Raw


class _Reply(msgspec.Struct, frozen=True, tag="reply"):
    id: int
    body: msgspec.Raw


class _Failure(msgspec.Struct, frozen=True, tag="failure"):
    id: int
    error: ErrorInfo


class _Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: int


_ENVELOPE: Final[Codec[_Call | _Reply | _Failure | _Cancel]] = Codec(
    "rpc", _Call, _Reply, _Failure, _Cancel
)
_encode: Final = msgspec.msgpack.Encoder().encode


class _Route(Generic[Request]):
    """One row of the handler table."""

    def __init__(self, kind: type[Request], handler: Handler[Request]) -> None:
        self._codec: Codec[Request] = Codec("rpc", kind)
        self._handler = handler

    async def __call__(self, peer: PeerId, body: msgspec.Raw, tail: bytes) -> tuple[bytes, Tail]:
        reply, out = await self._handler(peer, self._codec.decode(bytes(body)), tail)
        return _encode(reply), out


class _Tag(msgspec.Struct):
    type: str


_tag_of: Final = msgspec.msgpack.Decoder(_Tag)


def _tag(kind: type[msgspec.Struct]) -> str:
    tag = tag_of(kind)
    if tag is None:
        raise TypeError(f"{kind.__name__} has no string tag")
    return tag


class RpcServer:
    """The handler table of this node; serves as soon as it is made."""

    def __init__(self, mesh: Mesh, protocol: str = PROTOCOL) -> None:
        self.refused: Counter[str] = Counter()
        """Requests of peers that were refused, by the error's code."""
        self._routes: dict[str, _Route[Any]] = {}
        mesh.handle(protocol, self._serve)

    def register(self, kind: type[Request], handler: Handler[Request]) -> None:
        """Serve requests of type ``kind`` with ``handler``.

        The handler runs in a task of its own and is cancelled at the caller's deadline.  Raises
        :class:`Conflict` (``handler_exists``) when the tag is taken.
        """
        tag = _tag(kind)
        if tag in self._routes:
            raise Conflict(f"There is a handler for {tag!r} already.", code="handler_exists")
        self._routes[tag] = _Route(kind, handler)

    async def _serve(self, stream: FrameStream) -> None:
        calls: dict[int, trio.CancelScope] = {}
        async with background() as nursery:
            while (frame := await stream.receive()) is not None:
                message = _ENVELOPE.decode(frame.header)
                if isinstance(message, _Cancel):
                    if message.id in calls:
                        calls[message.id].cancel()
                elif isinstance(message, _Call):
                    if message.id in calls:
                        raise Conflict("A request's number is in use.", code="duplicate_call")
                    if len(calls) >= MAX_CALLS:
                        error = LimitExceeded(
                            f"More than {MAX_CALLS} requests at once on one stream.",
                            code="too_many_requests",
                        )
                        self.refused[error.code] += 1
                        await _answer(stream, _Failure(message.id, error.to_info()))
                        continue
                    calls[message.id] = scope = trio.CancelScope()
                    nursery.start_soon(self._one, stream, message, bytes(frame.tail), scope, calls)

    async def _one(
        self,
        stream: FrameStream,
        call: _Call,
        tail: bytes,
        scope: trio.CancelScope,
        calls: dict[int, trio.CancelScope],
    ) -> None:
        try:
            with scope:
                scope.deadline = trio.current_time() + min(max(call.seconds, 0.0), MAX_SECONDS)
                answer, out = await self._answer_to(stream.peer, call, tail)
                if isinstance(answer, _Reply):
                    await _answer(stream, answer, out)
                    return
                await _answer(stream, answer)
        finally:
            calls.pop(call.id, None)

    async def _answer_to(
        self, peer: PeerId, call: _Call, tail: bytes
    ) -> tuple[_Reply | _Failure, Tail]:
        try:
            body, out = await self._route(call.body)(peer, call.body, tail)
            return _Reply(call.id, msgspec.Raw(body)), out
        except PyAgentError as error:
            self.refused[error.code] += 1
            return _Failure(call.id, error.to_info()), b""
        except Exception:
            log.exception("a request of %s failed", peer)
            self.refused["internal"] += 1
            internal = PyAgentError("The peer failed to serve the request.", code="internal")
            return _Failure(call.id, internal.to_info()), b""

    def _route(self, body: msgspec.Raw) -> _Route[Any]:
        try:
            tag = _tag_of.decode(body).type
        except msgspec.DecodeError:
            tag = ""
        route = self._routes.get(tag)
        if route is None:
            raise Unsupported(
                f"This node serves no request of type {tag[:64]!r}.",
                code="unknown_message",
                remedy="It may run another version.",
            )
        return route


async def _answer(stream: FrameStream, message: _Reply | _Failure, tail: Tail = b"") -> None:
    """Send an answer; a stream that is gone is the caller's loss only."""
    try:
        await stream.send(Frame(_ENVELOPE.encode(message), tail))
    except LimitExceeded as error:
        await stream.send(Frame(_ENVELOPE.encode(_Failure(message.id, error.to_info()))))
    except Unavailable as error:
        log.debug("an answer to %s was not delivered: %s", stream.peer, error)


class _Waiter:
    """A request without an answer yet."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.body: msgspec.Raw | None = None
        self.tail: bytes = b""
        self.error: PyAgentError | None = None

    def fail(self, error: PyAgentError) -> None:
        self.error = error
        self.done.set()


class _Conversation:
    """The stream to one peer and the requests that wait on it."""

    def __init__(self, stream: FrameStream) -> None:
        self.stream = stream
        self.waiters: dict[int, _Waiter] = {}
        self.over = False

    async def run(self) -> None:
        """Hand out answers until the stream ends."""
        failure: PyAgentError = Unavailable(
            "The peer closed the stream before it answered.", code="stream_closed"
        )
        try:
            while (frame := await self.stream.receive()) is not None:
                message = _ENVELOPE.decode(frame.header)
                if not isinstance(message, _Reply | _Failure):
                    raise Unsupported("A peer sent a request as an answer.", code="unknown_message")
                waiter = self.waiters.pop(message.id, None)
                if waiter is None:
                    continue  # its caller gave up
                if isinstance(message, _Failure):
                    waiter.fail(error_from_info(message.error))
                else:
                    waiter.body, waiter.tail = msgspec.Raw(bytes(message.body)), bytes(frame.tail)
                    waiter.done.set()
        except PyAgentError as error:
            failure = error
        finally:
            self.over = True
            for waiter in self.waiters.values():
                waiter.fail(failure)
            self.waiters.clear()
            await self.stream.aclose()


class RpcClient:
    """Calls peers; get one from :func:`open_rpc`."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery, protocol: str = PROTOCOL) -> None:
        self._mesh = mesh
        self._nursery = nursery
        self._protocol = protocol
        self._conversations: dict[PeerId, _Conversation] = {}
        self._opening: dict[PeerId, trio.Lock] = {}
        self._last_id = 0

    async def call(
        self,
        peer: PeerId,
        message: msgspec.Struct,
        reply: type[Reply],
        *,
        tail: Tail = b"",
        seconds: float = RPC_SECONDS,
    ) -> tuple[Reply, bytes]:
        """Ask ``peer`` and return its reply and the reply's tail.

        Raises what the handler raised, :class:`Unavailable` when the peer cannot be reached or
        the stream broke (the request may or may not have been served), :class:`DeadlineExceeded`
        after ``seconds``, :class:`CorruptData` or :class:`Unsupported` for an unexpected reply.
        """
        with trio.move_on_after(seconds):
            body = msgspec.Raw(_encode(message))
            waiter = await self._ask(peer, body, tail, seconds)
            if waiter.error is not None:
                raise waiter.error
            if waiter.body is None:
                raise RuntimeError("a waiter was woken without an answer")
            return Codec("rpc reply", reply).decode(bytes(waiter.body)), waiter.tail
        raise DeadlineExceeded(
            f"The peer did not answer {type(message).__name__} within {seconds:g} seconds.",
            peer=peer,
            seconds=seconds,
        )

    async def _ask(self, peer: PeerId, body: msgspec.Raw, tail: Tail, seconds: float) -> _Waiter:
        self._last_id += 1
        number, waiter = self._last_id, _Waiter()
        header = _ENVELOPE.encode(_Call(number, seconds, body))
        talk = await self._conversation(peer)
        talk.waiters[number] = waiter
        try:
            try:
                await talk.stream.send(Frame(header, tail))
            except Unavailable:
                # An old stream that died meanwhile; nothing of this request was served.
                talk.waiters.pop(number, None)
                talk = await self._conversation(peer, instead_of=talk)
                waiter = talk.waiters[number] = _Waiter()
                await talk.stream.send(Frame(header, tail))
            await waiter.done.wait()
        except BaseException:
            if talk.waiters.pop(number, None) is not None and not talk.over:
                self._nursery.start_soon(self._tell_cancelled, talk, number)
            raise
        return waiter

    async def _tell_cancelled(self, talk: _Conversation, number: int) -> None:
        try:
            with trio.move_on_after(RPC_SECONDS):
                await talk.stream.send(Frame(_ENVELOPE.encode(_Cancel(number))))
        except PyAgentError as error:
            log.debug("a cancellation was not delivered: %s", error)

    async def _conversation(
        self, peer: PeerId, *, instead_of: _Conversation | None = None
    ) -> _Conversation:
        async with self._opening.setdefault(peer, trio.Lock()):
            talk = self._conversations.get(peer)
            if talk is not None and not talk.over and talk is not instead_of:
                return talk
            talk = _Conversation(await self._mesh.open(peer, self._protocol))
            self._conversations[peer] = talk
            self._nursery.start_soon(self._run, peer, talk)
            return talk

    async def _run(self, peer: PeerId, talk: _Conversation) -> None:
        try:
            await talk.run()
        finally:
            if self._conversations.get(peer) is talk:
                del self._conversations[peer]


class Rpc:
    """Both sides of a node's requests: :meth:`register` to serve, :meth:`call` to ask."""

    def __init__(self, mesh: Mesh, nursery: trio.Nursery, protocol: str = PROTOCOL) -> None:
        self.mesh = mesh
        self.server = RpcServer(mesh, protocol)
        self.client = RpcClient(mesh, nursery, protocol)
        self.register = self.server.register
        self.call = self.client.call


@asynccontextmanager
async def open_rpc(mesh: Mesh, protocol: str = PROTOCOL) -> AsyncIterator[Rpc]:
    """Serve and make requests over ``mesh``; leaving the block ends the calls in progress.

    What sends a lot has a ``protocol``, and so streams, of its own: nothing else waits behind it.
    """
    async with background() as nursery:
        yield Rpc(mesh, nursery, protocol)
