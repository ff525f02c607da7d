"""The door of the API: who may ask what, how much of it, and how long a body may take.

A daemon on the loopback interface is reachable by every web page its user opens, so a request is
checked before any route sees it:

* ``Host`` must be a loopback name or address (or a configured one) where no token is needed;
  otherwise a page could reach us through a DNS name that it points at 127.0.0.1.
* ``Origin`` (and ``Sec-Fetch-Site``) must not be those of another site, unless configured.
* A bearer token is needed by the admin API always, and by everything but ``/healthz`` when the API
  listens on more than the loopback interface.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import trio
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyagent_node.base.contexts import MAX_DOCUMENT
from pyagent_node.base.errors import DeadlineExceeded, InvalidRequest, PyAgentError, Refused
from pyagent_node.base.limits import MIB
from pyagent_node.node.api.errors import (
    as_pyagent_error,
    encode_error,
    error_headers,
    shutting_down,
    status_of,
    too_busy,
)
from pyagent_node.node.api.exchange import CLIENT_GONE, Drain
from pyagent_node.node.api.schema import ADMIN_PREFIX

OPEN_PATHS: Final = frozenset({"/healthz"})
"""Paths that never need a token; they tell nothing but that the process lives."""

_DOCUMENTS: Final = re.compile(r"/v1/contexts/[^/]+/documents")
_LINGER_SECONDS: Final = 2.0
_LINGER_BYTES: Final = 64 * MIB


class GuardOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the guard lets through.

    ``hosts`` are names accepted in ``Host`` besides loopback ones; ``origins`` are web origins
    (``https://chat.example``) whose pages may call the API.  ``body_bytes`` bounds a request
    body, ``document_bytes`` that of a document for a context, ``body_seconds`` the wait for all of
    it, ``concurrent`` the requests in progress.
    """

    token: str
    token_for_all: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    body_bytes: int = 32 * MIB
    document_bytes: int = MAX_DOCUMENT
    body_seconds: float = 120.0
    concurrent: int = 256

    def __repr__(self) -> str:
        return f"GuardOptions(token=<hidden>, token_for_all={self.token_for_all})"


Observer = Callable[[Scope, int, float], None]
"""Called once a request: its scope, the status it ended with, seconds it took."""


