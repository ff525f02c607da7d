"""Who may ask what."""

import json

import pytest
import trio

from pyagent_node.base.errors import Refused
from pyagent_node.node.api.guard import GuardOptions, check_token, host_name, is_loopback
from pyagent_node.node.api.openai import GenerationOptions
from pyagent_node.simulations.api import TOKEN, simulated_api

MODELS = "/v1/models"
STATUS = "/api/v1/status"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:80", "localhost"),
        ("127.0.0.1:4811", "127.0.0.1"),
        ("[::1]:4811", "::1"),
        ("[::1]", "::1"),
        ("::1", "::1"),
        ("", ""),
        ("evil.example:4811", "evil.example"),
    ],
)
def test_host_name(value, name):
    assert host_name(value) == name


def test_loopback_names():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(
        map(is_loopback, ("", "0.0.0.0", "10.0.0.1", "localhost.evil.example", "127.0.0.1.nip.io"))
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic token",
        "token",
        "Bearer wrong",
        "Bearer tokenx",
        "Bearer é",
    ],
)
def test_wrong_tokens(value):
    with pytest.raises(Refused) as caught:
        check_token(value, "token")
    assert caught.value.code == "unauthorized"
    check_token("bearer  token", "token")


async def test_rebinding_through_a_host_name_is_refused(api):
    for host in ("evil.example", "evil.example:4811", "localhost.evil.example", "10.0.0.1", ""):
        reply = await api.http.get(MODELS, headers={"host": host})
        assert reply.status_code == 403
        assert reply.json()["error"]["code"] == "host_refused"
    for host in ("localhost:1", "127.0.0.1", "[::1]:99"):
        assert (await api.http.get(MODELS, headers={"host": host})).status_code == 200


async def test_web_pages_of_other_sites_are_refused(api):
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {
            "origin": "https://evil.example",
            "authorization": f"Bearer {TOKEN}",
        },
    ):
        for path in (MODELS, STATUS, "/healthz"):
            reply = await api.http.get(path, headers=headers)
            assert reply.status_code == 403, (headers, path)
            assert reply.json()["error"]["code"] == "origin_refused"
            assert "access-control-allow-origin" not in reply.headers
    own = {"origin": api.url}
    assert (await api.http.get(MODELS, headers=own)).status_code == 200
    preflight = await api.http.options(MODELS, headers={"origin": "https://evil.example"})
    assert preflight.status_code == 403


async def test_a_configured_origin_may_call():
    origin = "https://chat.example"
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, origins=(origin,))) as api:
        reply = await api.http.get(MODELS, headers={"origin": origin})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == origin
        preflight = await api.http.options(
            "/v1/chat/completions",
            headers={"origin": origin, "access-control-request-headers": "authorization, x-a"},
        )
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization, x-a"
        other = await api.http.get(MODELS, headers={"origin": "https://other.example"})
        assert other.status_code == 403


async def test_a_configured_host_may_be_used():
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, hosts=("Box.lan",))) as api:
        assert (await api.http.get(MODELS, headers={"host": "box.LAN:1"})).status_code == 200


async def test_admin_needs_the_token_even_on_loopback(api):
    for method, path in (
        ("GET", STATUS),
        ("GET", "/api/v1/nothing"),
        ("GET", "/api/v1"),
        ("POST", "/api/v1/shutdown"),
        ("DELETE", "/api/v1/models/x"),
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}):
            reply = await api.http.request(method, path, headers=headers)
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"].startswith("Bearer")
            assert reply.json()["error"]["type"] == "authentication_error"
    assert not api.services.stopped
    assert (await api.http.get(STATUS, headers=api.auth)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "//api/v1/status",
        "/api//v1/status",
        "/API/v1/status",
        "/api/v1%2fstatus",
        "/%61pi/v1/status",
        "/./api/v1/status",
    ],
)
async def test_no_spelling_of_a_path_gets_around_the_token(api, path):
    stream = await trio.open_tcp_stream("127.0.0.1", api.server.port)
    async with stream:
        await stream.send_all(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        reply = b""
        while part := await stream.receive_some():
            reply += part
    assert reply.split()[1] in (b"401", b"404")
    assert b"peer_id" not in reply


async def test_everything_needs_the_token_when_not_local():
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, token_for_all=True)) as api:
        for path in (MODELS, STATUS, "/metrics", "/readyz", "/nothing"):
            assert (await api.http.get(path)).status_code == 401
        assert (await api.http.get("/healthz")).status_code == 200
        reply = await api.http.get(MODELS, headers={**api.auth, "host": "box.example"})
        assert reply.status_code == 200


async def test_body_limit():
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, body_bytes=1000)) as api:
        declared = await api.http.post("/v1/completions", content=b"x" * 1001)
        assert declared.status_code == 413
        assert declared.json()["error"]["code"] == "request_too_large"

        async def parts():
            for _ in range(20):
                yield b"x" * 100

        chunked = await api.http.post("/v1/completions", content=parts())
        assert chunked.status_code == 413
        small = {"model": "words", "prompt": "a", "max_tokens": 1}
        assert (await api.http.post("/v1/completions", json=small)).status_code == 200


async def test_a_body_that_nobody_reads_does_not_hold_the_connection():
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, body_bytes=1000)) as api:
        stream = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        async with stream:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            await stream.send_all(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            with trio.fail_after(20):
                try:
                    while True:
                        await stream.send_all(b"1\r\nx\r\n" * 5000)
                except trio.BrokenResourceError:
                    pass
                while api.server.connections:
                    await trio.lowlevel.checkpoint()


async def test_a_body_that_never_comes():
    async with simulated_api(guard_options=GuardOptions(token=TOKEN, body_seconds=0.05)) as api:
        stream = await trio.open_tcp_stream("127.0.0.1", api.server.port)
        async with stream:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
            await stream.send_all(head.encode())
            reply = await stream.receive_some(65536)
        assert reply.startswith(b"HTTP/1.1 408")
        with trio.fail_after(10):
            while api.server.connections:
                await trio.lowlevel.checkpoint()


async def test_too_many_requests():
    ask = {"model": "words", "prompt": "a"}
    held = trio.Event()
    started = trio.Event()

    def gate(_at):
        started.set()
        return held

    for options, code, status in (
        ({"guard_options": GuardOptions(token=TOKEN, concurrent=1)}, "too_many_requests", 429),
        ({"generation": GenerationOptions(concurrent=1)}, "too_many_requests", 429),
    ):
        held, started = trio.Event(), trio.Event()
        async with simulated_api(**options) as api, trio.open_nursery() as nursery:
            api.engine.gate = gate

            async def first(api=api):
                assert (await api.http.post("/v1/completions", json=ask)).status_code == 200

            nursery.start_soon(first)
            await started.wait()
            reply = await api.http.post("/v1/completions", json=ask)
            assert reply.status_code == status
            assert reply.json()["error"]["code"] == code
            assert reply.headers["retry-after"]
            assert (await api.http.get("/healthz")).status_code == 200
            held.set()


async def test_routes_and_methods(api):
    missing = await api.http.get("/v1/nothing")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "route_not_found"
    wrong = await api.http.get("/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert json.loads(wrong.text)["error"]["param"] is None
    assert (await api.http.get("/openapi.json")).status_code == 404
    assert (await api.http.get("/docs")).status_code == 404


async def test_websockets_are_refused(api):
    stream = await trio.open_tcp_stream("127.0.0.1", api.server.port)
    async with stream:
        await stream.send_all(
            b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n"
        )
        assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 403")
