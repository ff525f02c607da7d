"""Serves the API: Hypercorn's trio worker over sockets of our own.

Hypercorn's own accept loop has no bound on connections, waits for ever in a shielded write to a
client that stopped reading (so that not even a shutdown gets past it), and ends with the first
unexpected error of one connection.  So the loop is here: each connection is Hypercorn's
``TCPServer`` over a stream with a deadline on every write, and its failure is its own.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import msgspec
import trio
from hypercorn.config import Config
from hypercorn.events import Event, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState
from hypercorn.utils import parse_socket_addr, wrap_app
from starlette.types import ASGIApp

from pyagent_node.base.errors import ConfigError, Conflict
from pyagent_node.node.api.exchange import Drain

if TYPE_CHECKING:
    import h11

log = logging.getLogger("pyagent_node.http")


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``host`` is an address or name, ``port`` 0 takes a free one.

    ``connections`` bounds the open connections (more wait in the backlog), ``write_seconds`` how
    long a client may refuse to read, ``idle_seconds`` how long a connection may be silent between
    requests (or with half a request line).
    """

    host: str = "127.0.0.1"
    port: int = 0
    connections: int = 512
    write_seconds: float = 30.0
    idle_seconds: float = 30.0


_BACKLOG: Final = 128
_END_SECONDS: Final = 3.0


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind and listen on every address of ``host``; with port 0 all get the same free port.

    Raises :class:`Conflict` (``address_in_use``) and :class:`ConfigError` (``bad_address``).
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(
            f"The API cannot listen on {host!r}: {error}.", code="bad_address"
        ) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            try:
                sockets.append(
                    _bind_one(family, (address[0], port or _port(sockets), *address[2:]))
                )
            except OSError as error:
                # A name such as localhost may resolve to a family that this machine has off.
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and sockets:
                    continue
                raise _bind_error(host, port, error) from None
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def _port(sockets: Sequence[socket.socket]) -> int:
    return int(sockets[0].getsockname()[1]) if sockets else 0


