"""The socket: sending without waiting, the backlog and its bound, ciphers, ends."""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from pyagent_node.node.mesh.wire import HIGH_WATER, MAX_BACKLOG, Wire, WireClosed


class Shift:
    """A cipher that adds one to every byte and puts two bytes in front, like a nonce."""

    def __init__(self) -> None:
        self.begun = self.seen = 0

    def outgoing(self, data: bytes) -> bytes:
        head = b"" if self.begun else b"NN"
        self.begun = 1
        return head + bytes((byte + 1) % 256 for byte in data)

    def incoming(self, data: bytes) -> bytes:
        skip = min(2 - self.seen, len(data))
        self.seen += skip
        return bytes((byte - 1) % 256 for byte in data[skip:])


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    for sock in pair:
        sock.close()


@pytest.fixture
async def wires(
    sockets: tuple[socket.socket, socket.socket], nursery: trio.Nursery
) -> AsyncIterator[tuple[Wire, Wire]]:
    a, b = Wire(sockets[0]), Wire(sockets[1])
    for wire in (a, b):
        nursery.start_soon(wire.run_writer)
    yield a, b
    a.close()
    b.close()


async def everything(wire: Wire, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await wire.receive()
    return data


async def test_what_the_socket_does_not_take_follows_in_order(wires: tuple[Wire, Wire]) -> None:
    a, b = wires
    sent = b""
    for number in range(60):
        part = bytes([number]) * 40_000
        a.send(part)
        sent += part
    assert a.congested
    with trio.fail_after(10):
        assert await everything(b, len(sent)) == sent
        await a.drained()
    assert not a.congested


async def test_a_backlog_has_an_end(wires: tuple[Wire, Wire]) -> None:
    a, _ = wires
    with pytest.raises(WireClosed, match="does not read"):  # noqa: PT012 - how many fit varies
        for _ in range(MAX_BACKLOG // HIGH_WATER + 10):
            a.send(bytes(HIGH_WATER))
    assert a.closed
    with pytest.raises(WireClosed):
        a.send(b"more")
    with pytest.raises(WireClosed):
        await a.drained()


async def test_a_reader_that_stalls_is_dropped(
    wires: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyagent_node.node.mesh.wire.STALL_SECONDS", 0.05)
    a, _ = wires
    a.send(bytes(2_000_000))
    with pytest.raises(WireClosed), trio.fail_after(10):
        await a.drained()


async def test_closing_wakes_whoever_waits(wires: tuple[Wire, Wire]) -> None:
    a, b = wires
    caught = 0

    async def receive() -> None:
        nonlocal caught
        with pytest.raises(WireClosed):
            await a.receive()
        caught += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        a.close()
        a.close()
    assert caught == 1
    assert await b.receive() == b""
    assert a.remote() == ("?", 0)


async def test_a_view_into_the_scratch_buffer(wires: tuple[Wire, Wire]) -> None:
    a, b = wires
    scratch = bytearray(8)
    a.send(b"0123456789")
    assert bytes(await b.receive(scratch)) == b"01234567"
    assert bytes(await b.receive(scratch)) == b"89"
    a.finish()
    assert bytes(await b.receive(scratch)) == b""
    assert b.received == 10


async def test_a_cipher_covers_everything(sockets: tuple[socket.socket, socket.socket]) -> None:
    a, b = Wire(sockets[0], Shift()), Wire(sockets[1], Shift())
    a.send(b"HAL")
    a.send(b"9000")
    assert await everything(b, 7) == b"HAL9000"
    a.close()
    b.close()


async def test_on_the_wire_the_cipher_text_is_seen(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    a = Wire(sockets[0], Shift())
    a.send(b"HAL")
    assert sockets[1].recv(10) == b"NNIBM"
    a.close()


def test_tcp_does_not_wait_long_to_send_again() -> None:
    """On systems that let us say so; elsewhere the wire works all the same."""
    limit = 44  # TCP_RTO_MAX_MS
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        if sys.platform != "linux":
            pytest.skip("Linux's")
        try:
            near.setsockopt(socket.IPPROTO_TCP, limit, 60_000)
        except OSError:
            pytest.skip("this kernel has no bound to set")
        Wire(near)
        assert near.getsockopt(socket.IPPROTO_TCP, limit) == 1000
