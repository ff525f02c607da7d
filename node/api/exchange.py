"""One HTTP exchange: work that ends when the client hangs up, when time is up or at shutdown.

Starlette notices a disconnect only while it streams.  :class:`Reply` listens for it from the moment
the request body is read, so that leaving cancels a generation that has not produced a byte as well.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.node.api.errors import (
    as_pyagent_error,
    encode_error,
    error_headers,
    shutting_down,
    status_of,
)

log = logging.getLogger("pyagent_node.api")

CLIENT_GONE = 499
"""The status under which a request counts whose client hung up (nginx's number for it)."""


class Drain:
    """How the API ends: first no new requests, then no running ones."""

    def __init__(self) -> None:
        self._begun = trio.Event()
        self._expired = trio.Event()

    @property
    def begun(self) -> bool:
        """Whether new requests are refused."""
        return self._begun.is_set()

    def begin(self) -> None:
        """Refuse new requests from now on; idempotent."""
        self._begun.set()

    async def wait_begun(self) -> None:
        """Wait until new requests are refused."""
        await self._begun.wait()

    def expire(self) -> None:
        """End the running requests with an error; idempotent."""
        self._begun.set()
        self._expired.set()

    async def wait_expired(self) -> None:
        """Wait until running requests must end."""
        await self._expired.wait()


class Sender:
    """What the work of a :class:`Reply` answers with: one JSON document or a stream."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.complete = False
        """Whether the last part is out or on its way; a disconnect after it is no loss."""

    @property
    def started(self) -> bool:
        """Whether the status line is out, so that an error can only be told in the stream."""
        return self.status is not None

    async def json(
        self, body: object, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole JSON document; ``bytes`` are taken as encoded already."""
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        await self._start(status, "application/json", headers or {}, len(data))
        self.complete = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def start(self, media_type: str, headers: Mapping[str, str] | None = None) -> None:
        """Begin a stream."""
        await self._start(200, media_type, {"cache-control": "no-store", **(headers or {})}, None)

    async def write(self, data: bytes) -> None:
        """Send a part of a stream, waiting while the client does not read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End a stream."""
        self.complete = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(
        self, status: int, media_type: str, headers: Mapping[str, str], length: int | None
    ) -> None:
        self.status = status
        lines = [(b"content-type", media_type.encode("ascii"))]
        if length is not None:
            lines.append((b"content-length", str(length).encode("ascii")))
        lines += [(k.encode("ascii"), v.encode("latin-1")) for k, v in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})


Work = Callable[[Sender], Awaitable[None]]
StreamError = Callable[[PyAgentError], bytes]


def ndjson_error(error: PyAgentError) -> bytes:
    """Return the last line of an NDJSON stream that failed."""
    return msgspec.json.encode({"error": error.to_info()}) + b"\n"


def sse_error(error: PyAgentError) -> bytes:
    """Return the last event of an SSE stream that failed."""
    return b"data: " + encode_error(error) + b"\n\n"


class Reply(Response):
    """A response whose ``work`` is cancelled when nobody can receive its result any more.

    ``seconds`` bounds the whole exchange (:class:`DeadlineExceeded`, ``request_deadline``);
    ``stream_error`` says how an error is told once a stream has begun.
    """

    def __init__(
        self,
        work: Work,
        *,
        drain: Drain | None = None,
        seconds: float = math.inf,
        stream_error: StreamError = sse_error,
    ) -> None:
        super().__init__()
        self._work = work
        self._drain = drain
        self._seconds = seconds
        self._stream_error = stream_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the work as an ASGI application."""
        sender = Sender(send)
        gone = False
        failure: PyAgentError | None = None
        try:
            async with trio.open_nursery() as nursery:

                async def watch_client() -> None:
                    nonlocal gone
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    if not sender.complete:
                        gone = True
                        nursery.cancel_scope.cancel()

                async def watch_drain(drain: Drain) -> None:
                    nonlocal failure
                    await drain.wait_expired()
                    failure = shutting_down()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch_client)
                if self._drain is not None:
                    nursery.start_soon(watch_drain, self._drain)
                with trio.move_on_after(self._seconds) as limit:
                    await self._work(sender)
                if limit.cancelled_caught:
                    failure = DeadlineExceeded(
                        f"The request took longer than {self._seconds:g} seconds.",
                        code="request_deadline",
                        seconds=self._seconds,
                    )
                nursery.cancel_scope.cancel()
        except Exception as error:
            if gone:
                log.info("a request ended with its client: %s", as_pyagent_error(error).code)
            else:
                failure = as_pyagent_error(error)
        if gone:
            scope.setdefault("state", {})["client_gone"] = True
        elif failure is not None:
            await self._fail(sender, failure)

    async def _fail(self, sender: Sender, failure: PyAgentError) -> None:
        if not sender.started:
            await sender.json(encode_error(failure), status_of(failure), error_headers(failure))
        elif not sender.complete:
            log.warning("a stream ended with an error: %s", failure.code)
            await sender.write(self._stream_error(failure))
            await sender.end()