def _bind_one(family: int, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform == "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_error(host: str, port: int, error: OSError) -> ConfigError | Conflict:
    if error.errno == errno.EADDRINUSE:
        return Conflict(
            f"The API cannot listen on {host}:{port}: the port is in use.",
            code="address_in_use",
            remedy="Choose another with the setting api_port (0 takes a free one).",
            port=port,
        )
    return ConfigError(
        f"The API cannot listen on {host}:{port}: {error.strerror or error}.", code="bad_address"
    )


class _Connection:
    """A client's stream with a deadline on writes; the methods are those Hypercorn calls."""

    def __init__(self, stream: trio.SocketStream, write_seconds: float) -> None:
        self._stream = stream
        self._write_seconds = write_seconds
        self.socket = stream.socket

    async def send_all(self, data: bytes | memoryview) -> None:
        with trio.move_on_after(self._write_seconds) as limit:
            await self._stream.send_all(data)
        if limit.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError("the client does not read")

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket now; whoever waits in it gets an error."""
        self.socket.close()


class _Http1(H11Protocol):
    """Hypercorn's HTTP/1.1, which an ``Upgrade: h2c`` does not turn into HTTP/2.

    Nobody asks for HTTP/2 without TLS, and its many streams in one connection would pass by the
    bounds on connections and on idle time.
    """

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.http_version == b"2.0":
            raise _NotHttp1


class _NotHttp1(Exception):
    pass


class _Server(TCPServer):
    """Hypercorn's connection, for HTTP/1.1, ended as soon as the client has closed it.

    As shipped it lingers until the idle timeout when that happens between two requests.
    """

    _over = False

    async def run(self) -> None:
        sock = self.stream.socket
        try:
            async with TaskGroup() as tasks:
                self._task_group = tasks
                self.protocol = _Http1(  # type: ignore[assignment]  # without its wrapper
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    ConnectionState(self.state),
                    False,
                    parse_socket_addr(sock.family, sock.getpeername()),
                    parse_socket_addr(sock.family, sock.getsockname()),
                    self.protocol_send,
                )
                await self.idle_task.restart(tasks, self._idle_timeout)
                await self._read_data()
                self._over = True
                await self.idle_task.stop()
        finally:
            await self._close()

    async def protocol_send(self, event: Event) -> None:
        if not (self._over and isinstance(event, Updated)):  # nothing is idle after the end
            await super().protocol_send(event)


class ApiServer:
    """A listening API; :attr:`urls` are where it answers."""

    def __init__(
        self, app: ASGIApp, sockets: Sequence[socket.socket], options: ServerOptions, drain: Drain
    ) -> None:
        self._options = options
        self._drain = drain
        self._config = _config(options)
        # hypercorn's own name for an ASGI application is narrower
        self._app = wrap_app(app, self._config.wsgi_max_body_size, "asgi")  # type: ignore[arg-type]
        self._context = WorkerContext(None)
        self._open: set[_Connection] = set()
        self._closed = trio.Event()
        self._listeners = [
            trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in sockets
        ]
        self.port = _port(sockets)
        self.urls = tuple(_url(sock) for sock in sockets)
        self.local_url = _local(self.urls[0])
        """Where a client on this machine reaches the API."""

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._open)

    async def serve(self) -> None:
        """Accept connections until the drain begins, then wait for the open ones to end."""
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in self._listeners:
                    accepting.start_soon(self._accept, listener, connections)
                await self._drain.wait_begun()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()  # idle connections close themselves now
            connections.start_soon(self._end_all, connections.cancel_scope)

    async def _end_all(self, scope: trio.CancelScope) -> None:
        """Wait for the connections; after the drain expired, a little only, then by force."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_idle, nursery.cancel_scope)
            await self._drain.wait_expired()
            await trio.sleep(_END_SECONDS)
            nursery.cancel_scope.cancel()
        for connection in list(self._open):
            connection.abort()
        scope.cancel()

    async def _until_idle(self, scope: trio.CancelScope) -> None:
        while self._open:
            await self._wait_closed()
        scope.cancel()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                while len(self._open) >= self._options.connections:
                    await self._wait_closed()
                try:
                    stream = await listener.accept()
                except OSError as error:
                    log.warning("a connection could not be accepted: %s", error)
                    await trio.sleep(0.1)
                    continue
                connection = _Connection(stream, self._options.write_seconds)
                self._open.add(connection)
                nursery.start_soon(self._serve_one, connection)

    async def _wait_closed(self) -> None:
        self._closed = self._closed if not self._closed.is_set() else trio.Event()
        await self._closed.wait()

    async def _serve_one(self, connection: _Connection) -> None:
        state = ConnectionState(LifespanState({}))
        try:
            await _Server(
                self._app,
                self._config,
                self._context,
                state,
                connection,  # type: ignore[arg-type]  # it reads and closes alike
            )
        except* (OSError, _NotHttp1) as group:
            log.debug("a connection ended: %s", group.exceptions[0])
        except* Exception:
            log.exception("a connection ended with an unexpected error")
        finally:
            self._open.discard(connection)
            self._closed.set()
            connection.abort()


def _config(options: ServerOptions) -> Config:
    config = Config()
    config.errorlog = log
    config.accesslog = None
    config.include_server_header = False
    config.keep_alive_timeout = options.idle_seconds
    config.h11_max_incomplete_size = 32 * 1024
    return config


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _local(url: str) -> str:
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


@asynccontextmanager
async def open_api(app: ASGIApp, options: ServerOptions, drain: Drain) -> AsyncIterator[ApiServer]:
    """Listen and serve in the background; leaving begins the drain and waits for its end."""
    sockets = bind(options.host, options.port)
    server = ApiServer(app, sockets, options, drain)
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        try:
            yield server
        except BaseException as error:  # raised again below, not in a group
            failure = error
        drain.expire()
    if failure is not None:
        raise failure
