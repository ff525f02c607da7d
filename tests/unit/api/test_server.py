"""Listening, stalled clients, and the end of the API."""

import json
import socket
from contextlib import suppress

import pytest
import trio

from pyagent_node.base.errors import ConfigError, Conflict
from pyagent_node.node.api.exchange import Drain
from pyagent_node.node.api.server import ServerOptions, bind
from pyagent_node.simulations.api import simulated_api

ASK = {"model": "words", "prompt": "a", "max_tokens": 50}


def request(body: object) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def read_all(stream: trio.SocketStream) -> bytes:
    data = b""
    while part := await stream.receive_some():
        data += part
    return data


def test_a_free_port_is_the_same_on_every_address():
    sockets = bind("127.0.0.1", 0)
    try:
        ports = {sock.getsockname()[1] for sock in sockets}
        assert len(ports) == 1
        assert 0 not in ports
        with pytest.raises(Conflict) as caught:
            bind("127.0.0.1", ports.pop())
        assert caught.value.code == "address_in_use"
    finally:
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("host", ["256.1.1.1", "no such host.invalid", "192.0.2.1"])
def test_bad_addresses(host):
    with pytest.raises(ConfigError) as caught:
        bind(host, 0)
    assert caught.value.code == "bad_address"


async def test_a_client_that_does_not_read_is_dropped():
    options = ServerOptions(write_seconds=0.2)
    async with simulated_api(server=options) as api:
        api.engine.words = ("x" * 500_000,)
        client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        async with client:
            await client.send_all(request({**ASK, "stream": True}))
            with trio.fail_after(10):
                while not api.engine.started:
                    await trio.lowlevel.checkpoint()
                await api.engine.idle.wait()
                while api.server.connections:
                    await trio.lowlevel.checkpoint()
        assert api.engine.cancelled == 1


async def test_connections_beyond_the_limit_wait():
    async with simulated_api(server=ServerOptions(connections=2)) as api:
        held = [await trio.open_tcp_stream("127.0.0.1", api.server.port) for _ in range(2)]
        with trio.fail_after(5):
            while api.server.connections < 2:
                await trio.lowlevel.checkpoint()
        late = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        await late.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with trio.move_on_after(0.1) as limit:
            await late.receive_some()
        assert limit.cancelled_caught
        for stream in held:
            await stream.aclose()
        with trio.fail_after(5):
            assert (await read_all(late)).startswith(b"HTTP/1.1 200")
        await late.aclose()


async def test_silent_connections_are_closed():
    async with simulated_api(server=ServerOptions(idle_seconds=0.05)) as api:
        for begin in (b"", b"GET /healthz HTTP/1.1\r\nHost:"):
            client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
            async with client:
                if begin:
                    await client.send_all(begin)
                with trio.fail_after(5):
                    await read_all(client)


async def test_there_is_no_http_2(api):
    upgrade = (
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, close\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    )
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for begin, answer in ((upgrade, b"HTTP/1.1 200"), (preface, b"")):
        client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        async with client:
            await client.send_all(begin)
            with trio.fail_after(5):
                reply = await read_all(client)
        assert reply[:12] == answer
    assert (await api.http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"A" * 100_000,
    ],
)
async def test_garbage_hurts_its_own_connection_only(api, garbage):
    client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
    async with client:
        await client.send_all(garbage)
        await client.send_eof()
        with trio.fail_after(5):
            with suppress(trio.BrokenResourceError):
                await read_all(client)
    assert (await api.http.get("/healthz")).status_code == 200


async def test_a_drain_lets_running_answers_finish():
    gate = trio.Event()
    reached = trio.Event()

    def hold(position: int) -> trio.Event | None:
        if position == 3:
            reached.set()
            return gate
        return None

    async with simulated_api() as api:
        api.engine.gate = hold
        idle = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        await client.send_all(request({**ASK, "stream": True, "max_tokens": 5}))
        await reached.wait()
        api.drain.begin()
        with trio.fail_after(5):
            assert await idle.receive_some() == b""  # an idle connection ends at once
            with suppress(OSError):
                while True:  # the listener goes in the next moment
                    late = await trio.open_tcp_stream("127.0.0.1", api.server.port)
                    await late.aclose()
            gate.set()
            reply = await read_all(client)
        assert b"data: [DONE]" in reply
        await idle.aclose()
        await client.aclose()


async def test_the_end_of_the_drain_ends_streams_with_an_error():
    never, reached = trio.Event(), trio.Event()

    def hold(position: int) -> trio.Event | None:
        if position == 3:
            reached.set()
            return never
        return None

    async with simulated_api() as api:
        api.engine.gate = hold
        clients = []
        for stream in (True, False):
            reached = trio.Event()
            client = await trio.open_tcp_stream("127.0.0.1", api.server.port)
            await client.send_all(request({**ASK, "stream": stream}))
            await reached.wait()
            clients.append(client)
        api.drain.begin()
        api.drain.expire()
        with trio.fail_after(5):
            replies = [await read_all(client) for client in clients]
        assert replies[0].startswith(b"HTTP/1.1 200")
        assert b'"code":"shutting_down"' in replies[0]
        assert b"[DONE]" not in replies[0]
        assert replies[1].startswith(b"HTTP/1.1 503")
        assert api.engine.cancelled == 2
        for client in clients:
            await client.aclose()


async def test_the_end_does_not_wait_for_a_client_that_does_not_read(autojump_clock):
    sock = socket.socket()
    with trio.fail_after(60):
        async with simulated_api(server=ServerOptions(write_seconds=1e6)) as api:
            api.engine.words = ("x" * 500_000,)
            sock.connect(("127.0.0.1", api.server.port))
            sock.sendall(request({**ASK, "stream": True}))
            while not api.engine.started:
                await trio.lowlevel.checkpoint()
            for _ in range(200):
                await trio.lowlevel.checkpoint()
    sock.close()
    assert api.engine.running == 0


def test_a_drain_can_be_begun_twice():
    drain = Drain()
    assert not drain.begun
    drain.begin()
    drain.begin()
    drain.expire()
    drain.expire()
    assert drain.begun
