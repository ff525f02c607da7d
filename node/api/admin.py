"""The admin API below ``/api/v1``; the guard asks for the token before any of it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import msgspec
import trio
from fastapi import APIRouter, Request, Response

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Digest
from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.exchange import Drain, Reply, Sender, ndjson_error
from pyagent_node.node.api.following import NDJSON, Report, follow_work, send_line
from pyagent_node.node.api.kv_routes import kv_router
from pyagent_node.node.api.mesh_routes import mesh_router
from pyagent_node.node.api.placement_schema import DrainRequest, PlacementsReply
from pyagent_node.node.api.schema import (
    ADMIN_PREFIX,
    ConnectRequest,
    Done,
    EventLine,
    InviteRequest,
    LoadRequest,
    PeersReply,
    PullRequest,
    UnloadRequest,
)
from pyagent_node.node.api.services import ApiServices
from pyagent_node.node.api.session_routes import session_router

MIN_INTERVAL: Final = 0.1
MAX_INTERVAL: Final = 60.0
ADMIN_SECONDS: Final = 60.0
"""Deadline of an admin request that reports no progress."""

_CONNECT = msgspec.json.Decoder(ConnectRequest)
_INVITE = msgspec.json.Decoder(InviteRequest)
_PULL = msgspec.json.Decoder(PullRequest)
_LOAD = msgspec.json.Decoder(LoadRequest)
_DRAIN = msgspec.json.Decoder(DrainRequest)
_UNLOAD = msgspec.json.Decoder(UnloadRequest)

T = TypeVar("T")


def admin_router(services: ApiServices, drain: Drain) -> APIRouter:
    """Return the routes of the admin API."""
    router = APIRouter(prefix=ADMIN_PREFIX)

    def reply(work: Callable[[], Awaitable[object]]) -> Reply:
        async def answer(sender: Sender) -> None:
            await sender.json(await work())

        return Reply(answer, drain=drain, seconds=ADMIN_SECONDS)

    def follow(work: Callable[[Report], Awaitable[T]]) -> Reply:
        return Reply(partial(follow_work, work), drain=drain, stream_error=ndjson_error)

    router.include_router(mesh_router(services.mesh, reply))
    router.include_router(session_router(services.sessions, reply))
    router.include_router(kv_router(services.kv, reply))

    @router.get("/status")
    async def status() -> Response:
        return reply(services.status)

    @router.get("/peers")
    async def peers() -> Response:
        async def work() -> PeersReply:
            return PeersReply((await services.status()).peers)

        return reply(work)

    @router.post("/peers/connect")
    async def connect(request: Request) -> Response:
        body = decode_body(await request.body(), _CONNECT)
        return reply(partial(services.connect, body.address))

    @router.post("/invites")
    async def invite(request: Request) -> Response:
        body = decode_body(await request.body(), _INVITE)
        return reply(partial(services.invite, body))

    @router.get("/models")
    async def models() -> Response:
        return reply(services.models)

    @router.post("/models/pull")
    async def pull(request: Request) -> Response:
        body = decode_body(await request.body(), _PULL)
        return follow(partial(services.pull, body))

    @router.post("/models/load")
    async def load(request: Request) -> Response:
        body = decode_body(await request.body(), _LOAD)
        return follow(partial(services.load, body))

    @router.get("/placements")
    async def placements() -> Response:
        async def work() -> PlacementsReply:
            return PlacementsReply((await services.status()).placements)

        return reply(work)

    @router.post("/placements/plan")
    async def plan(request: Request) -> Response:
        body = decode_body(await request.body(), _LOAD)
        return follow(partial(services.plan, body))

    @router.post("/placements/apply")
    async def apply(request: Request) -> Response:
        body = decode_body(await request.body(), _LOAD)
        return follow(partial(services.apply, body))

    @router.post("/placements/drain")
    async def drain_node(request: Request) -> Response:
        body = decode_body(await request.body(), _DRAIN)
        return follow(partial(services.drain_node, body))

    @router.post("/models/unload")
    async def unload(request: Request) -> Response:
        body = decode_body(await request.body(), _UNLOAD)

        async def work() -> Done:
            await services.unload(body.model)
            return Done()

        return reply(work)

    @router.delete("/models/{digest}")
    async def remove(digest: str) -> Response:
        async def work() -> Done:
            await services.remove(Digest(digest))
            return Done()

        return reply(work)

    @router.get("/doctor")
    async def doctor() -> Response:
        return reply(services.doctor)

    @router.post("/shutdown")
    async def shutdown() -> Response:
        async def answer(sender: Sender) -> None:
            services.shutdown()  # first: a client that leaves at once must not prevent it
            await sender.json(Done())

        return Reply(answer)

    @router.get("/events")
    async def events(interval: str = "1") -> Response:
        return Reply(
            partial(_events, services, _interval(interval)), drain=drain, stream_error=ndjson_error
        )

    return router


async def _events(services: ApiServices, interval: float, sender: Sender) -> None:
    """Send the node's status at every interval until the client leaves."""
    await sender.start(NDJSON)
    while True:
        await send_line(sender, EventLine(status=await services.status()))
        await trio.sleep(interval)


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not MIN_INTERVAL <= value <= MAX_INTERVAL:
        raise InvalidRequest(
            f"interval is {text[:40]!r}; it must lie between {MIN_INTERVAL:g} and"
            f" {MAX_INTERVAL:g} seconds.",
            code="bad_parameter",
            parameter="interval",
        )
    return value
