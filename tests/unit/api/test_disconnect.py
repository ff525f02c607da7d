"""A client that hangs up, however and whenever it does."""

import json
import random
import socket
import struct
from contextlib import suppress

import pytest
import trio

from pyagent_node.node.api.openai import GenerationOptions
from pyagent_node.simulations.api import simulated_api

ASK = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 50}


async def connect(api) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", api.server.port)


def request(body: object, path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def hold_from(api, position: int) -> trio.Event:
    """Hold the generation at a position; returns an event that says it got there."""
    reached = trio.Event()
    never = trio.Event()

    def gate(at: int) -> trio.Event | None:
        if at < position:
            return None
        reached.set()
        return never

    api.engine.gate = gate
    return reached


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_hanging_up_cancels_the_generation(api, stream, position, how):
    reached = hold_from(api, position)
    client = await connect(api)
    await client.send_all(request({**ASK, "stream": stream, "n": 2}))
    with trio.fail_after(20):
        await reached.wait()
        assert api.engine.running == 2
        if stream and position:
            while b"w" not in await client.receive_some(4096):
                pass
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await client.aclose()
        await api.engine.idle.wait()
    assert api.engine.cancelled == 2
    await until_counted(api, "499")


async def until_counted(api, status: str) -> None:
    wanted = f'route="/v1/chat/completions",status="{status}"'
    with trio.fail_after(20):
        while wanted not in api.services.telemetry.render().decode():
            await trio.lowlevel.checkpoint()


async def test_the_daemon_answers_after_a_disconnect(api):
    reached = hold_from(api, 3)
    client = await connect(api)
    await client.send_all(request({**ASK, "stream": True}))
    await reached.wait()
    await client.aclose()
    api.engine.gate = None
    reply = await api.http.post("/v1/chat/completions", json=ASK)
    assert reply.status_code == 200


async def test_leaving_before_the_body_is_whole(api, caplog):
    client = await connect(api)
    await client.send_all(request(ASK)[:-10])
    await client.aclose()
    reply = await api.http.get("/healthz")
    assert reply.status_code == 200
    with trio.fail_after(20):
        while api.server.connections > 1:
            await trio.lowlevel.checkpoint()
    assert api.engine.started == 0
    assert "unexpected" not in caplog.text
    await until_counted(api, "499")


async def test_a_deadline_ends_a_generation():
    async with simulated_api(generation=GenerationOptions(seconds=0.1)) as api:
        hold_from(api, 0)
        reply = await api.http.post("/v1/chat/completions", json=ASK)
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "request_deadline"
        hold_from(api, 2)
        reply = await api.http.post("/v1/chat/completions", json={**ASK, "stream": True})
        assert reply.status_code == 200
        assert "request_deadline" in reply.text.split("\n\n")[-2]
        assert api.engine.running == 0


async def test_a_storm_of_rude_clients_leaves_nothing_behind(api):
    rng = random.Random(5)

    async def one() -> None:
        data = request({**ASK, "stream": rng.random() < 0.5, "n": rng.randint(1, 4)})
        if rng.random() < 0.2:
            data = data[: rng.randint(0, len(data))]
        elif rng.random() < 0.1:
            data = rng.randbytes(200)
        with suppress(OSError, trio.BrokenResourceError):
            async with await connect(api) as client:
                await client.send_all(data)
                for _ in range(rng.randint(0, 3)):
                    with trio.move_on_after(0.05):
                        await client.receive_some()

    with trio.fail_after(30):
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                for _ in range(30):
                    nursery.start_soon(one)
        while api.server.connections or api.engine.running:
            await trio.lowlevel.checkpoint()
    assert (await api.http.get("/healthz")).status_code == 200
