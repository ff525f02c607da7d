"""The client's part for the mesh itself: its log, voters, members and settings."""

from __future__ import annotations

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
    Vote,
    VotersRequest,
)
from pyagent_node.node.client_transport import Transport


class MeshClient:
    """Asks the daemon about the mesh; a ``node`` is a name or a peer id."""

    def __init__(self, transport: Transport) -> None:
        self._api = transport

    def raft(self) -> RaftView:
        """Return the state of the log and its voters."""
        return self._api.get("/raft", RaftView)

    def set_voters(self, nodes: tuple[str, ...]) -> RaftView:
        """Have exactly these nodes vote; with none, let the mesh choose again."""
        return self._api.post("/raft/voters", VotersRequest(nodes=nodes), RaftView)

    def transfer(self, node: str) -> RaftView:
        """Let another voter lead."""
        return self._api.post("/raft/transfer", TransferRequest(node), RaftView)

    def snapshot(self) -> SnapshotReply:
        """Let the daemon write a snapshot and drop the log before it."""
        return self._api.post("/raft/snapshot", None, SnapshotReply)

    def verify(self) -> VerifyReply:
        """Compare the logs of all connected nodes."""
        return self._api.post("/raft/verify", None, VerifyReply)

    def members(self) -> MembersReply:
        """List the members."""
        return self._api.get("/members", MembersReply)

    def promote(self, node: str, vote: Vote) -> MemberView:
        """Say whether a member votes."""
        return self._api.post("/members/promote", PromoteRequest(node=node, vote=vote), MemberView)

    def remove(self, node: str, *, force: bool) -> MemberView:
        """Let a member go."""
        request = RemoveMemberRequest(node=node, force=force)
        return self._api.post("/members/remove", request, MemberView)

    def revoke(self, node: str, reason: str) -> MemberView:
        """Shut a member out for ever."""
        request = RevokeRequest(node=node, reason=reason)
        return self._api.post("/members/revoke", request, MemberView)

    def settings(self) -> SettingsReply:
        """List the settings of the mesh."""
        return self._api.get("/settings", SettingsReply)

    def change_setting(self, name: str, value: int | None) -> SettingsReply:
        """Change a setting of the mesh; ``None`` returns it to its default."""
        return self._api.post("/settings", SettingRequest(name=name, value=value), SettingsReply)
