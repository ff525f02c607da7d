"""The admin API's routes about KV blocks: what is kept, and giving it up."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi import APIRouter, Response

from pyagent_node.node.api.exchange import Reply
from pyagent_node.node.api.kv_schema import ClearedReply, KvView


class KvServices(Protocol):
    """What operators ask of a node's KV.  Raises errors of ``pyagent_node.base.errors`` only."""

    async def view(self) -> KvView:
        """Return what is kept, and what it was good for."""
        ...

    async def clear(self) -> ClearedReply:
        """Give up every block that is kept here, in memory and on disk."""
        ...


def kv_router(
    kv: KvServices, reply: Callable[[Callable[[], Awaitable[object]]], Reply]
) -> APIRouter:
    """Return the routes, to be mounted in the admin API; ``reply`` answers with a result."""
    router = APIRouter()

    @router.get("/kv")
    async def view() -> Response:
        return reply(kv.view)

    @router.post("/kv/clear")
    async def clear() -> Response:
        return reply(kv.clear)

    return router
