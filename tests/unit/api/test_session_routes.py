"""The routes about sessions, and the client's and the command line's way to them."""

from __future__ import annotations

import pytest
import trio

from pyagent_node.base.errors import Conflict, NotFound
from pyagent_node.node.answers import Answer, Piece
from pyagent_node.node.api.session_schema import MoveRequest
from pyagent_node.node.client import Client
from pyagent_node.simulations.api import TOKEN

S = "0" * 32


async def using(api, function):
    """Run ``function(client)`` in a thread, as the command line does."""

    def run():
        with Client(api.url, TOKEN) as client:
            return function(client)

    return await trio.to_thread.run_sync(run)


async def test_what_the_client_gets(api):
    rows = (await using(api, lambda c: c.sessions.list())).sessions
    assert [(row.session, row.part, row.completion_tokens) for row in rows] == [(S, "head", 3)]
    moved = await using(api, lambda c: c.sessions.move(S, "b"))
    assert (moved.name, moved.tokens) == ("b", 3)
    data = await using(api, lambda c: c.sessions.write_out(S))
    assert (await using(api, lambda c: c.sessions.read_in(data))).completion_tokens == 3
    assert api.services.sessions.calls == [MoveRequest(session=S, to="b"), S, data]


@pytest.mark.parametrize("more", [{}, {"stream_options": {"include_usage": True}}])
async def test_following_a_session_from_a_token_on(api, more):
    stream = await api.http.post(
        "/v1/completions",
        json={"model": "words", "prompt": "a", "max_tokens": 8, "stream": True, "seed": 1,
              "resume_seconds": 60, "return_token_ids": True, **more},
    )  # fmt: skip
    session = stream.headers["x-session-id"]
    parts = await using(api, lambda c: list(c.resume(session, 5)))
    assert isinstance(parts[-1], Answer) is bool(more)
    assert sum(len(part.token_ids) for part in parts if isinstance(part, Piece)) == 3
    with pytest.raises(NotFound) as caught:
        await using(api, lambda c: list(c.resume("f" * 32)))
    assert caught.value.code == "session_not_found"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/sessions"),
        ("POST", "/sessions/move"),
        ("GET", f"/sessions/{S}/export"),
        ("POST", "/sessions/import"),
    ],
)
async def test_without_the_token_nothing(api, method, path):
    reply = await api.http.request(method, f"/api/v1{path}", json={})
    assert reply.status_code in (401, 403)
    assert api.services.sessions.calls == []


@pytest.mark.parametrize("body", [{}, {"session": S}, {"session": 1, "to": "b"}, [], "x"])
async def test_bad_bodies(api, body):
    reply = await api.http.post("/api/v1/sessions/move", json=body, headers=api.auth)
    assert reply.status_code == 400
    assert api.services.sessions.calls == []


async def test_a_refusal_comes_back_as_what_it_was(api):
    async def refuse(request):
        raise Conflict("It is here.", code="session_here")

    api.services.sessions.move = refuse
    with pytest.raises(Conflict) as caught:
        await using(api, lambda c: c.sessions.move(S, "b"))
    assert caught.value.code == "session_here"
