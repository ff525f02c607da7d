"""Answers whose client comes back, over HTTP."""

import json
from urllib.parse import quote

import httpx
import pytest
import trio

from pyagent_node.base.errors import RunnerFailed

ASK = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
UNKNOWN = "0123456789abcdef" * 2


def chunks(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(parts: list[dict], index: int = 0) -> str:
    return "".join(
        (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
        for part in parts
        for choice in part["choices"]
        if choice["index"] == index
    )


class Lost:
    """What a client had when its connection broke."""

    def __init__(self, session: str, parts: list[dict]) -> None:
        self.session = session
        self.parts = parts
        self.text = text_of(parts)
        self.count = max(c.get("token_count", 0) for p in parts for c in p["choices"])


class Raw:
    """A client that reads what it likes of a stream, and hangs up when it likes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    @property
    def session(self) -> str:
        head = self.data.partition(b"\r\n\r\n")[0].decode().lower()
        return next(
            line.split(": ")[1] for line in head.split("\r\n") if line.startswith("x-session-id")
        )

    @property
    def parts(self) -> list[dict]:
        lines = [line for line in self.data.split(b"\n") if line.startswith(b"data: {")]
        return [json.loads(line.removeprefix(b"data: ")) for line in lines]

    async def until(self, mark: bytes) -> None:
        with trio.fail_after(20):
            while mark not in self.data:
                more = await self.stream.receive_some()
                assert more, self.data
                self.data += more
            if not self.data.endswith(b"\n"):
                self.data += await self.stream.receive_some()


async def post(api, body: object, path: str = "/v1/chat/completions") -> Raw:
    data = json.dumps(body).encode()
    client = Raw(await trio.open_tcp_stream("127.0.0.1", api.server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    await client.stream.send_all(head.encode() + data)
    return client


def hold_at(api, after: int) -> trio.Event:
    hold = trio.Event()
    api.engine.gate = lambda position: None if position < after else hold
    return hold


async def lose(api, path: str = "/v1/chat/completions", after: int = 5, **changes) -> Lost:
    """Begin an answer and hang up in the middle."""
    hold = hold_at(api, after)
    body = {**ASK, "seed": 3, "stream": True, "resume_seconds": 60, **changes}
    client = await post(api, body, path)
    await client.until(b'"token_count":%d' % after)
    await client.stream.aclose()
    with trio.fail_after(20):
        while any(live.reader for live in api.services.live._live.values()):
            await trio.lowlevel.checkpoint()
    api.engine.gate = None
    hold.set()
    return Lost(client.session, client.parts)


async def back(api, session: str, after: object = 0) -> httpx.Response:
    return await api.http.get(f"/v1/sessions/{session}/stream", params={"from": after})


async def gone(api) -> None:
    with trio.fail_after(20):
        while api.engine.running:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_every_reply_names_its_sessions(api, stream, n):
    reply = await api.http.post("/v1/chat/completions", json={**ASK, "stream": stream, "n": n})
    ids = reply.headers["x-session-id"].split(",")
    assert len(set(ids)) == n
    assert all(len(session) == 32 for session in ids)
    await gone(api)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"return_token_ids": True}])
async def test_a_lost_stream_goes_on(api, path, extra):
    changes: dict = dict(extra)
    if path == "/v1/completions":
        changes |= {"prompt": "hello", "messages": None}
        if extra.get("logprobs"):
            changes["logprobs"] = 2
    whole = await api.http.post(path, json={**ASK, "seed": 3, "stream": True, **changes})
    want = chunks(whole.text)
    lost = await lose(api, path, **changes)
    assert lost.count == 5
    reply = await back(api, lost.session, 5)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-session-id"] == lost.session
    parts = chunks(reply.text)
    assert lost.text + text_of(parts) == text_of(want)
    assert {p["id"] for p in parts} == {p["id"] for p in lost.parts}
    assert {p["object"] for p in parts} == {p["object"] for p in want}
    assert {p["system_fingerprint"] for p in parts} == {want[0]["system_fingerprint"]}
    together = [p["choices"] for p in lost.parts + parts]
    for choices in together + [p["choices"] for p in want]:
        for choice in choices:
            choice.pop("step_seconds", None)
            choice.pop("compute_seconds", None)
    assert together == [p["choices"] for p in want]
    await gone(api)


async def test_from_the_beginning_it_is_the_whole_stream(api):
    lost = await lose(api, stream_options={"include_usage": True})
    reply = await api.http.get(f"/v1/sessions/{lost.session}/stream")
    parts = chunks(reply.text)
    assert parts[: len(lost.parts)] == lost.parts
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == 20


async def test_one_of_several_choices(api):
    ask = {**ASK, "seed": 3, "n": 3}
    whole = (await api.http.post("/v1/chat/completions", json=ask)).json()
    hold = hold_at(api, 5)
    client = await post(api, {**ask, "stream": True, "resume_seconds": 60})
    await client.until(b'"token_count"')
    ids = client.session.split(",")
    await client.stream.aclose()
    hold.set()
    for index, session in enumerate(ids):
        parts = chunks((await back(api, session)).text)
        assert {c["index"] for p in parts for c in p["choices"]} == {index}
        assert text_of(parts, index) == whole["choices"][index]["message"]["content"]
    await gone(api)


async def test_without_resume_seconds_hanging_up_ends_it(api):
    lost = await lose(api, resume_seconds=0)
    await gone(api)
    reply = await back(api, lost.session, 5)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "session_not_found"


async def test_an_answer_that_was_read_is_gone(api):
    reply = await api.http.post("/v1/chat/completions", json={**ASK, "stream": True})
    reply = await back(api, reply.headers["x-session-id"], 20)
    assert reply.status_code == 404


@pytest.mark.parametrize(
    "session", ["x", "A" * 32, "0" * 31, "0" * 33, "%2e%2e", "0" * 5000, "é" * 32, "0" * 31 + "\n"]
)
async def test_malformed_ids(api, session):
    reply = await back(api, quote(session, safe="%"))
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["code"] in ("bad_parameter", "route_not_found")


@pytest.mark.parametrize("after", ["-1", "1.5", "x", "", "1e3", "9" * 10, "٣", "0x1", " 1", "+1"])
async def test_malformed_positions(api, after):
    lost = await lose(api)
    reply = await back(api, lost.session, after)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("bad_parameter", "from")
    assert (await back(api, lost.session, 5)).status_code == 200


async def test_two_positions(api):
    reply = await api.http.get(f"/v1/sessions/{UNKNOWN}/stream?from=1&from=2")
    assert reply.json()["error"]["code"] == "bad_parameter"


async def test_beyond_the_end(api):
    lost = await lose(api)
    reply = await back(api, lost.session, 21)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "beyond_end"
    reply = await back(api, lost.session, 20)
    [last] = chunks(reply.text)
    assert last["choices"][0]["finish_reason"] == "length"


async def test_an_unknown_session(api):
    reply = await back(api, UNKNOWN)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "session_not_found"


@pytest.mark.parametrize("value", [-1, 601, 1e308, "5", True, [1]])
async def test_resume_seconds_out_of_range(api, value):
    reply = await api.http.post("/v1/chat/completions", json={**ASK, "resume_seconds": value})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "resume_seconds"
    assert api.engine.started == 0


async def test_a_second_client_takes_the_stream(api, nursery):
    hold = hold_at(api, 5)
    first = await post(api, {**ASK, "stream": True, "seed": 3})
    await first.until(b'"token_count":5')
    replies: list[httpx.Response] = []

    async def second() -> None:
        replies.append(await back(api, first.session, 2))

    nursery.start_soon(second)
    await first.until(b"session_read_elsewhere")
    assert b"[DONE]" not in first.data
    await first.stream.aclose()
    hold.set()
    await gone(api)
    while not replies:
        await trio.lowlevel.checkpoint()
    parts = chunks(replies[0].text)
    assert [c["token_count"] for p in parts for c in p["choices"]] == [*range(3, 21), 20]


async def test_an_error_while_nobody_read_is_told(api):
    api.engine.fail_at[8] = RunnerFailed("It broke.", reason="test")
    lost = await lose(api)
    reply = await back(api, lost.session, 5)
    assert reply.status_code == 200
    assert "runner_failed" in reply.text
    assert "[DONE]" not in reply.text
    await gone(api)


async def test_the_token_is_asked_for_where_it_is_for_the_rest():
    from pyagent_node.node.api.guard import GuardOptions
    from pyagent_node.simulations.api import TOKEN, simulated_api

    options = GuardOptions(token=TOKEN, token_for_all=True)
    async with simulated_api(guard_options=options) as api:
        assert (await back(api, UNKNOWN)).status_code == 401
        reply = await api.http.get(f"/v1/sessions/{UNKNOWN}/stream", headers=api.auth)
        assert reply.status_code == 404
