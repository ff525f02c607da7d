"""How far placements are, over all nodes: for ``status``, and to wait until one is ready."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unsupported,
    error_from_info,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, Drafting, PeerId, Placement, Rank
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.api.schema import (
    PlacementView,
    Progress,
)
from pyagent_node.node.drafts import same_cut
from pyagent_node.node.part_reports import not_hosted
from pyagent_node.node.placement_messages import (
    AskPlacements,
    DrafterReport,
    HeadReport,
    PlacementReports,
    PreparedReport,
    RankReport,
    ReserveReport,
)
from pyagent_node.node.placement_views import (
    drafter_view,
    prepared_view,
    rank_view,
    reserve_view,
)
from pyagent_node.node.rpc import Rpc

logger = logging.getLogger("pyagent_node.placements")

POLL_SECONDS: Final = 0.25
"""How often the nodes are asked while a placement is waited for."""
ASK_SECONDS: Final = 3.0
"""Longest wait for one node's report."""
LOST_SECONDS: Final = 30.0
"""A node that has not answered for so long will not get ready."""
STALL_SECONDS: Final = 600.0
"""A placement of which nothing has moved for so long will not get ready."""
ATTEMPTS: Final = 3
"""Failures of a rank that may pass by themselves, before it is given up."""

_FINAL: Final = (InvalidRequest, Unsupported, CorruptData, LimitExceeded, NotFound)
"""Errors that another attempt does not change."""

Report = Callable[[Progress], None]
Own = Callable[[], PlacementReports]
"""Returns this node's own reports."""


class PlacementBoard:
    """Asks nodes for their reports and puts them together; ``own`` are this node's."""

    def __init__(self, mesh: Mesh, rpc: Rpc, consensus: Consensus, own: Own) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._consensus = consensus
        self._own = own

    def own(self) -> PlacementReports:
        """Return this node's own report."""
        return self._own()

    async def reports(self, peers: Iterable[PeerId]) -> dict[PeerId, PlacementReports]:
        """Return the reports of those of ``peers`` that answer."""
        found: dict[PeerId, PlacementReports] = {}

        async def ask(peer: PeerId) -> None:
            try:
                found[peer], _ = await self._rpc.call(
                    peer, AskPlacements(), PlacementReports, seconds=ASK_SECONDS
                )
            except PyAgentError as error:
                logger.debug("no report from %s: %s", peer, error)

        async with trio.open_nursery() as nursery:
            for peer in set(peers):
                if peer == self._mesh.peer_id:
                    found[peer] = self._own()
                else:
                    nursery.start_soon(ask, peer)
        return found

    async def views(self) -> tuple[PlacementView, ...]:
        """Return every placement with its ranks' states, as ``status`` shows them."""
        placements = list(self._consensus.state.placements.values())
        next_ranks = [r for p in self._consensus.state.prepared.values() for r in p.ranks]
        reports = await self.reports(
            [
                *(peer for placement in placements for peer in _holders(placement)),
                *(rank.peer_id for rank in next_ranks),
            ]
        )
        return tuple(self._view(placement, reports) for placement in placements)

    def _view(self, placement: Placement, reports: dict[PeerId, PlacementReports]) -> PlacementView:
        state = self._consensus.state

        def name(peer: PeerId) -> str:
            member = state.members.get(peer)
            return member.name if member is not None else peer[-8:]

        def model(digest: Digest) -> str:
            known = state.models.get(digest)
            return known.name if known is not None else digest[:12]

        ranks = []
        for rank in placement.ranks:
            view = rank_view(rank, name(rank.peer_id), _report_of(placement, rank, reports))
            ranks.append(
                msgspec.structs.replace(
                    view,
                    standbys=tuple(
                        reserve_view(placement, rank, peer, name(peer), reports.get(peer))
                        for peer in rank.standbys
                    ),
                    spares=tuple(
                        reserve_view(placement, rank, peer, name(peer), reports.get(peer))
                        for peer in rank.spares
                    ),
                )
            )
        drafting = placement.drafting or Drafting()
        return PlacementView(
            model=placement.model,
            name=model(placement.model),
            epoch=placement.epoch,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            ready=all(rank.state == "ready" for rank in ranks),
            ranks=tuple(ranks),
            speculation=drafting.speculation,
            draft_length=drafting.length,
            draft_depth=drafting.depth,
            draft_tree=drafting.tree,
            drafter=drafter_view(placement, _drafter_of(placement, reports), model, name),
            prepared=prepared_view(state.prepared.get(placement.model), reports, name),
            fixed=placement.fixed,
            activations=placement.crossing,
        )

    async def wait_ready(
        self, placement: Placement, report: Report, *, drafter: bool = False
    ) -> Placement:
        """Wait until every rank, and the head on this node, is ready; return what is then placed.

        ``drafter``: until the drafter rank is, too, if there is one.  What is returned has another
        epoch than at first when ranks were moved to other nodes meanwhile.
        Raises the error of a rank that cannot get ready (facts ``rank`` and ``peer_id``),
        :class:`Unavailable` (``peer_lost``) for a node that does not answer, :class:`Conflict`
        (``stale_epoch``) when the model is placed anew meanwhile, and :class:`DeadlineExceeded`.
        """
        heard: dict[PeerId, float] = {}
        moved, last = trio.current_time(), None
        while True:
            current = self._consensus.state.placements.get(placement.model)
            wanted = (placement.ranks, placement.n_ctx, placement.n_seq)
            if current is None or not same_cut(current, *wanted):
                raise Conflict(
                    "The model was unloaded or placed anew meanwhile.", code="stale_epoch"
                )
            placement = current
            drafting = placement.drafting if drafter else None
            guesser = drafting.peer_id if drafting is not None else None
            peers = {rank.peer_id for rank in placement.ranks} | {self._mesh.peer_id}
            if guesser is not None:
                peers.add(guesser)
            started = trio.current_time()
            reports = await self.reports(peers)
            now = trio.current_time()
            for peer in peers:
                heard.setdefault(peer, started)
            heard.update(dict.fromkeys(reports, now))
            ranks = [_report_of(placement, rank, reports) for rank in placement.ranks]
            head = _head_of(placement, reports.get(self._mesh.peer_id))
            for rank, found in zip(placement.ranks, ranks, strict=True):
                if now - heard[rank.peer_id] > LOST_SECONDS:
                    raise not_hosted(f"rank {rank.rank}", rank.peer_id, rank=rank.rank)
                if found is not None:
                    raise_if_final(found, f"Rank {rank.rank} on {rank.peer_id}", rank)
            if head is not None:
                raise_if_final(head, "The head on this node", None)
            if guesser is not None:
                if now - heard[guesser] > LOST_SECONDS:
                    raise not_hosted("the drafter", guesser)
                drafts = _drafter_of(placement, reports)
                if drafts is not None:
                    raise_if_final(drafts, f"The drafter on {guesser}", None)
                parts = [*ranks, drafts]
            else:
                parts = [*ranks]
            ready = [r is not None and r.state == "ready" for r in parts]
            _tell(report, [r for r in (*parts, head) if r is not None], sum(ready), len(parts))
            if all(ready) and head is not None and head.state == "ready":
                return placement
            picture = [(r.state, r.done, r.failures) if r else None for r in (*parts, head)]
            if picture != last:
                moved, last = now, picture
            if now - moved > STALL_SECONDS:
                raise DeadlineExceeded(
                    f"{sum(ready)} of {len(parts)} ranks are ready, and nothing has moved for"
                    f" {STALL_SECONDS:.0f} s.",
                    code="load_stalled",
                    remedy="See the logs of the nodes whose ranks are not ready.",
                )
            await trio.sleep(POLL_SECONDS)

    async def memory(self, placement: Placement) -> dict[PeerId, int]:
        """Return the bytes that runners of ``placement`` take on their nodes."""
        peers = set(_holders(placement))
        used: dict[PeerId, int] = {}
        for peer, told in (await self.reports(peers)).items():
            held: list[RankReport | ReserveReport | DrafterReport]
            held = [*told.ranks, *told.reserves, *told.drafters]
            used[peer] = sum(
                part.memory_bytes or 0 for part in held if part.model == placement.model
            )
        return used

    async def wait_gone(self, placement: Placement) -> None:
        """Wait until no node that answers still holds a part of ``placement``."""
        peers = set(_holders(placement))
        peers.add(self._mesh.peer_id)
        while True:
            reports = await self.reports(peers)
            wanted = (placement.model, placement.epoch)
            ranks = [(r.model, r.epoch) for told in reports.values() for r in told.ranks]
            heads = [(h.model, h.epoch) for told in reports.values() for h in told.heads]
            heads += [(d.model, d.epoch) for told in reports.values() for d in told.drafters]
            leaving = sum(told.leaving for told in reports.values())
            if wanted not in (*ranks, *heads) and not leaving:
                return
            await trio.sleep(POLL_SECONDS)


