"""Changes of who votes, who follows and who leads, as the leader makes them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.raft_core import Core
from pyagent_node.consensus.raft_members import Members
from pyagent_node.consensus.raft_storage import encode_peers
from pyagent_node.native import RaftConf, RaftDropped, RaftRefused

log = logging.getLogger("pyagent_node.consensus.raft")


class Change:
    """A configuration on its way."""

    def __init__(self, conf: RaftConf, newcomers: dict[int, PeerId]) -> None:
        self.conf = conf
        self.newcomers = newcomers
        self.proposed = False
        self.error: PyAgentError | None = None
        self.done = trio.Event()

    def settle(self, error: PyAgentError | None = None) -> None:
        """End the wait."""
        self.error = error
        self.done.set()


class Handover:
    """A leadership that is to be handed over; ``refuse`` hears why it is not."""

    def __init__(self, to: PeerId, refuse: Callable[[PyAgentError], None]) -> None:
        self.to = to
        self.refuse = refuse


class Changes:
    """At most one change of the configuration, and hand-overs, waiting for their turn."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._change: Change | None = None
        self._handovers: list[Handover] = []

    def begin(self, voters: frozenset[PeerId], learners: frozenset[PeerId]) -> Change:
        """Queue a change; raises what ``Consensus.reconfigure`` says but ``not_leader``."""
        if not voters or voters & learners:
            raise InvalidRequest(
                "There must be a voter, and nobody both votes and only follows.", code="bad_voters"
            )
        if self._change is not None or self._members.conf.joint:
            raise change_in_progress()
        ids = {peer: self._members.id_of(peer) for peer in sorted(voters | learners)}
        try:
            conf = RaftConf(
                sorted(ids[peer] for peer in voters), sorted(ids[peer] for peer in learners)
            )
        except ValueError as error:
            raise InvalidRequest(f"These cannot be voters and learners: {error}.") from None
        self._change = Change(conf, self._newcomers(ids))
        return self._change

    def _newcomers(self, ids: dict[PeerId, int]) -> dict[int, PeerId]:
        known = self._members.peers
        return {node_id: peer for peer, node_id in ids.items() if known.get(node_id) != peer}

    def drop(self, change: Change) -> None:
        """Forget a change (one that was proposed may be committed all the same)."""
        if self._change is change:
            self._change = None

    def hand_over(self, handover: Handover) -> None:
        """Queue a hand-over of the leadership."""
        self._handovers.append(handover)

    def feed(self, core: Core) -> None:
        """Put into the core what waits; on the leader."""
        change = self._change
        if change is not None and not change.proposed:
            self._propose(core, change)
        handovers, self._handovers = self._handovers, []
        for each in handovers:
            try:
                core.transfer(self._members.id_of(each.to))
            except (RaftRefused, Unavailable):
                each.refuse(not_a_voter(each.to))
            except RaftDropped:
                each.refuse(Unavailable("The leadership changes just now.", code="no_leader"))

    def _propose(self, core: Core, change: Change) -> None:
        try:
            placed = core.propose_conf(
                change.conf.voters, change.conf.learners, encode_peers(change.newcomers)
            )
        except RaftDropped:
            self._end(change_in_progress())
        except RaftRefused as error:
            self._end(InvalidRequest(f"The voters were refused: {error}.", code="bad_voters"))
        else:
            change.proposed = True
            if placed is None:
                self._end(None)

    def _end(self, error: PyAgentError | None) -> None:
        if self._change is not None:
            self._change.settle(error)
            self._change = None

    def look(self) -> None:
        """Notice that the change is complete."""
        if self._change is not None and self._members.conf == self._change.conf:
            self._end(None)

    def leadership_lost(self) -> None:
        """Give up what only the leader can do."""
        self._end(
            Unavailable(
                "This node does not lead any more; the change may have happened or not.",
                code="leader_changed",
                remedy="Look at the voters, and ask the new leader.",
            )
        )
        for each in self._handovers:
            each.refuse(not_leader())
        self._handovers.clear()

    def replace_reborn(self, core: Core) -> None:
        """Give members that lost their logs their places again, under their new ids.

        The old ids will never be heard of again, so the quorum is not weaker than before; and the
        change is only agreed on by voters that hold everything that the lost log held.
        """
        conf = self._members.conf
        reborn = self._members.reborn()
        if not reborn or conf.joint or self._change is not None:
            return
        voters = [reborn.get(each, each) for each in conf.voters]
        learners = [reborn.get(each, each) for each in conf.learners]
        newcomers = {new: self._members.peers[old] for old, new in reborn.items()}
        try:
            core.propose_conf(voters, learners, encode_peers(newcomers))
        except (RaftDropped, RaftRefused) as error:
            log.debug("members that lost their logs wait for their places: %s", error)


def change_in_progress() -> Conflict:
    """Return the error of a second change at a time."""
    return Conflict(
        "Another change of the voters is under way.",
        code="change_in_progress",
        remedy="Try again when it is done.",
    )


def not_leader() -> Refused:
    """Return the error of a request that only the leader serves."""
    return Refused(
        "This node does not lead the log.", code="not_leader", remedy="Ask on the leader."
    )


def not_a_voter(peer: PeerId) -> InvalidRequest:
    """Return the error of a leadership for somebody without a vote."""
    return InvalidRequest(
        f"{peer} has no vote, so it cannot lead.",
        code="not_a_voter",
        remedy="Choose one of the voters.",
        peer_id=peer,
    )
