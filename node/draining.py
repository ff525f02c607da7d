"""Takes a node's work away, so that it can leave."""

from __future__ import annotations

import logging
from typing import Final

import trio

from pyagent_node.base.errors import InvalidRequest, NotFound, PyAgentError, Unavailable
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import SetDraining
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.api.placement_schema import DrainReply
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.placement_board import PlacementBoard, Report

logger = logging.getLogger("pyagent_node.placements")

POLL_SECONDS: Final = 0.25
STALL_SECONDS: Final = 60.0
"""How long a drain may get no further before it is reported as stuck."""


def find_member(consensus: Consensus, name: str) -> PeerId:
    """Return the member with this name or peer id.

    Raises :class:`NotFound` (``member_not_found``), :class:`InvalidRequest` (``ambiguous_node``).
    """
    members = consensus.state.members.values()
    present = [m for m in members if m.revoked is None and m.removed_at is None]
    found = [m.peer_id for m in present if name in (m.peer_id, m.name)]
    if not found:
        raise NotFound(
            f"The mesh has no member {name[:80]!r}.",
            code="member_not_found",
            remedy="See 'pyagent-node member list'.",
        )
    if len(found) > 1:
        raise InvalidRequest(
            f"{name[:80]!r} names {len(found)} members.",
            code="ambiguous_node",
            remedy="Use a peer id.",
        )
    return found[0]


async def drain(
    consensus: Consensus, board: PlacementBoard, name: str, *, undo: bool, report: Report
) -> DrainReply:
    """Give a node no new work, and wait until it has none left; or let it work again (``undo``).

    Its ranks move to standbys once those are loaded, so that sessions hardly notice.  What was
    begun goes on when the caller stops waiting.  Raises as :func:`find_member` and ``propose`` do,
    and :class:`Unavailable` (``cannot_drain``) when nobody can take over what is left.
    """
    peer = find_member(consensus, name)
    member = consensus.state.members[peer]
    if member.draining is undo:
        await consensus.propose(SetDraining(peer, not undo))
    if undo:
        return DrainReply(peer_id=peer, name=member.name, draining=False)
    await _until_idle(consensus, board, peer, member.name, report)
    return DrainReply(peer_id=peer, name=member.name, draining=True)


async def _until_idle(
    consensus: Consensus, board: PlacementBoard, peer: PeerId, name: str, report: Report
) -> None:
    last, moved = -1, trio.current_time()
    while True:
        if not consensus.state.members[peer].draining:
            raise Unavailable(f"The draining of {name} was undone meanwhile.", code="drain_undone")
        left = _parts(consensus, peer)
        if left != last:
            last, moved = left, trio.current_time()
        report(Progress(step="drain", text=f"{left} parts left on {name}", unit="parts"))
        if not left:
            return
        if trio.current_time() - moved > STALL_SECONDS:
            problems = await _problems(consensus, board)
            raise Unavailable(
                f"{name} still has {left} parts of models to give away."
                + "".join(f" {problem[0].upper()}{problem[1:]}." for problem in problems),
                code="cannot_drain",
                remedy="Add a node, free memory on another one, or unload a model; draining goes"
                f" on meanwhile. 'pyagent-node placement drain {name} --undo' gives it up.",
                left=left,
            )
        await trio.sleep(POLL_SECONDS)


def _parts(consensus: Consensus, peer: PeerId) -> int:
    """Return how many ranks, standbys, spares and drafters a node holds."""
    placements = consensus.state.placements.values()
    return sum(
        peer in (rank.peer_id, *rank.standbys, *rank.spares)
        for placement in placements
        for rank in placement.ranks
    ) + sum(
        placement.drafting is not None and placement.drafting.peer_id == peer
        for placement in placements
    )


async def _problems(consensus: Consensus, board: PlacementBoard) -> list[str]:
    """Return what the leader says is in the way."""
    leader = consensus.status().leader
    if leader is None:
        return ["no leader can be reached, so nothing can be moved"]
    try:
        told = (await board.reports([leader])).get(leader)
    except PyAgentError as error:
        return [str(error)]
    return [line for lines in told.problems.values() for line in lines] if told else []