def _holders(placement: Placement) -> Iterator[PeerId]:
    """Iterate over the nodes that hold a part of a placement."""
    for rank in placement.ranks:
        yield from (rank.peer_id, *rank.standbys, *rank.spares)
    if placement.drafting is not None and placement.drafting.peer_id is not None:
        yield placement.drafting.peer_id


def _drafter_of(
    placement: Placement, reports: Mapping[PeerId, PlacementReports]
) -> DrafterReport | None:
    drafting = placement.drafting
    if drafting is None or drafting.peer_id is None:
        return None
    told = reports.get(drafting.peer_id)
    wanted = (placement.model, placement.epoch, drafting.drafter)
    for found in told.drafters if told is not None else ():
        if (found.model, found.epoch, found.drafter) == wanted:
            return found
    return None


def _report_of(
    placement: Placement, rank: Rank, reports: dict[PeerId, PlacementReports]
) -> RankReport | None:
    told = reports.get(rank.peer_id)
    wanted = (placement.model, placement.epoch, rank.rank)
    for found in told.ranks if told is not None else ():
        if (found.model, found.epoch, found.rank) == wanted:
            return found
    return None


def _head_of(placement: Placement, told: PlacementReports | None) -> HeadReport | None:
    for found in told.heads if told is not None else ():
        if (found.model, found.epoch) == (placement.model, placement.epoch):
            return found
    return None


def raise_if_final(
    found: RankReport | PreparedReport | HeadReport | DrafterReport, who: str, rank: Rank | None
) -> None:
    """Raise the error of a part of ``who`` that another attempt will not cure."""
    if found.state != "failed" or found.error is None:
        return
    error = error_from_info(found.error)
    if not isinstance(error, _FINAL) and found.failures < ATTEMPTS:
        return
    error.message = f"{who} cannot get ready: {error.message}"
    if rank is not None:
        error.facts.update(rank=rank.rank, peer_id=rank.peer_id)
    raise error


def _tell(
    report: Report, parts: list[RankReport | HeadReport | DrafterReport], ready: int, count: int
) -> None:
    fetching = [p for p in parts if p.state == "fetching" and p.total]
    if fetching:
        report(
            Progress(
                step="fetch",
                text="fetching layers from peers",
                done=sum(p.done for p in fetching),
                total=sum(p.total or 0 for p in fetching),
            )
        )
    report(
        Progress(
            step="ready",
            text=f"{ready} of {count} ranks ready",
            done=ready,
            total=count,
            unit="ranks",
        )
    )
