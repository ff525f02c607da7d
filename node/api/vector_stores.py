"""Search in contexts as OpenAI's clients search in vector stores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import msgspec
from fastapi import APIRouter, Request, Response

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.node.api.context_chat import Queries
from pyagent_node.node.api.context_schema import HitView, QueryRequest
from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.exchange import Drain, Reply, Sender

DEFAULT_RESULTS: Final = 10
MAX_RESULTS: Final = 50
MAX_QUERIES: Final = 8
SEARCH_SECONDS: Final = 120.0
"""Deadline of a search; the encoder may have to be fetched first."""


class RankingOptions(msgspec.Struct, frozen=True):
    """``ranker`` is not looked at: there is one."""

    ranker: str | None = None
    score_threshold: float | None = None


class SearchBody(msgspec.Struct, frozen=True):
    """The body of ``POST /v1/vector_stores/{id}/search``."""

    query: str | list[str]
    max_num_results: int | None = None
    filters: object = None
    ranking_options: RankingOptions | None = None
    rewrite_query: bool | None = None


class ResultText(msgspec.Struct, frozen=True):
    """A text of a result."""

    text: str
    type: str = "text"


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk; ``attributes`` say where in the file it is."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | int | float]
    content: tuple[ResultText, ...]


class SearchPage(msgspec.Struct, frozen=True, kw_only=True):
    """The reply."""

    search_query: tuple[str, ...]
    data: tuple[SearchResult, ...]
    object: str = "vector_store.search_results.page"
    has_more: bool = False
    next_page: str | None = None


class _Wish(NamedTuple):
    queries: tuple[str, ...]
    most: int
    threshold: float


_BODY: Final = msgspec.json.Decoder(SearchBody)


def vector_store_router(contexts: Callable[[], Queries], drain: Drain) -> APIRouter:
    """Return the routes; a vector store's id is the name of a context."""
    router = APIRouter(prefix="/v1/vector_stores")

    @router.post("/{name}/search")
    async def search(name: str, request: Request) -> Response:
        body = decode_body(await request.body(), _BODY)
        wish = _check(body)
        work = partial(_search, contexts, name, wish)
        return Reply(work, drain=drain, seconds=SEARCH_SECONDS)

    return router


async def _search(
    contexts: Callable[[], Queries],
    name: str,
    wish: _Wish,
    sender: Sender,
) -> None:
    queries, count, threshold = wish
    best: dict[tuple[str, int, int], HitView] = {}
    for query in queries:
        found = await contexts().query(name, QueryRequest(question=query, count=count))
        for hit in found.hits:
            place = (hit.source, hit.first_line, hit.last_line)
            if place not in best or best[place].score < hit.score:
                best[place] = hit
    ranked = sorted(best.values(), key=lambda hit: -hit.score)[:count]
    data = tuple(_result(hit) for hit in ranked if hit.score >= threshold)
    await sender.json(SearchPage(search_query=queries, data=data))


def _check(body: SearchBody) -> _Wish:
    if body.filters is not None:
        raise Unsupported(
            "filters are not supported.", code="unsupported_parameter", parameter="filters"
        )
    queries = (body.query,) if isinstance(body.query, str) else tuple(body.query)
    if not 1 <= len(queries) <= MAX_QUERIES or not all(query.strip() for query in queries):
        raise _bad("query", f"must be a text, or 1 to {MAX_QUERIES} of them")
    count = DEFAULT_RESULTS if body.max_num_results is None else body.max_num_results
    if not 1 <= count <= MAX_RESULTS:
        raise _bad("max_num_results", f"is {count}; it must lie between 1 and {MAX_RESULTS}")
    return _Wish(queries, count, _threshold(body))


def _threshold(body: SearchBody) -> float:
    options = body.ranking_options
    value = None if options is None else options.score_threshold
    if value is None:
        return float("-inf")
    if not 0 <= value <= 1:
        raise _bad("ranking_options.score_threshold", "must lie between 0 and 1")
    return value


def _result(hit: HitView) -> SearchResult:
    return SearchResult(
        file_id=hit.source,
        filename=hit.source,
        score=hit.score,
        attributes={"first_line": hit.first_line, "last_line": hit.last_line},
        content=(ResultText(hit.text),),
    )


def _bad(parameter: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{parameter} {reason}.", code="bad_parameter", parameter=parameter)
