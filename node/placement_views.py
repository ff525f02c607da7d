"""The parts of placements as the API shows them, from what their nodes report.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank
from pyagent_node.node.api.schema import (
    DrafterView,
    PreparedView,
    RankState,
    RankView,
    ReserveState,
    ReserveView,
)
from pyagent_node.node.placement_messages import (
    DrafterReport,
    PlacementReports,
    RankReport,
    ReserveReport,
)


def rank_view(rank: Rank, name: str, found: RankReport | None) -> RankView:
    """Return a rank on the node called ``name``."""
    state: RankState = "unknown"
    detail: str | None = "its node has not answered"
    if found is not None:
        state = found.state if found.state in ("ready", "failed") else "loading"
        detail = _detail(found.error, found)
    load = found.load if found is not None else None
    return RankView(
        rank=rank.rank,
        layers=(rank.slice.first, rank.slice.last),
        head=rank.slice.head,
        peer_id=rank.peer_id,
        name=name,
        state=state,
        detail=detail,
        sessions=load.sessions if load is not None else None,
        queued=load.queued if load is not None else None,
        memory_bytes=found.memory_bytes if found is not None else None,
        tokens_per_second=found.tokens_per_second if load is not None and found else None,
        evicted_cells=load.evicted if load is not None else None,
        evicted_bytes=load.evicted_bytes if load is not None else None,
    )


def reserve_of(
    placement: Placement, rank: Rank, peer: PeerId, told: PlacementReports | None
) -> ReserveReport | None:
    """Return the report of a standby or a spare on ``peer``, if it told of one."""
    wanted = (placement.model, rank.slice, peer in rank.standbys)
    for found in told.reserves if told is not None else ():
        if (found.model, found.slice, found.loaded) == wanted:
            return found
    return None


def reserve_view(
    placement: Placement, rank: Rank, peer: PeerId, name: str, told: PlacementReports | None
) -> ReserveView:
    """Return a standby or a spare on the node ``peer``, called ``name``."""
    found = reserve_of(placement, rank, peer, told)
    if found is None:
        return ReserveView(peer_id=peer, name=name, state="unknown", detail="no report of it")
    state: ReserveState = "missing"
    if found.state == "ready":
        state = "hot" if found.loaded else "disk"
    elif found.state != "fetching":
        state = found.state
    return ReserveView(
        peer_id=peer,
        name=name,
        state=state,
        detail=found.error.message if found.error is not None else None,
        memory_bytes=found.memory_bytes,
    )


def _detail(error: ErrorInfo | None, found: RankReport) -> str | None:
    if error is not None:
        return error.message
    if found.state == "fetching":
        return f"fetching, {found.done} of {found.total or '?'} bytes"
    return found.state if found.state != "ready" else None


def prepared_view(
    prepared: Prepared | None,
    reports: Mapping[PeerId, PlacementReports],
    node: Callable[[PeerId], str],
) -> PreparedView | None:
    """Return the next ranks of a placement; ``None`` while no change is under way."""
    if prepared is None:
        return None
    ready = {
        report.rank
        for rank in prepared.ranks
        if (told := reports.get(rank.peer_id)) is not None
        for report in told.prepared
        if (report.model, report.number, report.rank, report.state)
        == (prepared.model, prepared.number, rank.rank, "ready")
    }
    return PreparedView(
        number=prepared.number,
        by=node(prepared.by),
        layers=tuple((rank.slice.first, rank.slice.last) for rank in prepared.ranks),
        nodes=tuple(node(rank.peer_id) for rank in prepared.ranks),
        ready=len(ready),
    )


def drafter_view(
    placement: Placement,
    report: DrafterReport | None,
    model: Callable[[Digest], str],
    node: Callable[[PeerId], str],
) -> DrafterView | None:
    """Return the drafter rank of a placement as the API shows it; ``None`` without one."""
    drafting = placement.drafting
    if drafting is None or drafting.drafter is None or drafting.peer_id is None:
        return None
    state: RankState = "unknown"
    detail: str | None = "its node has not answered"
    if report is not None:
        state = report.state if report.state in ("ready", "failed") else "loading"
        detail = report.error.message if report.error is not None else None
    return DrafterView(
        model=drafting.drafter,
        name=model(drafting.drafter),
        peer_id=drafting.peer_id,
        node=node(drafting.peer_id),
        state=state,
        detail=detail,
        memory_bytes=report.memory_bytes if report is not None else None,
        sessions=report.load.sessions if report is not None else None,
        guesses=report.load.guesses if report is not None else None,
    )