def host_name(value: str) -> str:
    """Return the name in a ``Host`` header (or the authority of an origin) without its port."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.rpartition(":")[0] if value.count(":") == 1 else value


def is_loopback(name: str) -> bool:
    """Tell whether ``name`` is a loopback name or address literal."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_host(host: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse a ``Host`` that a loopback-only API would never be called by.

    Raises :class:`Refused` (``host_refused``).
    """
    name = host_name(host or "")
    if not (is_loopback(name) or name in {a.lower() for a in allowed}):
        raise Refused(
            f"The Host header {name[:100]!r} is not a loopback name.",
            code="host_refused",
            remedy="Use 127.0.0.1, or list the name in the setting api_allowed_hosts.",
        )


def check_origin(headers: Mapping[str, str], allowed: tuple[str, ...]) -> str | None:
    """Refuse a request that a browser sends for a page of another site.

    Returns the origin when it is one of ``allowed``, so that the reply can name it.
    Raises :class:`Refused` (``origin_refused``).
    """
    origin = headers.get("origin")
    if origin is not None:
        if origin in allowed:
            return origin
        authority = origin.partition("://")[2]
        if not authority or authority.lower() != headers.get("host", "").strip().lower():
            raise Refused(
                f"Web pages of {origin[:100]!r} may not call this API.",
                code="origin_refused",
                remedy="List the origin in the setting api_allowed_origins to permit it.",
            )
    elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refused("Web pages of other sites may not call this API.", code="origin_refused")
    return None


def check_token(authorization: str | None, token: str) -> None:
    """Check a bearer token in constant time.

    Raises :class:`Refused` (``unauthorized``).
    """
    scheme, _, given = (authorization or "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode("utf-8"))
    if scheme.lower() != "bearer" or not right:
        raise Refused(
            "This request needs the node's API token.",
            code="unauthorized",
            remedy="Send 'Authorization: Bearer <token>'; the token is in the file api.token of"
            " the node's home.",
        )


class _Body:
    """Counts a request body as the application receives it, within bytes and seconds."""

    def __init__(
        self, receive: Receive, options: GuardOptions, declared: int | None, limit: int
    ) -> None:
        self._receive = receive
        self._options = options
        self._limit = limit
        self._seen = 0
        self.ended = declared == 0
        self.gone = False
        self._deadline = trio.current_time() + options.body_seconds

    async def receive(self) -> Message:
        if self.ended:
            return self._note(await self._receive())
        message: Message | None = None
        with trio.move_on_at(self._deadline):
            message = self._note(await self._receive())
        if message is None:
            raise DeadlineExceeded(
                f"The request body did not arrive within {self._options.body_seconds:g} seconds.",
                code="request_timeout",
            )
        if self._seen > self._limit:
            raise too_large(self._limit)
        return message

    def _note(self, message: Message) -> Message:
        if message["type"] == "http.disconnect":
            self.ended = self.gone = True
        else:
            self._seen += len(message.get("body", b""))
            self.ended = self.ended or not message.get("more_body", False)
        return message

    async def linger(self) -> None:
        """Read what the client is still sending, so that it gets to see our answer."""
        seen = 0
        with trio.move_on_after(_LINGER_SECONDS):
            while not self.ended and seen < _LINGER_BYTES:
                seen += len(self._note(await self._receive()).get("body", b""))

    async def discard(self) -> None:
        """Swallow all that comes.

        Hypercorn hands the body over through a bounded queue and puts the disconnect behind it; if
        nobody reads, closing the connection would wait for ever.
        """
        while True:
            self._note(await self._receive())


def too_large(limit: int) -> InvalidRequest:
    """Return the error for an oversized request body."""
    return InvalidRequest(
        f"The request body is over the limit of {limit} bytes.",
        code="request_too_large",
        limit=limit,
    )


class Guard:
    """ASGI middleware around the whole application; see the module's text."""

    def __init__(
        self,
        app: ASGIApp,
        options: GuardOptions,
        drain: Drain,
        observe: Observer,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._app = app
        self._options = options
        self._drain = drain
        self._observe = observe
        self._clock = clock
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = self._clock()
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        declared = _declared_length(headers)
        limit = self._options.body_bytes
        if _DOCUMENTS.fullmatch(scope["path"]):
            limit = self._options.document_bytes
        body = _Body(receive, self._options, declared, limit)
        status = 0
        origin: str | None = None

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_fixed_headers(origin)]
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if body.ended or not last:
                await send(message)
            else:
                await send({**message, "more_body": True})
                await body.linger()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(body.discard)
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                    nursery.cancel_scope.cancel()

        self._running += 1
        try:
            origin = self._check(scope, headers, declared, limit)
            if origin is not None and scope["method"] == "OPTIONS":
                await _preflight(headers, respond)
            else:
                await self._app(scope, body.receive, respond)
        except ClientDisconnect:  # before its request was whole
            scope.setdefault("state", {})["client_gone"] = True
        except Exception as error:
            failure = as_pyagent_error(error)
            if not status:
                await _refuse(failure, respond)
        finally:
            self._running -= 1
            gone = scope.get("state", {}).get("client_gone", False)
            self._observe(scope, CLIENT_GONE if gone else status, self._clock() - began)

    def _check(
        self, scope: Scope, headers: Mapping[str, str], declared: int | None, limit: int
    ) -> str | None:
        path = scope["path"]
        origin = check_origin(headers, self._options.origins)
        preflight = origin is not None and scope["method"] == "OPTIONS"
        if path not in OPEN_PATHS and not preflight:
            if not self._options.token_for_all:
                check_host(headers.get("host"), self._options.hosts)
            if self._options.token_for_all or _is_admin(path):
                check_token(headers.get("authorization"), self._options.token)
            if self._drain.begun:
                raise shutting_down()
            if self._running > self._options.concurrent:
                raise too_busy(self._options.concurrent)
        if declared is not None and declared > limit:
            raise too_large(limit)
        return origin


def _is_admin(path: str) -> bool:
    return path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/")


def _declared_length(headers: Mapping[str, str]) -> int | None:
    if "transfer-encoding" in headers:
        return None
    value = headers.get("content-length", "0")
    return int(value) if value.isdecimal() else None


def _fixed_headers(origin: str | None) -> list[tuple[bytes, bytes]]:
    lines = [(b"x-content-type-options", b"nosniff")]
    if origin is not None:
        lines.append((b"access-control-allow-origin", origin.encode("latin-1")))
        lines.append((b"access-control-expose-headers", b"x-session-id, retry-after"))
        lines.append((b"vary", b"Origin"))
    return lines


async def _preflight(headers: Mapping[str, str], send: Send) -> None:
    wanted = headers.get("access-control-request-headers", "authorization, content-type")
    lines = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", b"600"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": lines})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _refuse(error: PyAgentError, send: Send) -> None:
    data = encode_error(error)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(data)),
        **error_headers(error),
    }
    lines = [(k.encode("ascii"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status_of(error), "headers": lines})
    await send({"type": "http.response.body", "body": data, "more_body": False})
