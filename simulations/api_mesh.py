"""The mesh of a simulated API: two members, everything succeeds, and is noted."""

from __future__ import annotations

import msgspec
import trio

from pyagent_node.base.types import PeerId
from pyagent_node.node.api.mesh_schema import (
    ChainView,
    FollowerView,
    MembersReply,
    MemberView,
    PromoteRequest,
    RaftView,
    RemoveMemberRequest,
    RevokeRequest,
    SettingRequest,
    SettingsReply,
    SettingView,
    SnapshotReply,
    TransferRequest,
    VerifyReply,
    VotersRequest,
)

ANN, BOB = PeerId("12D3KooWAnn"), PeerId("12D3KooWBob")


class SimulatedMeshServices:
    """Answers as two nodes would; ``calls`` notes the requests, ``error`` refuses them."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.error: Exception | None = None
        self.view = RaftView(
            engine="raft-rs",
            role="leader",
            term=2,
            index=9,
            commit=9,
            leader=ANN,
            leader_name="ann",
            missing=0,
            joint=False,
            followers=(
                FollowerView(
                    peer_id=ANN, name="ann", voter=True, leader=True, present=True, matched=9
                ),
                FollowerView(
                    peer_id=BOB, name="bob", voter=False, leader=False, present=False, matched=4
                ),
            ),
            chain="ab" * 32,
        )
        self.member = MemberView(
            peer_id=BOB, name="bob", role="voter", status="member", present=True, duty="learner"
        )
        self.same = True

    async def _note(self, call: object) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def raft(self) -> RaftView:
        """Return the view."""
        await self._note("raft")
        return self.view

    async def set_voters(self, request: VotersRequest) -> RaftView:
        """Note the request."""
        await self._note(request)
        return self.view

    async def transfer(self, request: TransferRequest) -> RaftView:
        """Note the request."""
        await self._note(request)
        return self.view

    async def snapshot(self) -> SnapshotReply:
        """Return an index."""
        await self._note("snapshot")
        return SnapshotReply(9)

    async def verify(self) -> VerifyReply:
        """Say that bob's log is the same, or not."""
        await self._note("verify")
        bob = ChainView(
            peer_id=BOB, name="bob", verdict="same" if self.same else "different", index=9
        )
        return VerifyReply(index=9, chain="ab" * 32, good=self.same, nodes=(bob,))

    async def members(self) -> MembersReply:
        """Return the member."""
        await self._note("members")
        return MembersReply((self.member,))

    async def promote(self, request: PromoteRequest) -> MemberView:
        """Note the request."""
        await self._note(request)
        return msgspec.structs.replace(self.member, vote=request.vote)

    async def remove(self, request: RemoveMemberRequest) -> MemberView:
        """Note the request."""
        await self._note(request)
        return msgspec.structs.replace(self.member, status="removed")

    async def revoke(self, request: RevokeRequest) -> MemberView:
        """Note the request."""
        await self._note(request)
        return msgspec.structs.replace(self.member, status="revoked", detail=request.reason)

    async def settings(self) -> SettingsReply:
        """Return one setting."""
        await self._note("settings")
        setting = SettingView(name="standbys", value=1, default=1, low=0, high=4, meaning="m")
        return SettingsReply((setting,))

    async def change_setting(self, request: SettingRequest) -> SettingsReply:
        """Note the request."""
        await self._note(request)
        return await self.settings()
