"""An answer goes on at another node, with real daemons and the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.node.api.schema import LoadRequest, PullRequest

from .waiting import until, votes_settled

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]


class Stream:
    """What a client of a stream has got so far."""

    def __init__(self) -> None:
        self.session = ""
        self.tokens: list[int] = []
        self.text = ""
        self.done = False
        self._response: httpx.Response | None = None
        self._parts_read: Iterator[dict] = iter(())

    def read(self, response: httpx.Response, most: int) -> None:
        """Read until there are ``most`` tokens, or the stream ends or breaks."""
        assert response.status_code == 200, response.read()
        self.session = response.headers["x-session-id"]
        try:
            if response is not self._response:
                # kept, for a generator that is let go of hangs up, and that ends the session
                self._response, self._parts_read = response, self._parts(response)
            for part in self._parts_read:
                assert "error" not in part, part
                for choice in part["choices"]:
                    self.text += choice["text"]
                    self.tokens += choice.get("token_ids", [])
                    assert choice["token_count"] == len(self.tokens)
                if len(self.tokens) >= most:
                    return
        except httpx.HTTPError:
            return

    def _parts(self, response: httpx.Response) -> Iterator[dict]:
        for line in response.iter_lines():
            if line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def url(node: LocalNode) -> str:
    assert node.state is not None
    return node.state.api_url


def body(model: str, n: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": n,
        "ignore_eos": True,
        "seed": 11,
        "stream": True,
        "return_token_ids": True,
    }


def whole(node: LocalNode, model: str, n: int) -> Stream:
    stream = Stream()
    asked = body(model, n)
    with httpx.stream("POST", url(node) + "/v1/completions", json=asked, timeout=60) as reply:
        stream.read(reply, n + 1)
    assert stream.done
    return stream


def go_on(node: LocalNode, stream: Stream, most: int) -> None:
    """Ask a node for the rest."""
    path = f"/v1/sessions/{stream.session}/stream?from={len(stream.tokens)}"
    with httpx.stream("GET", url(node) + path, timeout=60) as reply:
        stream.read(reply, most)


def voters_first(nodes: list[LocalNode]) -> list[LocalNode]:
    """Return four nodes, the one without a vote last, once it is settled which three vote.

    The last and then the third can die, and two of three voters are left.
    """
    client = nodes[0].client
    until(client, lambda: votes_settled(client, 3), "three of four vote")
    consensus = client.status().consensus
    assert consensus is not None
    return sorted(nodes, key=lambda node: node.peer_id not in consensus.voters)


def moves_and_copies(here: LocalNode, there: LocalNode, want: Stream, asked: object) -> None:
    """Move a session while it is read, and go on with a copy of it."""
    got, copy = Stream(), Stream()
    with httpx.stream("POST", url(here) + "/v1/completions", json=asked, timeout=60) as reply:
        got.read(reply, 100)
        moved = here.client.sessions.move(got.session, there.name)
        assert moved.peer_id == there.peer_id
        (row,) = [r for r in there.client.sessions.list().sessions if r.session == got.session]
        assert row.part == "head"
        data = there.client.sessions.write_out(got.session)
        got.read(reply, len(want.tokens) + 1)
    assert got.done
    assert (got.tokens, got.text) == (want.tokens, want.text)
    copy.session = here.client.sessions.read_in(data).session
    go_on(here, copy, len(want.tokens) + 1)
    assert (copy.tokens, copy.text) == (want.tokens, want.text)


def test_heads_die_and_the_answer_goes_on(bundled_model: Path) -> None:
    n = 300
    with local_swarm(4) as nodes:
        first, second, third, fourth = voters_first(nodes)
        model = first.client.pull(PullRequest(source=f"file:{bundled_model}")).name
        first.client.load(
            LoadRequest(model=model, layers=(15,), nodes=(first.peer_id, second.peer_id))
        )
        for node in nodes:
            until(node.client, lambda node=node: node.client.ready().ready, node.name)
        want = whole(fourth, model, n)
        moves_and_copies(fourth, third, want, body(model, n))
        got = Stream()
        asked = body(model, n)
        with httpx.stream("POST", url(fourth) + "/v1/completions", json=asked, timeout=60) as reply:
            got.read(reply, 150)
            fourth.kill()
        assert len(got.tokens) == 150
        go_on(third, got, 220)
        # its reader is gone, but it waits; the same node goes on, then another one takes over
        go_on(third, got, 240)
        third.kill()
        go_on(second, got, n + 1)
        assert got.done
        assert got.tokens == want.tokens
        assert got.text == want.text
        gone = httpx.get(url(first) + f"/v1/sessions/{'0' * 32}/stream", timeout=60)
        assert gone.status_code == 404
        assert gone.json()["error"]["code"] == "session_not_found"
