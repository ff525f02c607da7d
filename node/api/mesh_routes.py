"""The admin API's routes about the mesh itself: its log, voters, members and settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import msgspec
from fastapi import APIRouter, Request, Response

from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.exchange import Reply
from pyagent_node.node.api.mesh_schema import (
    MembersReply,
    MemberView,
    PromoteRequest,
    RaftView,
    RemoveMemberRequest,
    RevokeRequest,
    SettingRequest,
    SettingsReply,
    SnapshotReply,
    TransferRequest,
    VerifyReply,
    VotersRequest,
)

_VOTERS = msgspec.json.Decoder(VotersRequest)
_TRANSFER = msgspec.json.Decoder(TransferRequest)
_PROMOTE = msgspec.json.Decoder(PromoteRequest)
_REMOVE = msgspec.json.Decoder(RemoveMemberRequest)
_REVOKE = msgspec.json.Decoder(RevokeRequest)
_SETTING = msgspec.json.Decoder(SettingRequest)


class MeshServices(Protocol):
    """What operators can ask of the mesh.  Raises errors of ``pyagent_node.base.errors`` only."""

    async def raft(self) -> RaftView:
        """Return the state of the log and who votes on it."""
        ...

    async def set_voters(self, request: VotersRequest) -> RaftView:
        """Fix the voters, or let the mesh choose them again."""
        ...

    async def transfer(self, request: TransferRequest) -> RaftView:
        """Let another voter lead."""
        ...

    async def snapshot(self) -> SnapshotReply:
        """Replace this node's log so far by a snapshot."""
        ...

    async def verify(self) -> VerifyReply:
        """Compare the logs of all connected nodes."""
        ...

    async def members(self) -> MembersReply:
        """List everybody who was ever admitted."""
        ...

    async def promote(self, request: PromoteRequest) -> MemberView:
        """Say whether a member votes."""
        ...

    async def remove(self, request: RemoveMemberRequest) -> MemberView:
        """Let a member go; it may join again."""
        ...

    async def revoke(self, request: RevokeRequest) -> MemberView:
        """Shut a member out for ever."""
        ...

    async def settings(self) -> SettingsReply:
        """List the mesh's settings."""
        ...

    async def change_setting(self, request: SettingRequest) -> SettingsReply:
        """Change a setting of the mesh."""
        ...


def mesh_router(
    mesh: MeshServices, reply: Callable[[Callable[[], Awaitable[object]]], Reply]
) -> APIRouter:
    """Return the routes, to be mounted in the admin API; ``reply`` answers with a result."""
    router = APIRouter()

    @router.get("/raft")
    async def raft() -> Response:
        return reply(mesh.raft)

    @router.post("/raft/voters")
    async def voters(request: Request) -> Response:
        return reply(partial(mesh.set_voters, decode_body(await request.body(), _VOTERS)))

    @router.post("/raft/transfer")
    async def transfer(request: Request) -> Response:
        return reply(partial(mesh.transfer, decode_body(await request.body(), _TRANSFER)))

    @router.post("/raft/snapshot")
    async def snapshot() -> Response:
        return reply(mesh.snapshot)

    @router.post("/raft/verify")
    async def verify() -> Response:
        return reply(mesh.verify)

    @router.get("/members")
    async def members() -> Response:
        return reply(mesh.members)

    @router.post("/members/promote")
    async def promote(request: Request) -> Response:
        return reply(partial(mesh.promote, decode_body(await request.body(), _PROMOTE)))

    @router.post("/members/remove")
    async def remove(request: Request) -> Response:
        return reply(partial(mesh.remove, decode_body(await request.body(), _REMOVE)))

    @router.post("/members/revoke")
    async def revoke(request: Request) -> Response:
        return reply(partial(mesh.revoke, decode_body(await request.body(), _REVOKE)))

    @router.get("/settings")
    async def settings() -> Response:
        return reply(mesh.settings)

    @router.post("/settings")
    async def change(request: Request) -> Response:
        return reply(partial(mesh.change_setting, decode_body(await request.body(), _SETTING)))

    return router
