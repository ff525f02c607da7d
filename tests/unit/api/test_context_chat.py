"""Answers from a context: what the engine is asked, what the client is told, what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio

from pyagent_node.base.errors import NotFound
from pyagent_node.inference.generation import ChatMessage, Usage
from pyagent_node.inference.kv.pieces import Piece
from pyagent_node.node.answers import Answer, Ask, ContextChoice
from pyagent_node.node.api.context_schema import HitView, QueryReply, QueryRequest
from pyagent_node.node.client import Client
from pyagent_node.simulations.api import TOKEN, SimulatedApi, simulated_api


def hit(number: int, words: int) -> HitView:
    """Return a chunk of so many words, the shorter the number the better."""
    return HitView(
        source=f"dir/file {number}.txt",
        first_line=number,
        last_line=number + 9,
        tokens=words,
        score=1.0 / number,
        text=" ".join(["word"] * words),
    )


class Found:
    """Finds the same chunks for every question."""

    def __init__(self) -> None:
        self.hits = (hit(1, 14), hit(2, 3), hit(3, 13))
        self.asked: list[tuple[str, QueryRequest]] = []

    async def query(self, name: str, request: QueryRequest) -> QueryReply:
        """Note the question."""
        self.asked.append((name, request))
        if name == "missing":
            raise NotFound("There is no context 'missing'.", code="context_not_found")
        return QueryReply(
            hits=self.hits,
            windows=9,
            candidates=9,
            candidate_chunks=3,
            nodes=1,
            nodes_asked=1,
            missing=0,
            seconds=0.1,
            embed_seconds=0.1,
        )


@pytest.fixture
async def at() -> AsyncIterator[tuple[SimulatedApi, Found]]:
    """Serve a node with contexts."""
    found = Found()
    async with simulated_api(contexts=found) as api:  # type: ignore[arg-type]
        yield api, found


BODY = {
    "model": "words",
    "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "where is it"}],
    "max_tokens": 3,
    "seed": 5,
    "context": {"name": "docs"},
}


async def test_the_prompt_holds_the_chunks_and_names_them_as_pieces(at):
    api, found = at
    reply = await api.http.post("/v1/chat/completions", json=BODY)
    assert reply.status_code == 200, reply.text
    assert found.asked == [("docs", QueryRequest(question="where is it", count=8))]
    (request,) = api.engine.requests
    assert request.messages is None
    assert request.join is not None
    # the worst first; one of 7 words is too short to be worth it
    sizes = [piece.tokens for piece in request.join.pieces]
    assert sizes == [17, 18]
    assert request.join.pieces[0].start > 0
    assert request.tokens[-5:] == (9, 5, 2, 2, 99)  # Question: where is it
    assert request.tokens[0] == 90 + len("system")


async def test_citations_and_usage_are_told(at):
    api, _ = at
    body = (await api.http.post("/v1/chat/completions", json=BODY)).json()
    assert [each["number"] for each in body["citations"]] == [1, 2, 3]
    assert body["citations"][1] == {
        "number": 2,
        "source": "dir/file 2.txt",
        "first_line": 2,
        "last_line": 11,
        "score": 0.5,
    }
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "joined_tokens": 0}


async def test_what_came_as_landmarks_is_told_where_there_was_any(at, monkeypatch):
    api, _ = at

    def usage(*args: object, **more: object) -> Usage:
        return msgspec.structs.replace(
            Usage(*args, **more),  # type: ignore[arg-type]
            joined_tokens=200,
            joined_landmarks=120,
        )

    monkeypatch.setattr("pyagent_node.simulations.word_engine.Usage", usage)
    body = (await api.http.post("/v1/chat/completions", json=BODY)).json()
    told = {"cached_tokens": 0, "joined_tokens": 200, "joined_landmarks": 120}
    assert body["usage"]["prompt_tokens_details"] == told

    def run():
        with Client(api.url, TOKEN) as client:
            messages = (ChatMessage("user", "where is it"),)
            ask = Ask(model="words", messages=messages, context=ContextChoice(name="docs"))
            return list(client.generate(ask))[-1]

    answer = await trio.to_thread.run_sync(run)
    assert (answer.joined_tokens, answer.joined_landmarks) == (200, 120)


async def test_a_stream_tells_its_citations_first_and_once(at):
    api, _ = at
    options = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
    reply = await api.http.post("/v1/chat/completions", json=BODY | options)
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert [len(chunk.get("citations", ())) for chunk in chunks] == [3] + [0] * (len(chunks) - 1)


async def test_exact_requests_join_nothing(at):
    api, _ = at
    for exact in (False, True):
        body = BODY | {"context": {"name": "docs", "exact": exact}}
        await api.http.post("/v1/chat/completions", json=body)
    joined, exact = api.engine.requests
    assert joined.tokens == exact.tokens
    assert exact.join is None


async def test_what_does_not_fit_is_left_out_and_not_cited(at):
    api, found = at
    found.hits = (hit(1, 40), hit(2, 18), hit(3, 4))
    body = (await api.http.post("/v1/chat/completions", json=BODY)).json()
    assert [each["number"] for each in body["citations"]] in ([1], [2, 3], [1, 3])
    assert len(api.engine.requests[0].tokens) < 64


async def test_nothing_found_is_an_answer_without_sources(at):
    api, found = at
    found.hits = ()
    body = (await api.http.post("/v1/chat/completions", json=BODY)).json()
    assert body["citations"] == []
    assert api.engine.requests[0].join is None


@pytest.mark.parametrize(
    "changes",
    [
        {"context": {"name": "../etc"}},
        {"context": {"name": ""}},
        {"context": {}},
        {"context": {"name": "docs", "count": 0}},
        {"context": {"name": "docs", "count": 33}},
        {"context": {"name": "docs", "chunks": 3}},
        {"context": "docs"},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {"messages": [{"role": "user", "content": "  "}]},
    ],
)
async def test_what_cannot_be_asked_is_refused(at, changes):
    api, _ = at
    reply = await api.http.post("/v1/chat/completions", json=BODY | changes)
    assert reply.status_code == 400
    assert not api.engine.requests


async def test_an_unknown_context_is_not_found(at):
    api, _ = at
    body = BODY | {"context": {"name": "missing"}}
    reply = await api.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "context_not_found"


async def test_the_client_hands_it_on(at):
    api, _ = at

    def run():
        with Client(api.url, TOKEN) as client:
            ask = Ask(
                model="words",
                messages=(ChatMessage("system", "x"), ChatMessage("user", "where is it")),
                max_tokens=2,
                context=ContextChoice(name="docs", count=2),
            )
            return list(client.generate(ask))[-1]

    answer = await trio.to_thread.run_sync(run)
    assert isinstance(answer, Answer)
    assert [each.source for each in answer.citations] == [f"dir/file {i}.txt" for i in (1, 2, 3)]
    assert answer.joined_tokens == 0


# ---- vector stores ---------------------------------------------------------------------------


async def test_search_answers_in_the_schema_of_vector_stores(at):
    api, found = at
    reply = await api.http.post(
        "/v1/vector_stores/docs/search", json={"query": "where is it", "max_num_results": 2}
    )
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert (body["object"], body["has_more"], body["next_page"]) == (
        "vector_store.search_results.page",
        False,
        None,
    )
    assert body["search_query"] == ["where is it"]
    assert [each["score"] for each in body["data"]] == [1.0, 0.5]
    assert body["data"][1] == {
        "file_id": "dir/file 2.txt",
        "filename": "dir/file 2.txt",
        "score": 0.5,
        "attributes": {"first_line": 2, "last_line": 11},
        "content": [{"type": "text", "text": "word word word"}],
    } | {"content": [{"text": "word word word", "type": "text"}]}
    assert found.asked[0][1].count == 2


async def test_several_queries_and_a_threshold(at):
    api, found = at
    body = {"query": ["a b", "c"], "ranking_options": {"score_threshold": 0.4}}
    data = (await api.http.post("/v1/vector_stores/docs/search", json=body)).json()["data"]
    assert [each["score"] for each in data] == [1.0, 0.5]
    assert len(found.asked) == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"query": ""},
        {"query": []},
        {"query": ["x"] * 9},
        {"query": "x", "max_num_results": 0},
        {"query": "x", "max_num_results": 51},
        {"query": "x", "filters": {"type": "eq"}},
        {"query": "x", "ranking_options": {"score_threshold": 2}},
    ],
)
async def test_searches_that_cannot_be_are_refused(at, body):
    api, _ = at
    reply = await api.http.post("/v1/vector_stores/docs/search", json=body)
    assert reply.status_code == 400


def test_pieces_are_spans():
    assert Piece(3, 8).tokens == 5


async def test_passages_are_repeated_before_the_question(at):
    api, found = at
    hits = found.hits[:2]
    found.hits = tuple(msgspec.structs.replace(hit, best="the very words") for hit in hits)
    await api.http.post("/v1/chat/completions", json=BODY)
    (request,) = api.engine.requests
    plain = len(request.tokens)
    # 9 words before two passages of 4 words ("-" and three)
    found.hits = hits
    await api.http.post("/v1/chat/completions", json=BODY)
    without = len(api.engine.requests[-1].tokens)
    assert plain - without == 9 + 2 * 4
    assert request.tokens[-5:] == (9, 5, 2, 2, 99)
