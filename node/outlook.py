"""Puts together what the leader knows of a placement, from reports and the detector.  Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import Digest, Drafting, PeerId, Placement
from pyagent_node.consensus.port import ClusterState
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.node.detector import PAUSE_SECONDS, Detector
from pyagent_node.node.placement_messages import PlacementReports, RankReport, ReserveReport
from pyagent_node.node.replacement import SETTLE_SECONDS, Outlook


class _Rest(NamedTuple):
    """Since when a placement has been as it is, all its ranks ready."""

    epoch: int
    since: float


class Sight:
    """What the leader was told, and since when it has been so."""

    def __init__(self, me: PeerId) -> None:
        self.me = me
        self.told: dict[PeerId, PlacementReports] = {}
        self.shapes: dict[Digest, ModelShape | None] = {}
        self.facts: dict[Digest, Mapping[PeerId, NodeFacts]] = {}
        self._not_ready: dict[tuple[Digest, int], tuple[int, float]] = {}
        self._rests: dict[Digest, _Rest] = {}

    def take(self, peer: PeerId, told: PlacementReports) -> None:
        """Take a node's reports."""
        self.told[peer] = told

    def forget(self, peer: PeerId) -> None:
        """Forget a node that holds nothing any more."""
        self.told.pop(peer, None)

    def ranks(self, placement: Placement) -> dict[int, RankReport]:
        """Return the reports of the ranks of a placement, as their own nodes tell them."""
        found: dict[int, RankReport] = {}
        for rank in placement.ranks:
            told = self.told.get(rank.peer_id)
            for report in told.ranks if told is not None else ():
                where = (report.model, report.epoch, report.rank)
                if where == (placement.model, placement.epoch, rank.rank):
                    found[rank.rank] = report
        return found

    def reserves(self, placement: Placement) -> dict[tuple[PeerId, int], ReserveReport]:
        """Return the reports of standbys and spares, by node and rank."""
        found: dict[tuple[PeerId, int], ReserveReport] = {}
        for rank in placement.ranks:
            for peer in (*rank.standbys, *rank.spares):
                told = self.told.get(peer)
                for report in told.reserves if told is not None else ():
                    # Of whatever epoch: what is loaded stays loaded from one to the next.
                    where = (report.model, report.slice, report.loaded)
                    if where == (placement.model, rank.slice, peer in rank.standbys):
                        found[peer, rank.rank] = report
        return found

    def note(self, placement: Placement, now: float) -> None:
        """Note since when ranks have not been ready, and the placement has been at rest."""
        told = self.ranks(placement)
        restless = False
        for rank in placement.ranks:
            key = (placement.model, rank.rank)
            report = told.get(rank.rank)
            if report is not None and report.state == "ready":
                self._not_ready.pop(key, None)
                continue
            restless = True
            before = self._not_ready.get(key)
            if before is None or before[0] != placement.epoch:
                self._not_ready[key] = (placement.epoch, now)
        rest = self._rests.get(placement.model)
        if restless or rest is None or rest.epoch != placement.epoch:
            self._rests[placement.model] = _Rest(placement.epoch, now)

    def not_ready(self, placement: Placement, now: float) -> dict[int, float]:
        """Return for how long each rank that is not ready has not been."""
        return {
            rank: now - since
            for (model, rank), (epoch, since) in self._not_ready.items()
            if (model, epoch) == (placement.model, placement.epoch)
        }

    def settled(self, placement: Placement, now: float) -> bool:
        """Whether nothing changed for a while."""
        rest = self._rests.get(placement.model)
        return (
            rest is not None
            and rest.epoch == placement.epoch
            and now - rest.since >= SETTLE_SECONDS
        )


def outlook_of(
    placement: Placement,
    state: ClusterState,
    sight: Sight,
    detector: Detector,
    peers: Iterable[PeerInfo],
    *,
    now: float,
) -> Outlook:
    """Return what is known as far as ``placement`` is concerned."""
    named = {
        peer for rank in placement.ranks for peer in (rank.peer_id, *rank.standbys, *rank.spares)
    }
    drafting = placement.drafting
    if drafting is not None and drafting.peer_id is not None:
        named.add(drafting.peer_id)
    present = {peer.peer_id for peer in peers if peer.role != "client"} | {sight.me}
    members = state.members.values()
    expelled = frozenset(
        m.peer_id for m in members if m.revoked is not None or m.removed_at is not None
    )
    draining = frozenset(m.peer_id for m in members if m.draining)
    everyone = named | present

    def here(peer: PeerId) -> float:
        return math.inf if peer == sight.me else detector.connected_for(peer, now)

    # Two that lost each other because one of them was away are given time to find each other.
    cut = {
        (told, other): min(seconds, here(told), here(other))
        for told in {rank.peer_id for rank in placement.ranks} & sight.told.keys() - {sight.me}
        for other, seconds in sight.told[told].cut.items()
    } | _out_of_my_reach(placement, sight, detector, now)
    return Outlook(
        health={p: "alive" if p == sight.me else detector.health(p, now) for p in everyone},
        good=frozenset(present) - expelled - draining,
        expelled=expelled,
        draining=draining,
        ranks=sight.ranks(placement),
        reserves=sight.reserves(placement),
        not_ready=sight.not_ready(placement, now),
        dead_for={p: detector.silent_for(p, now) for p in named - {sight.me}},
        cut=cut,
        standbys=state.settings.get("standbys", 0),
        spares=state.settings.get("spares", 0),
        facts=sight.facts.get(placement.model),
        shape=sight.shapes.get(placement.model),
        drafter=_drafter_shape(drafting, sight),
        settled=placement.model not in state.prepared and sight.settled(placement, now),
    )


def _drafter_shape(drafting: Drafting | None, sight: Sight) -> ModelShape | None:
    if drafting is None or drafting.drafter is None:
        return None
    return sight.shapes.get(drafting.drafter)


def _out_of_my_reach(
    placement: Placement, sight: Sight, detector: Detector, now: float
) -> dict[tuple[PeerId, PeerId], float]:
    """Return the leader's own neighbours that it does not hear, and for how long.

    Others may hear them, so that they are not dead; but frames do not pass.
    """
    own = sight.told.get(sight.me)
    found: dict[tuple[PeerId, PeerId], float] = {}
    for pair in itertools.pairwise(rank.peer_id for rank in placement.ranks):
        if sight.me not in pair or pair[0] == pair[1]:
            continue
        other = pair[1] if pair[0] == sight.me else pair[0]
        lost = own.cut.get(other, 0.0) if own is not None else 0.0
        silent = detector.silent_for(other, now) - PAUSE_SECONDS
        if max(lost, silent) > 0:
            found[sight.me, other] = max(lost, silent)
    return found
