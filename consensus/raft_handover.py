"""Handing the leadership over, on whichever node that is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError, Refused
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.raft_changes import Changes, Handover, not_a_voter
from pyagent_node.consensus.raft_members import Members
from pyagent_node.consensus.raft_messages import NotTransferred, Transfer, frame
from pyagent_node.consensus.raft_trouble import no_leader

if TYPE_CHECKING:
    from pyagent_node.consensus.raft_links import Links
    from pyagent_node.consensus.raft_node import RaftNode

log = logging.getLogger("pyagent_node.consensus.raft")


class News:
    """Wakes who waits for a change of leader, term, members or peers."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def tell(self) -> None:
        """Let them look again."""
        self._event.set()
        self._event = trio.Event()

    async def wait(self, seconds: float) -> None:
        """Wait for news, at most ``seconds``."""
        with trio.move_on_after(seconds):
            await self._event.wait()


class Handovers:
    """Asks the leader to hand over, and as the leader hears who asks."""

    def __init__(self, members: Members, changes: Changes, news: News) -> None:
        self._members = members
        self._changes = changes
        self._news = news
        self._refusals: dict[PeerId, PyAgentError] = {}

    async def transfer(self, node: RaftNode, links: Links, to: PeerId, seconds: float) -> None:
        """See ``Consensus.transfer``; asks again once an election timeout."""
        if to not in self._voters():
            await trio.lowlevel.checkpoint()
            raise not_a_voter(to)
        self._refusals.pop(to, None)
        patience = node.timing.election_ticks
        asked = node.tick - patience
        with trio.move_on_after(seconds):
            while self._members.peer_of(node.leader) != to:
                refusal = self._refusals.pop(to, None)
                if refusal is not None:
                    raise refusal
                if node.leader and node.tick - asked >= patience:
                    asked = node.tick
                    self._ask(node, links, to)
                await self._news.wait(node.timing.tick_seconds)
            return
        if not node.leader:
            raise no_leader(self._members, links.peers)
        raise DeadlineExceeded(
            f"{to} did not take the leadership within {seconds:g} s.",
            code="transfer_timeout",
            remedy="See whether it is connected and its log is up to date.",
            peer_id=to,
        )

    def _voters(self) -> tuple[PeerId, ...]:
        return self._members.peers_of(self._members.conf.voters)

    def _ask(self, node: RaftNode, links: Links, to: PeerId) -> None:
        leader = self._members.peer_of(node.leader)
        if node.leads:
            self._changes.hand_over(Handover(to, self._refuser(to)))
            node.poke()
        elif leader is not None:
            links.put(leader, [frame(Transfer(to))])

    def _refuser(self, to: PeerId) -> Callable[[PyAgentError], None]:
        def refuse(error: PyAgentError) -> None:
            self.refused(to, error)

        return refuse

    def refused(self, to: PeerId, error: PyAgentError) -> None:
        """Take the leader's word that it does not hand over to ``to``."""
        if to in self._voters():
            self._refusals[to] = error
            self._news.tell()

    def asked(self, links: Links, peer: PeerId, to: PeerId, *, voter: bool) -> None:
        """Hand the leadership over because ``peer`` asks for it; on the leader."""

        def refuse(error: PyAgentError) -> None:
            log.info("a hand-over that %s asked for was refused: %s", peer, error)
            links.put(peer, [frame(NotTransferred(to, error.to_info()))])

        if voter or peer in self._voters():
            self._changes.hand_over(Handover(to, refuse))
        else:
            refuse(
                Refused(
                    "Only a node with the role voter may say who leads.",
                    code="role_not_allowed",
                    remedy="Ask on a voter.",
                )
            )
