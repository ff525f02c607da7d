"""A relay that holds back what passes through it: a slow path for clients of an HTTP API.

``--shape`` makes the links between nodes slow; a client on another continent needs this besides.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

import trio

CHUNK: Final = 65_536
WAITING: Final = 1024
"""Pieces of one direction that may be under way."""


@contextlib.asynccontextmanager
async def delaying_relay(port: int, seconds: float) -> AsyncIterator[int]:
    """Relay connections to ``port`` of this machine while the context lasts; yields its own port.

    Every byte arrives ``seconds`` later, either way, in order.
    """
    async with trio.open_nursery() as nursery:

        async def serve(client: trio.SocketStream) -> None:
            with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                server = await trio.open_tcp_stream("127.0.0.1", port)
                async with server, client, trio.open_nursery() as both:
                    both.start_soon(_pump, client, server, seconds)
                    both.start_soon(_pump, server, client, seconds)

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        address: tuple[str, int] = listeners[0].socket.getsockname()
        yield address[1]
        nursery.cancel_scope.cancel()


async def _pump(source: trio.SocketStream, target: trio.SocketStream, seconds: float) -> None:
    """Pass on what comes from ``source``, the end of it too."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](WAITING)

    async def deliver() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for due, data in receive:
                await trio.sleep_until(due)
                if data:
                    await target.send_all(data)
                else:
                    await target.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(deliver)
        data = b"-"
        while data:
            try:
                data = bytes(await source.receive_some(CHUNK))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            await send.send((trio.current_time() + seconds, data))
        send.close()
