"""The client's part for contexts."""

from __future__ import annotations

from urllib.parse import quote, urlencode

import msgspec

from pyagent_node.base.contexts import check_context_name
from pyagent_node.base.types import ContextPolicy
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
from pyagent_node.node.api.schema import Line
from pyagent_node.node.client_transport import Report, Transport, decode

_PATH = "/v1/contexts"


class ContextApiClient:
    """Asks the daemon about contexts; every method checks the name before it is sent."""

    def __init__(self, transport: Transport) -> None:
        self._api = transport

    def create(self, name: str, policy: ContextPolicy) -> ContextView:
        """Make a context."""
        body = msgspec.json.encode(CreateContextRequest(check_context_name(name), policy))
        return decode(self._api.request("POST", _PATH, body), ContextView)

    def list(self) -> ContextsReply:
        """Return all contexts."""
        return decode(self._api.request("GET", _PATH, None), ContextsReply)

    def show(self, name: str) -> DocumentsReply:
        """Return a context and its documents."""
        return decode(self._api.request("GET", _path(name), None), DocumentsReply)

    def drop(self, name: str) -> RemoveReply:
        """Remove a context with all its documents."""
        return decode(self._api.request("DELETE", _path(name), None), RemoveReply)

    def add(
        self, name: str, source: str, data: bytes, *, modified: int, report: Report | None = None
    ) -> AddReply:
        """Add a file's bytes as the document ``source``; ``modified`` is in Unix seconds."""
        query = urlencode({"source": source, "modified": modified, "progress": "true"})
        path = f"{_path(name)}/documents?{query}"
        return self._api.lines("POST", path, data, Line[AddReply], report)

    def remove(self, name: str, source: str) -> RemoveReply:
        """Remove a document."""
        path = f"{_path(name)}/documents?{urlencode({'source': source})}"
        return decode(self._api.request("DELETE", path, None), RemoveReply)

    def query(self, name: str, request: QueryRequest, report: Report | None = None) -> QueryReply:
        """Return the chunks that a question needs; ``report``: of fetching the encoder."""
        path = f"{_path(name)}/query?progress=true"
        return self._api.lines("POST", path, msgspec.json.encode(request), Line[QueryReply], report)


def _path(name: str) -> str:
    return f"{_PATH}/{quote(check_context_name(name), safe='')}"


def digest_of(data: bytes) -> str:
    """Return the digest that a document of these bytes has."""
    from pyagent_node.native import blake3  # noqa: PLC0415 - for those who add only

    return blake3(data).hex()
