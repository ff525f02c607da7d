"""Proposals on their way: those of this node, and those that it leads to the log.  No I/O.

A proposal is sent to the leader, and again to the next one, until it is seen applied or refused.
The log may then hold it twice; the replica applies it once.
"""

from __future__ import annotations

from collections import Counter

import trio

from pyagent_node.base.errors import (
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    error_from_info,
)
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.replica import Outcome, Replica

MAX_PENDING = 256
"""Proposals of this node that wait for an answer."""
MAX_IN_FLIGHT_PER_PEER = 256
"""Proposals of one peer that the leader has appended and not yet applied."""


class Pending:
    """A proposal of this node."""

    __slots__ = (
        "born",
        "command",
        "data",
        "done",
        "outcome",
        "placed",
        "placed_at",
        "request",
        "sent",
        "since",
    )

    def __init__(
        self, request: bytes, command: Command, data: bytes, *, since: int, tick: int
    ) -> None:
        self.request = request
        self.command = command
        self.data = data
        self.since = since
        self.born = tick
        self.placed: tuple[int, int] | None = None
        self.placed_at = tick
        self.sent = 0
        self.outcome: Applied | PyAgentError | None = None
        self.done = trio.Event()

    def settle(self, outcome: Applied | PyAgentError) -> None:
        """End the wait."""
        if not self.done.is_set():
            self.outcome = outcome
            self.done.set()


class Proposals:
    """What waits here, and what this node as leader has appended."""

    def __init__(self) -> None:
        self.refused = 0
        self._pending: dict[bytes, Pending] = {}
        self._in_flight: dict[bytes, PeerId] = {}
        self._per_peer: Counter[PeerId] = Counter()

    def add(self, pending: Pending) -> None:
        """Keep a proposal until :meth:`drop`; raises ``too_many_proposals``."""
        if len(self._pending) >= MAX_PENDING:
            raise LimitExceeded(
                f"{MAX_PENDING} changes of this node wait for the log already.",
                code="too_many_proposals",
                limit=MAX_PENDING,
            )
        self._pending[pending.request] = pending

    def drop(self, request: bytes) -> None:
        """Forget a proposal of this node."""
        self._pending.pop(request, None)

    def due(self, place: tuple[int, int], tick: int, resend: int) -> list[Pending]:
        """Return what is to be sent, or sent again, to ``place``: a leader in its term."""
        return [
            pending
            for pending in self._pending.values()
            if not pending.done.is_set()
            and (pending.placed != place or tick - pending.placed_at >= resend)
        ]

    def starved(self, tick: int, patience: int) -> list[Pending]:
        """Return what could not be sent to anybody for ``patience`` ticks."""
        return [
            pending
            for pending in self._pending.values()
            if pending.placed is None and tick - pending.born > patience
        ]

    def orphaned(self, tick: int, patience: int) -> list[Pending]:
        """Return what was sent to a leader, ``patience`` ticks ago or more, and not agreed on."""
        return [
            pending
            for pending in self._pending.values()
            if pending.placed is not None and tick - pending.placed_at > patience
        ]

    def fail(self, error: PyAgentError) -> None:
        """End every wait here; what was sent somewhere may still be agreed on."""
        doubt = error_from_info(error.to_info())
        doubt.message += " The change may have happened; look before repeating it."
        for pending in list(self._pending.values()):
            pending.settle(error if pending.placed is None else doubt)

    def refuse(self, request: bytes, error: ErrorInfo) -> None:
        """Take the leader's word that ``request`` will not be appended.

        One that was never sent before is only asked to come again with a newer ``since``.
        """
        pending = self._pending.get(request)
        if pending is None:
            return
        index = error.facts.get("index")
        if error.code == "proposal_too_old" and pending.sent == 1 and isinstance(index, int):
            pending.since = max(pending.since, index)
            pending.sent = 0
            pending.placed = None
            return
        pending.settle(error_from_info(error))

    def applied(self, outcome: Outcome) -> None:
        """Note what became of an entry of the log."""
        request = outcome.record.request
        peer = self._in_flight.pop(request, None)
        if peer is not None:
            self._per_peer[peer] -= 1
        pending = self._pending.get(request)
        if pending is None:
            return
        error = outcome.applied.error
        pending.settle(outcome.applied if error is None else error_from_info(error))

    def installed(self, replica: Replica) -> None:
        """Look in a snapshot for what waits here."""
        for request, pending in list(self._pending.items()):
            index = replica.requests.get(request)
            if index is not None:
                error = replica.failures.get(request)
                pending.settle(
                    Applied(index, pending.command) if error is None else error_from_info(error)
                )

    def leads(self, request: bytes) -> bool:
        """Say whether ``request`` was appended in this term and is not applied yet."""
        return request in self._in_flight

    def check_room(self, peer: PeerId) -> None:
        """Raise :class:`LimitExceeded` when too much of ``peer`` is in flight."""
        if self._per_peer[peer] >= MAX_IN_FLIGHT_PER_PEER:
            raise LimitExceeded(
                f"{MAX_IN_FLIGHT_PER_PEER} changes of {peer} wait to be committed already.",
                code="too_many_proposals",
                limit=MAX_IN_FLIGHT_PER_PEER,
            )

    def lead(self, request: bytes, peer: PeerId) -> None:
        """Note that a proposal of ``peer`` was appended."""
        self._in_flight[request] = peer
        self._per_peer[peer] += 1

    def new_term(self) -> None:
        """Forget what was appended: another leader may have replaced it."""
        self._in_flight.clear()
        self._per_peer.clear()
