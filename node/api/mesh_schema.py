"""The messages of the admin API about the mesh itself: its log, voters, members and settings.

As ``schema``: plain values only, for the command line as well.  A ``node`` is a name or a peer id.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import PeerId

Vote = Literal["auto", "always", "never"]


class FollowerView(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is sent the log.

    ``present`` says whether this node is connected with it (or is it); ``matched`` is the last
    entry that it is known to hold, which the leader alone knows.
    """

    peer_id: PeerId
    name: str
    voter: bool
    leader: bool
    present: bool
    matched: int | None = None


class RaftView(msgspec.Struct, frozen=True, kw_only=True):
    """The engine as this node sees it.

    ``missing`` is how many voters more must be reached before anything can be decided; 0 when a
    majority is.  ``index`` is the last entry applied here, ``chain`` the hash over the log so far.
    """

    engine: str
    role: str
    term: int
    index: int
    commit: int
    leader: PeerId | None
    leader_name: str | None
    missing: int
    joint: bool
    followers: tuple[FollowerView, ...]
    chain: str | None = None
    problem: ErrorInfo | None = None


class VotersRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Have exactly these nodes vote; with none, let the mesh choose by itself again."""

    nodes: tuple[str, ...] = ()


class TransferRequest(msgspec.Struct, frozen=True):
    """Let the voter ``node`` lead."""

    node: str


class SnapshotReply(msgspec.Struct, frozen=True):
    """This node's log before ``index`` was replaced by a snapshot."""

    index: int


Verdict = Literal["same", "different", "not_kept", "behind", "unreachable"]


class ChainView(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a node's log is a copy of this one's up to the compared entry.

    ``"behind"``: it has not got so far; ``"not_kept"``: it keeps no hash so old; ``detail``
    explains ``"unreachable"``.
    """

    peer_id: PeerId
    name: str
    verdict: Verdict
    index: int | None = None
    detail: str | None = None


class VerifyReply(msgspec.Struct, frozen=True, kw_only=True):
    """The comparison of logs at entry ``index``; ``good`` when none differs."""

    index: int
    chain: str | None
    good: bool
    nodes: tuple[ChainView, ...]


class MemberView(msgspec.Struct, frozen=True, kw_only=True):
    """A member, or somebody who was one.

    ``status`` is ``"member"``, ``"removed"`` or ``"revoked"`` (``detail`` says why); ``duty`` what
    it is to the log now.
    """

    peer_id: PeerId
    name: str
    role: str
    status: Literal["member", "removed", "revoked"]
    present: bool
    duty: Literal["leader", "voter", "learner", "none"]
    vote: Vote = "auto"
    draining: bool = False
    authority: bool = False
    expires: float | None = None
    detail: str | None = None


class MembersReply(msgspec.Struct, frozen=True):
    """Everybody who was ever admitted, by name."""

    members: tuple[MemberView, ...]


class PromoteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Say whether a member must vote, must not, or as the mesh sees fit."""

    node: str
    vote: Vote = "always"


class RemoveMemberRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Let a member go; ``force``: although it holds ranks of a model."""

    node: str
    force: bool = False


class RevokeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Shut a member out for ever."""

    node: str
    reason: str


class SettingView(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of the whole mesh."""

    name: str
    value: int
    default: int
    low: int
    high: int
    meaning: str


class SettingsReply(msgspec.Struct, frozen=True):
    """All settings of the mesh."""

    settings: tuple[SettingView, ...]


class SettingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Change a setting; no value returns it to its default."""

    name: str
    value: int | None = None
