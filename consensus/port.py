"""The ``Consensus`` port: propose, read, follow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, SessionId
from pyagent_node.consensus.commands import (
    Checkpoint,
    Command,
    ModelRecord,
    VotePreference,
)


class MemberRecord(msgspec.Struct, frozen=True):
    """A member as the log knows it."""

    peer_id: PeerId
    name: str
    role: str
    certificate: bytes
    revoked: str | None = None
    vote: VotePreference = "auto"
    draining: bool = False
    removed_at: int | None = None
    """Unix seconds; certificates issued up to then count no more.  ``None`` for a member."""


class ClusterState(Protocol):
    """A read-only view of the replicated state after ``index`` entries."""

    @property
    def index(self) -> int:
        """Index of the last applied entry; 0 when there is none."""
        ...

    @property
    def members(self) -> Mapping[PeerId, MemberRecord]:
        """Every member ever admitted, revoked ones included."""
        ...

    @property
    def burnt_tickets(self) -> Mapping[str, PeerId]:
        """Ticket ids that were redeemed, with who did."""
        ...

    @property
    def models(self) -> Mapping[Digest, ModelRecord]:
        """The known models."""
        ...

    @property
    def placements(self) -> Mapping[Digest, Placement]:
        """The live placement of each placed model."""
        ...

    @property
    def prepared(self) -> Mapping[Digest, Prepared]:
        """The next ranks of placed models that are being loaded beside those in force."""
        ...

    @property
    def last_epoch(self) -> int:
        """The highest epoch ever given; the next placement gets one more."""
        ...

    @property
    def checkpoints(self) -> Mapping[SessionId, Checkpoint]:
        """Where sessions in progress can be resumed from."""
        ...

    @property
    def buckets(self) -> tuple[tuple[PeerId, ...], ...]:
        """The owners of each LSH bucket; empty while none are assigned."""
        ...

    @property
    def bucket_epoch(self) -> int:
        """How often bucket owners were assigned."""
        ...

    @property
    def contexts(self) -> Mapping[str, ContextInfo]:
        """The contexts, by their names."""
        ...

    @property
    def settings(self) -> Mapping[str, int]:
        """Every mesh setting with its value, defaults included."""
        ...


class Applied(msgspec.Struct, frozen=True):
    """One entry of the log after it was applied; ``error`` when the state machine refused it."""

    index: int
    command: Command
    error: ErrorInfo | None = None


class PeerProgress(msgspec.Struct, frozen=True):
    """How far a node's copy of the log is, as the leader knows it.

    ``matched`` is the last entry known to be durable there; ``active`` says whether it was heard
    of within an election timeout.
    """

    peer_id: PeerId
    voter: bool
    matched: int
    active: bool


class ConsensusStatus(msgspec.Struct, frozen=True):
    """What ``status`` shows of the engine.

    ``leader`` is ``None`` while none can be reached; ``problem`` then, or whenever this node cannot
    keep up with the log, says why.  ``index`` is the last applied entry and ``commit`` the last one
    known to be committed.  ``joint`` says that a change of voters is under way.  ``progress`` is
    known on the leader only.
    """

    engine: str
    role: Literal["leader", "follower", "candidate", "learner", "client"]
    leader: PeerId | None
    index: int
    problem: ErrorInfo | None = None
    term: int = 0
    commit: int = 0
    voters: tuple[PeerId, ...] = ()
    learners: tuple[PeerId, ...] = ()
    joint: bool = False
    progress: tuple[PeerProgress, ...] = ()


class AppliedStream(Protocol):
    """An asynchronous iterator over applied entries, in order, each once."""

    def __aiter__(self) -> AppliedStream:
        """Return itself."""
        ...

    async def __anext__(self) -> Applied:
        """Return the next applied entry."""
        ...


class Consensus(Protocol):
    """A replicated log of commands and the state they lead to."""

    @property
    def state(self) -> ClusterState:
        """The state as applied on this node (may lag behind the leader)."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this node is the leader; ``status().role == "leader"`` without its cost."""
        ...

    def status(self) -> ConsensusStatus:
        """Return the engine's view of itself."""
        ...

    async def propose(self, command: Command) -> Applied:
        """Append a command and wait until it is applied on this node.

        Raises the state machine's own error (:class:`Conflict`, :class:`NotFound`,
        :class:`Refused`), :class:`Unavailable` (``no_leader``) or :class:`DeadlineExceeded`.
        """
        ...

    async def read_barrier(self) -> None:
        """Wait until this node has applied all that was committed when the call began."""
        ...

    def applied(self, after: int) -> AbstractAsyncContextManager[AppliedStream]:
        """Follow applied entries with an index above ``after``.

        A subscriber that falls too far behind gets :class:`LimitExceeded` (``lagging``) and must
        read :attr:`state` anew.
        """
        ...

    async def reconfigure(self, voters: frozenset[PeerId], learners: frozenset[PeerId]) -> None:
        """Make these the voters and learners, and wait until that is committed.

        On the leader only: :class:`Refused` (``not_leader``) elsewhere; :class:`Conflict`
        (``change_in_progress``), :class:`InvalidRequest` (``bad_voters``) for an empty set,
        :class:`Unavailable` (``peer_unreachable``) for a node that was never heard of.  A node
        given up by both sets is no longer sent the log.
        """
        ...

    async def transfer(self, to: PeerId) -> None:
        """Hand the leadership to another voter and wait until it leads.

        Works on every node.  Raises :class:`InvalidRequest` (``not_a_voter``),
        :class:`Unavailable` (``no_leader``), :class:`DeadlineExceeded`.
        """
        ...

    async def compact(self) -> int:
        """Write a snapshot of the state now and drop the log before it; returns its index."""
        ...

    def counters(self) -> Mapping[str, int]:
        """Return what the engine counts since it began, by name, for ``/metrics``.

        Among them ``refused_messages`` and ``refused_proposals`` of peers.
        """
        ...

    def chain_at(self, index: int) -> bytes | None:
        """Return the hash chain over the log up to ``index``, ``None`` if it is not kept.

        Two nodes with different chains at one index do not hold the same log.
        """
        ...
