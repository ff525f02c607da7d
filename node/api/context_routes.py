"""The routes about contexts, below ``/v1/contexts``."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, Protocol

import msgspec
from fastapi import APIRouter, Request, Response

from pyagent_node.base.contexts import check_context_name
from pyagent_node.base.errors import InvalidRequest
from pyagent_node.node.api.context_schema import (
    AddReply,
    ContextsReply,
    ContextView,
    CreateContextRequest,
    DocumentsReply,
    QueryReply,
    QueryRequest,
    RemoveReply,
)
from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.exchange import Drain, Reply, Sender, ndjson_error
from pyagent_node.node.api.following import Report, follow_work, nobody

QUICK_SECONDS: Final = 120.0
"""Deadline of what embeds nothing."""
LONG_SECONDS: Final = 24 * 3600.0
"""Deadline of adding a document, or asking; the encoder may have to be fetched first."""

_CREATE = msgspec.json.Decoder(CreateContextRequest)
_QUERY = msgspec.json.Decoder(QueryRequest)
_SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)


class ContextServices(Protocol):
    """What can be asked of contexts.  Raises errors of ``pyagent_node.base.errors`` only."""

    async def create(self, request: CreateContextRequest) -> ContextView:
        """Make a context."""
        ...

    async def drop(self, name: str) -> RemoveReply:
        """Remove a context with all its documents."""
        ...

    async def list(self) -> ContextsReply:
        """Return all contexts."""
        ...

    async def show(self, name: str) -> DocumentsReply:
        """Return a context and its documents."""
        ...

    async def add(
        self, name: str, source: str, data: bytes, *, modified: int, report: Report
    ) -> AddReply:
        """Add a file's bytes as a document."""
        ...

    async def remove(self, name: str, source: str) -> RemoveReply:
        """Remove a document."""
        ...

    async def query(self, name: str, request: QueryRequest, report: Report = nobody) -> QueryReply:
        """Return the chunks that a question needs; ``report``: of fetching the encoder."""
        ...


def context_router(services: Callable[[], ContextServices], drain: Drain) -> APIRouter:
    """Return the routes; ``services`` returns what answers them."""
    router = APIRouter(prefix="/v1/contexts")

    def reply(work: Callable[[], Awaitable[object]], seconds: float = QUICK_SECONDS) -> Reply:
        async def answer(sender: Sender) -> None:
            await sender.json(await work())

        return Reply(answer, drain=drain, seconds=seconds)

    def told(request: Request, work: Callable[[Report], Awaitable[object]]) -> Reply:
        """Answer in lines with the progress if that was asked for, else with the result alone."""
        if _one(request, "progress", "false") not in ("true", "1"):
            return reply(partial(work, nobody), LONG_SECONDS)
        return Reply(
            partial(follow_work, work),
            drain=drain,
            seconds=LONG_SECONDS,
            stream_error=ndjson_error,
        )

    @router.get("")
    async def every() -> Response:
        return reply(services().list)

    @router.post("")
    async def create(request: Request) -> Response:
        return reply(partial(services().create, decode_body(await request.body(), _CREATE)))

    @router.get("/{name}")
    async def show(name: str) -> Response:
        return reply(partial(services().show, check_context_name(name)))

    @router.delete("/{name}")
    async def drop(name: str) -> Response:
        return reply(partial(services().drop, check_context_name(name)))

    @router.post("/{name}/documents")
    async def add(name: str, request: Request) -> Response:
        check_context_name(name)
        source = _one(request, "source")
        modified = _number(_one(request, "modified", "0"), "modified")
        data = await request.body()

        async def work(report: Report) -> AddReply:
            return await services().add(name, source, data, modified=modified, report=report)

        return told(request, work)

    @router.delete("/{name}/documents")
    async def remove(name: str, request: Request) -> Response:
        check_context_name(name)
        return reply(partial(services().remove, name, _one(request, "source")))

    @router.post("/{name}/query")
    async def query(name: str, request: Request) -> Response:
        check_context_name(name)
        body = decode_body(await request.body(), _QUERY)
        return told(request, partial(services().query, name, body))

    return router


def _one(request: Request, name: str, default: str | None = None) -> str:
    given = request.query_params.getlist(name)
    if len(given) == 1:
        return given[0]
    if given or default is None:
        raise InvalidRequest(
            f"The request needs one {name} in its address.", code="bad_parameter", parameter=name
        )
    return default


def _number(text: str, name: str) -> int:
    if not _SECONDS.fullmatch(text):
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; it must be a whole number of seconds since 1970.",
            code="bad_parameter",
            parameter=name,
        )
    return int(text)
