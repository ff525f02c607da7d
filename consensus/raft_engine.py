"""A Raft engine as the rest of the node sees it: the ``Consensus`` port."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from pyagent_node.base.errors import (
    DeadlineExceeded,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus import raft_links
from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.commands import Command
from pyagent_node.consensus.port import Applied, AppliedStream, ConsensusStatus
from pyagent_node.consensus.raft_changes import Changes, not_leader
from pyagent_node.consensus.raft_courier import Authorise, Courier
from pyagent_node.consensus.raft_handover import Handovers, News
from pyagent_node.consensus.raft_links import Links
from pyagent_node.consensus.raft_members import ALL, Members
from pyagent_node.consensus.raft_messages import (
    Hello,
    NotTransferred,
    Propose,
    Refusal,
    Transfer,
)
from pyagent_node.consensus.raft_node import Inbound, RaftNode
from pyagent_node.consensus.raft_outbox import counted, send
from pyagent_node.consensus.raft_proposals import Pending
from pyagent_node.consensus.raft_reads import Reads
from pyagent_node.consensus.raft_status import status_of, successor
from pyagent_node.consensus.raft_trouble import no_leader
from pyagent_node.consensus.replica import (
    Outcome,
    Replica,
)
from pyagent_node.consensus.state import State
from pyagent_node.native import RaftDropped

log = logging.getLogger("pyagent_node.consensus.raft")

NO_LEADER_SECONDS = 5.0
"""Longest wait for a leader before a proposal is given up that nobody has seen."""
STILL_NO_LEADER_SECONDS = 1.0
"""The same where there has been no leader for so long already, and too few voters are there."""

RESIGN_SECONDS = 1.0
"""Longest wait for another leader before a leader ends."""
HELLO_SECONDS = 3.0
"""Longest wait for a connected peer to say which Raft id it goes by."""


class RaftEngine:
    """Implements ``Consensus``; get one from :func:`pyagent_node.consensus.raft.open_raft`."""

    def __init__(
        self,
        mesh: Mesh,
        members: Members,
        incarnation: bytes,
        *,
        name: str,
        role: str,
        propose_seconds: float,
        new_request: Callable[[], bytes],
        authorise: Authorise,
    ) -> None:
        self.node: RaftNode
        self.links: Links
        self.members = members
        self._mesh = mesh
        self._incarnation = incarnation
        self._name = name
        self._role = role
        self._seconds = propose_seconds
        self._new_request = new_request
        self._courier = Courier(mesh, members, role=role, authorise=authorise)
        self._proposals = self._courier.proposals
        self._reads = Reads()
        self._changes = Changes(members)
        self._offers: list[tuple[PeerId, Propose | Transfer, Callable[[], None]]] = []
        self._place = (0, 0)
        self._said: Hello | None = None
        self._news = News()
        self._handovers = Handovers(members, self._changes, self._news)
        self._failure: PyAgentError | None = None

    # -- the port ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state as applied on this node."""
        return self.node.history.state

    @property
    def leads(self) -> bool:
        """See ``Consensus.leads``."""
        return self.node.leads and self._role != "client"

    def status(self) -> ConsensusStatus:
        """See ``Consensus.status``."""
        node = self.node
        return status_of(
            self._name,
            node.core.status(),
            self.members,
            client=self._role == "client",
            leader=node.leader,
            index=node.history.index,
            problem=node.disk.problem or node.applier.held,
            present=self.links.peers,
        )

    async def propose(self, command: Command) -> Applied:
        """See ``Consensus.propose``."""
        data = encode_command(command)
        self._check_usable()
        node = self.node
        trouble = node.disk.problem or node.applier.held
        if trouble is not None:
            await trio.lowlevel.checkpoint()
            raise error_from_info(trouble)
        pending = Pending(
            self._new_request(), command, data, since=node.history.index, tick=node.tick
        )
        self._proposals.add(pending)
        try:
            node.poke()
            with trio.move_on_after(self._seconds):
                await pending.done.wait()
        finally:
            self._proposals.drop(pending.request)
        if pending.outcome is None:
            raise self._too_late(pending)
        if isinstance(pending.outcome, PyAgentError):
            raise pending.outcome
        return pending.outcome

    async def read_barrier(self) -> None:
        """See ``Consensus.read_barrier``."""
        self._check_usable()
        read = self._reads.add(self.node.tick)
        try:
            self.node.poke()
            with trio.move_on_after(self._seconds):
                await read.done.wait()
        finally:
            self._reads.drop(read)
        if read.error is not None:
            raise read.error
        if not read.done.is_set():
            if not self.node.leader:
                raise no_leader(self.members, self.links.peers)
            raise DeadlineExceeded(
                f"The log could not be read up to now within {self._seconds:g} s.",
                code="barrier_timeout",
                remedy="This node may be catching up; try again.",
            )

    def applied(self, after: int) -> AbstractAsyncContextManager[AppliedStream]:
        """See ``Consensus.applied``."""
        return self.node.history.applied(after)

    async def reconfigure(self, voters: frozenset[PeerId], learners: frozenset[PeerId]) -> None:
        """See ``Consensus.reconfigure``."""
        self._check_usable()
        if not self.node.leads:
            await trio.lowlevel.checkpoint()
            raise not_leader()
        await self._be_acquainted(voters | learners)
        change = self._changes.begin(voters, learners)
        try:
            self.node.poke()
            with trio.move_on_after(self._seconds):
                await change.done.wait()
        finally:
            self._changes.drop(change)
        if change.error is not None:
            raise change.error
        if not change.done.is_set():
            raise DeadlineExceeded(
                f"The new voters were not agreed on within {self._seconds:g} s.",
                code="reconfigure_timeout",
                remedy="See which voters are reachable; the change may still complete.",
            )

    async def _be_acquainted(self, peers: frozenset[PeerId]) -> None:
        """Give connected peers a moment to say who they are."""
        with trio.move_on_after(HELLO_SECONDS):
            while (peers & self.links.peers) - self.members.heard.keys():
                await self._news.wait(self.node.timing.tick_seconds)

    async def transfer(self, to: PeerId) -> None:
        """See ``Consensus.transfer``."""
        self._check_usable()
        await self._handovers.transfer(self.node, self.links, to, self._seconds)

    async def compact(self) -> int:
        """See ``Consensus.compact``."""
        self._check_usable()
        try:
            with trio.fail_after(self._seconds):
                return await self.node.compact()
        except trio.TooSlowError:
            raise DeadlineExceeded(
                f"No snapshot was written within {self._seconds:g} s.", code="disk_slow"
            ) from None

    def chain_at(self, index: int) -> bytes | None:
        """See ``Consensus.chain_at``."""
        return self.node.history.chain_at(index)

    def counters(self) -> dict[str, int]:
        """See ``Consensus.counters``."""
        return counted(self.node, self.links)

    # -- what the loop calls (never blocks) -----------------------------------------------------

    def feed(self) -> None:
        """Put what waits into the core."""
        node = self.node
        offers, self._offers = self._offers, []
        for peer, offer, done in offers:
            done()
            if isinstance(offer, Propose):
                self._courier.lead(node, self.links, peer, offer)
            elif node.leads:
                voter = self._courier.role_of(peer) == "voter"
                self._handovers.asked(self.links, peer, offer.to, voter=voter)
        short = int(STILL_NO_LEADER_SECONDS / node.timing.tick_seconds)
        self._courier.place(node, self.links, self._patience, short)
        self._ask_reads()
        if node.leads:
            self._changes.feed(node.core)
            if node.tick % node.timing.election_ticks == 0:
                self._changes.replace_reborn(node.core)

    def changed(self) -> None:
        """Take note of a new term, role, leader or configuration."""
        node = self.node
        self._changes.look()
        place = (node.leader, node.core.term)
        if place != self._place:
            self._place = place
            self._proposals.new_term()
            if not node.leads:
                self._changes.leadership_lost()
            node.poke()
        hello = self.hello()
        if self._said is None or msgspec.structs.replace(hello, last_index=0) != self._said:
            self._said = msgspec.structs.replace(hello, last_index=0)
            self.links.broadcast(hello)
        self._news.tell()

    def applied_one(self, outcome: Outcome) -> None:
        """Take note of an applied command."""
        self._proposals.applied(outcome)

    def installed(self, replica: Replica) -> None:
        """Take note of a snapshot that replaced the state."""
        self._proposals.installed(replica)

    def advanced(self) -> None:
        """Take note that more may be applied than before."""
        self._reads.applied(self.node.history.index)

    def read(self, index: int, context: bytes) -> None:
        """Take the answer to a question."""
        self._reads.answered(context, index)

    def disk_refused(self, error: PyAgentError) -> None:
        """Refuse what waits here; others will elect another leader."""
        self._proposals.fail(error)
        self._reads.fail(error)

    def send(self, to: int, kind: str, data: bytes) -> None:
        """Queue a Raft message for a node; it may get lost."""
        send(self.node, self.links, to, kind, data)

    def _ask_reads(self) -> None:
        node = self.node
        self._reads.expire(node.tick, node.timing.election_ticks // 2 + 1)
        if not node.leader:
            self._reads.starve(node.tick, self._patience, no_leader(self.members, self.links.peers))
        elif self._reads.question_due:
            context = self._new_request()
            try:
                node.core.read_index(context)
            except RaftDropped:  # a new leader: it answers once it has committed something
                return
            self._reads.asked(context, node.tick)

    @property
    def _patience(self) -> int:
        return int(NO_LEADER_SECONDS / self.node.timing.tick_seconds)

    # -- what the streams call ------------------------------------------------------------------

    @property
    def node_id(self) -> int:
        """This node's Raft id."""
        return self.members.me

    def hello(self) -> Hello:
        """Return what this node says of itself."""
        node = self.node
        return Hello(
            self.members.me,
            self._incarnation,
            voter=node.is_voter(),
            last_index=node.history.index,
            leader=node.leader,
            leader_peer=self.members.peer_of(node.leader) if node.leader else None,
        )

    def take_hello(self, peer: PeerId, hello: Hello) -> None:
        """Note what a peer says of itself."""
        self.members.hear(peer, hello)
        self._news.tell()
        self.node.poke()

    def obeys(self, peer: PeerId, hello: Hello) -> bool:
        """Whether everything counts that the node says at present."""
        return self.node.trust(peer, hello) == ALL

    def may_vote(self, peer: PeerId) -> bool:
        """Whether a node's certificate, or the log, lets it vote."""
        return self._courier.may_vote(peer, self.state.members.get(peer))

    def take(
        self,
        peer: PeerId,
        hello: Hello,
        message: raft_links.Inbound,
        done: Callable[[], None],
    ) -> None:
        """Queue what a peer sent."""
        match message:
            case bytes():
                self.node.take(Inbound(peer, hello, message, done))
            case Propose() if self.node.disk.problem is not None:
                done()
                if self.node.leads:
                    self._courier.refuse(
                        self.node,
                        self.links,
                        peer,
                        message.request,
                        error_from_info(self.node.disk.problem),
                    )
            case Propose() | Transfer():
                self._offers.append((peer, message, done))
                self.node.poke()
            case NotTransferred():
                done()
                if peer == self.members.peer_of(self.node.leader):
                    self._handovers.refused(message.to, error_from_info(message.error))
            case Refusal():
                done()
                if peer == self.members.peer_of(self.node.leader):
                    self._proposals.refuse(message.request, message.error)
                    self.node.poke()

    def lost(self, peer: PeerId) -> None:
        """Note that messages to ``peer`` may be lost."""
        for node_id, known in self.members.peers.items():
            if known == peer:
                self.node.lost.add(node_id)
        self.node.poke()

    async def resign(self) -> None:
        """Hand the leadership to whoever is furthest, so that nobody has to miss this node."""
        best = successor(self.status(), self._mesh.peer_id)
        if best is None:
            return
        try:
            await self._handovers.transfer(self.node, self.links, best, RESIGN_SECONDS)
        except PyAgentError as error:
            log.info("the leadership was not handed over: %s", error)

    # -- ends -----------------------------------------------------------------------------------

    def close(self, error: PyAgentError | None = None) -> None:
        """Fail what waits and what comes."""
        self._failure = error or Unavailable("The node is stopping.", code="stopping")
        self._proposals.fail(self._failure)
        self._reads.fail(self._failure)
        self._changes.leadership_lost()
        self.links.close()

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _too_late(self, pending: Pending) -> PyAgentError:
        if not self.node.leader:
            return no_leader(self.members, self.links.peers, unknown=pending.placed is not None)
        return DeadlineExceeded(
            f"The change was not agreed on within {self._seconds:g} s.",
            code="propose_timeout",
            remedy="Look whether the change happened before repeating it.",
        )
