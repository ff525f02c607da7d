"""The ``Consensus`` port: propose, read, follow."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Digest, PeerId, Placement
from pyagent_node.consensus.commands import Command, ModelRecord


class MemberRecord(msgspec.Struct, frozen=True):
    """A member as the log knows it."""

    peer_id: PeerId
    name: str
    role: str
    certificate: bytes
    revoked: str | None = None


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
    def last_epoch(self) -> int:
        """The highest epoch ever given; the next placement gets one more."""
        ...


class Applied(msgspec.Struct, frozen=True):
    """One entry of the log after it was applied; ``error`` when the state machine refused it."""

    index: int
    command: Command
    error: ErrorInfo | None = None


class ConsensusStatus(msgspec.Struct, frozen=True):
    """What ``status`` shows of the engine.

    ``leader`` is ``None`` while none can be reached; ``problem`` then, or whenever this node cannot
    keep up with the log, says why.
    """

    engine: str
    role: Literal["leader", "follower", "learner", "client"]
    leader: PeerId | None
    index: int
    problem: ErrorInfo | None = None


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
