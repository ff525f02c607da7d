"""What an operator can ask of the mesh itself: who votes, who leads, who is a member, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import Conflict, InvalidRequest, NotFound, PyAgentError, Unsupported
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import (
    Command,
    RemoveMember,
    RevokeMember,
    SetMeshSetting,
    SetVote,
)
from pyagent_node.consensus.policy import check_proposal
from pyagent_node.consensus.port import Consensus, ConsensusStatus, MemberRecord
from pyagent_node.consensus.settings import MESH_SETTINGS, check_setting
from pyagent_node.consensus.state import is_member
from pyagent_node.consensus.voters import MOST_VOTERS
from pyagent_node.node.api.mesh_schema import (
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
from pyagent_node.node.certificates import read_certificate
from pyagent_node.node.log_check import LogCheck
from pyagent_node.node.membership import Membership

VOTERS_SECONDS: Final = 30.0
"""Longest wait for the voters to become what was asked for."""
LOOK_SECONDS: Final = 0.1


class Governance:
    """One node's side of the operators' verbs; implements ``MeshServices``."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        membership: Membership,
        check: LogCheck,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._mesh = mesh
        self._consensus = consensus
        self._membership = membership
        self._check = check
        self._clock = clock

    # The log -----------------------------------------------------------------------------------

    async def raft(self) -> RaftView:
        """See ``MeshServices``."""
        await trio.lowlevel.checkpoint()
        status = self._consensus.status()
        matched = {each.peer_id: each.matched for each in status.progress}
        present = self._present()
        voters = set(status.voters)
        follow = {*status.voters, *status.learners}
        if status.leader is not None:
            follow.add(status.leader)  # of an engine without voters
        chain = self._consensus.chain_at(status.index)
        return RaftView(
            engine=status.engine,
            role=status.role,
            term=status.term,
            index=status.index,
            commit=max(status.commit, status.index),
            leader=status.leader,
            leader_name=self._name(status.leader) if status.leader is not None else None,
            missing=missing_voters(status, present),
            joint=status.joint,
            followers=tuple(
                FollowerView(
                    peer_id=peer,
                    name=self._name(peer),
                    voter=peer in voters,
                    leader=peer == status.leader,
                    present=peer in present,
                    matched=matched.get(peer),
                )
                for peer in sorted(follow, key=lambda p: (p not in voters, self._name(p)))
            ),
            chain=chain.hex() if chain is not None else None,
            problem=status.problem,
        )

    async def set_voters(self, request: VotersRequest) -> RaftView:
        """See ``MeshServices``; returns when they vote, or after a while as far as it got."""
        if self._consensus.status().engine == "single":
            raise Unsupported(
                "The engine of this mesh has one writer for ever; nobody votes.",
                code="one_writer",
                remedy="Create a mesh with the engine raft-rs to let several nodes decide.",
            )
        chosen = {self._able(node) for node in request.nodes}
        if chosen and (len(chosen) % 2 == 0 or len(chosen) > MOST_VOTERS):
            raise InvalidRequest(
                f"{len(chosen)} nodes cannot be the voters.",
                code="bad_voters",
                remedy=f"Name 1, 3, 5 or {MOST_VOTERS}: of an even number one vote is of no use.",
            )
        for command in self._voting(chosen):
            await self._propose(command)
        with trio.move_on_after(VOTERS_SECONDS):
            while chosen and set(self._consensus.status().voters) != chosen:  # noqa: ASYNC110
                await trio.sleep(LOOK_SECONDS)  # configurations are no commands: none tells
        return await self.raft()

    def _voting(self, chosen: set[PeerId]) -> list[Command]:
        """Return the commands that make exactly the ``chosen`` vote, or whoever is able."""
        state = self._consensus.state
        commands: list[Command] = [SetVote(peer, "always") for peer in sorted(chosen)]
        for peer, record in sorted(state.members.items()):
            pinned = record.vote == "always" or (not chosen and record.vote == "never")
            if pinned and peer not in chosen and is_member(record):
                commands.append(SetVote(peer, "auto"))
        commands.append(SetMeshSetting("voters_max", len(chosen) or None))
        return commands

    async def transfer(self, request: TransferRequest) -> RaftView:
        """See ``MeshServices``."""
        await self._consensus.transfer(self._peer(request.node))
        return await self.raft()

    async def snapshot(self) -> SnapshotReply:
        """See ``MeshServices``."""
        return SnapshotReply(await self._consensus.compact())

    async def verify(self) -> VerifyReply:
        """See ``MeshServices``."""
        names = {peer: self._name(peer) for peer in self._known()}
        return await self._check.compare(names)

    # Members -----------------------------------------------------------------------------------

    async def members(self) -> MembersReply:
        """See ``MeshServices``."""
        await trio.lowlevel.checkpoint()
        records = self._consensus.state.members.values()
        views = [self._view(record) for record in records]
        return MembersReply(tuple(sorted(views, key=lambda v: (v.status, v.name, v.peer_id))))

    async def promote(self, request: PromoteRequest) -> MemberView:
        """See ``MeshServices``."""
        peer = self._member(request.node).peer_id
        await self._propose(SetVote(peer, request.vote))
        return self._view(self._consensus.state.members[peer])

    async def remove(self, request: RemoveMemberRequest) -> MemberView:
        """See ``MeshServices``."""
        record = self._member(request.node)
        command = RemoveMember(record.peer_id, int(self._clock()))
        self._may(command)
        if not request.force:
            self._check_idle(record)
        await self._release_vote(record)
        return await self._part_with(record.peer_id, command)

    async def revoke(self, request: RevokeRequest) -> MemberView:
        """See ``MeshServices``."""
        record = self._member(request.node, gone=True)
        command = RevokeMember(record.peer_id, request.reason)
        self._may(command)
        await self._release_vote(record)
        return await self._part_with(record.peer_id, command)

    async def _part_with(self, peer: PeerId, command: Command) -> MemberView:
        await self._propose(command)
        return self._view(self._consensus.state.members[peer])

    def _check_idle(self, record: MemberRecord) -> None:
        state = self._consensus.state
        for digest, placement in state.placements.items():
            for rank in placement.ranks:
                if rank.peer_id == record.peer_id:
                    raise Conflict(
                        f"{record.name} holds rank {rank.rank} of {state.models[digest].name}.",
                        code="member_in_use",
                        remedy=f"Move its work away first (`pyagent-node placement drain"
                        f" {record.name}`), or use --force.",
                        rank=rank.rank,
                    )

    async def _release_vote(self, record: MemberRecord) -> None:
        """See that a majority is left when a voter goes: the others must do without its vote.

        Whoever leaves is disconnected at once.  If its vote is needed at that moment, the mesh
        could decide nothing any more, not even on other voters.
        """
        status = self._consensus.status()
        voters, peer = set(status.voters), record.peer_id
        rest = (voters - {peer}) & self._present()
        if peer not in voters or not is_member(record) or 2 * len(rest) > len(voters):
            return
        await self._propose(SetVote(peer, "never"))
        with trio.move_on_after(VOTERS_SECONDS):
            while peer in self._consensus.status().voters:  # noqa: ASYNC110 - as above
                await trio.sleep(LOOK_SECONDS)
            return
        raise Conflict(
            f"Without {record.name} too few voters are left to decide anything.",
            code="would_lose_quorum",
            remedy="Start the voters that are away, or let other nodes join, and try again.",
        )

    # Settings ----------------------------------------------------------------------------------

    async def settings(self) -> SettingsReply:
        """See ``MeshServices``."""
        await trio.lowlevel.checkpoint()
        values = self._consensus.state.settings
        return SettingsReply(
            tuple(
                SettingView(
                    name=name,
                    value=values[name],
                    default=each.default,
                    low=each.low,
                    high=each.high,
                    meaning=each.meaning,
                )
                for name, each in MESH_SETTINGS.items()
            )
        )

    async def change_setting(self, request: SettingRequest) -> SettingsReply:
        """See ``MeshServices``."""
        check_setting(request.name, request.value)
        await self._propose(SetMeshSetting(request.name, request.value))
        return await self.settings()

    # Inside ------------------------------------------------------------------------------------

    async def _propose(self, command: Command) -> None:
        self._may(command)
        await self._consensus.propose(command)

    def _may(self, command: Command) -> None:
        """Refuse here what the leader would refuse, before anything was done."""
        profile = self._membership.profile
        authority = profile.genesis.writer
        try:
            check_proposal(
                command, proposer=self._mesh.peer_id, role=profile.role, authority=authority
            )
        except PyAgentError as error:
            if error.code == "not_authority":
                error.remedy = f"Do it on {self._name(authority)} ({authority})."
            raise

    def _present(self) -> set[PeerId]:
        return {self._mesh.peer_id, *(peer.peer_id for peer in self._mesh.peers())}

    def _known(self) -> set[PeerId]:
        status = self._consensus.status()
        return {
            *self._consensus.state.members,
            *self._present(),
            *status.voters,
            *status.learners,
        }

    def _name(self, peer: PeerId) -> str:
        record = self._consensus.state.members.get(peer)
        if record is not None:
            return record.name
        if peer == self._mesh.peer_id:
            return self._membership.profile.name
        return next((p.name for p in self._mesh.peers() if p.peer_id == peer), peer)

    def _peer(self, node: str) -> PeerId:
        """Return the peer id of a name or peer id; of two with a name the one that is a member."""
        members = self._consensus.state.members
        known = self._known()
        if node in known:
            return PeerId(node)
        found = [peer for peer in known if self._name(peer) == node]
        live = [p for p in found if (m := members.get(p)) is None or is_member(m)] or found
        if len(live) == 1:
            return live[0]
        if not live:
            raise NotFound(
                f"The mesh knows no node {node[:80]!r}.",
                code="node_not_found",
                remedy="See `pyagent-node member list`.",
            )
        raise InvalidRequest(
            f"Several nodes are called {node[:80]!r}.",
            code="ambiguous_node",
            remedy="Use the peer id.",
        )

    def _member(self, node: str, *, gone: bool = False) -> MemberRecord:
        """Return a member's record; with ``gone`` also that of one who left."""
        peer = self._peer(node)
        record = self._consensus.state.members.get(peer)
        if record is None or not (gone or is_member(record)):
            raise NotFound(
                f"{node[:80]} is no member.",
                code="member_not_found",
                remedy="See `pyagent-node member list`.",
            )
        return record

    def _able(self, node: str) -> PeerId:
        """Return the peer id of a member that could vote."""
        record = self._member(node)
        if record.role == "client" or record.draining:
            what = "joined as a client" if record.role == "client" else "is being drained"
            raise InvalidRequest(
                f"{record.name} {what} and cannot vote.", code="bad_voters", peer_id=record.peer_id
            )
        return record.peer_id

    def _view(self, record: MemberRecord) -> MemberView:
        status = self._consensus.status()
        peer = record.peer_id
        try:
            expires: float | None = float(read_certificate(record.certificate).expires)
        except PyAgentError:
            expires = None
        return MemberView(
            peer_id=peer,
            name=record.name,
            role=record.role,
            status="revoked" if record.revoked else "member" if is_member(record) else "removed",
            present=peer in self._present(),
            duty=(
                "leader"
                if peer == status.leader
                else "voter"
                if peer in status.voters
                else "learner"
                if peer in status.learners
                else "none"
            ),
            vote=record.vote,
            draining=record.draining,
            authority=peer == self._membership.profile.genesis.writer,
            expires=expires,
            detail=record.revoked,
        )


def missing_voters(status: ConsensusStatus, present: set[PeerId]) -> int:
    """Return how many voters more must be reached before anything can be decided."""
    if not status.voters:
        return 0 if status.leader is None or status.leader in present else 1
    here = sum(1 for peer in status.voters if peer in present)
    return max(0, len(status.voters) // 2 + 1 - here)
