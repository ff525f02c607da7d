"""Which rank moves where: from what is known of the nodes to the next command.  Pure.

:func:`heal` looks at one placement.  A rank whose node is dead, no member any more, cut off from
its neighbour, or fails again and again is given to another node: a standby with the slice loaded
before one that is loading, that before a spare, that before any node with room.  A rank whose node
is being drained moves only to a loaded standby, because it serves until then.  When all ranks are
well, standbys and spares are made up to the number that is wanted; that disturbs no session.

Nothing here acts: the command changes something only once the log has committed it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.types import EXACT_ACTIVATIONS, PeerId, Placement, Rank
from pyagent_node.consensus.commands import (
    DropPrepared,
    SetDrafting,
    SetPlacement,
    SetStandbys,
)
from pyagent_node.inference.pipeline.plan_types import MEMORY_SHARE, ModelShape, NodeFacts
from pyagent_node.inference.pipeline.reserves import ReserveOptions, choose_reserves
from pyagent_node.node.detector import Health
from pyagent_node.node.guessing import choose_drafter_node
from pyagent_node.node.placement_messages import RankReport, ReserveReport

MAX_STREAK: Final = 3
"""Failures of a runner, without a steady run in between, after which its rank moves."""
NOT_READY_SECONDS: Final = 5.0
"""How long a rank whose runner has died may take to come back while a standby is ready."""
CUT_SECONDS: Final = 4.0
"""How long neighbours may not reach each other while a standby of one of them is ready."""
CUT_OFF_SECONDS: Final = 12.0
"""How long at all: then a node that must load the slice first takes one's place."""
"""How long two neighbours may fail to reach each other."""
RESERVE_LOST_SECONDS: Final = 10.0
"""How long the node of a standby may be dead before another one is chosen."""
SETTLE_SECONDS: Final = 2.0
"""Rest after a change before standbys are looked at: sessions go first."""


class Outlook(msgspec.Struct, frozen=True):
    """What is known, as far as one placement is concerned.

    ``good`` are the nodes that may be given work; ``expelled`` those that must not keep any and
    ``draining`` those that shall give theirs away.  ``ranks`` and ``reserves`` are the reports of
    the placement's parts: by rank, and by (node, rank).  ``not_ready`` says for how many seconds a
    rank has not been ready, ``dead_for`` for how long a node was silent, and ``cut`` since how
    many seconds a node cannot reach another one.  ``facts`` and ``shape`` are ``None`` as long as
    they are not known; then only what is there already is used.  ``drafter`` is the shape of the
    model that drafts.  ``settled`` says that nothing
    changed for :data:`SETTLE_SECONDS`.
    """

    health: Mapping[PeerId, Health]
    good: frozenset[PeerId]
    expelled: frozenset[PeerId] = frozenset()
    draining: frozenset[PeerId] = frozenset()
    ranks: Mapping[int, RankReport] = {}
    reserves: Mapping[tuple[PeerId, int], ReserveReport] = {}
    not_ready: Mapping[int, float] = {}
    dead_for: Mapping[PeerId, float] = {}
    cut: Mapping[tuple[PeerId, PeerId], float] = {}
    standbys: int = 0
    spares: int = 0
    facts: Mapping[PeerId, NodeFacts] | None = None
    shape: ModelShape | None = None
    drafter: ModelShape | None = None
    settled: bool = True


class Healing(NamedTuple):
    """What to propose, if anything, why, and what cannot be helped now."""

    command: SetPlacement | SetStandbys | SetDrafting | DropPrepared | None
    reasons: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class _Trouble(NamedTuple):
    reason: str
    patient: bool
    """Whether the rank still serves, so that only a loaded standby is better."""


def heal(placement: Placement, outlook: Outlook) -> Healing:
    """Return the next change of a placement; none when it is well, or cannot be helped."""
    troubles = {
        rank.rank: trouble
        for rank in placement.ranks
        if (trouble := _trouble(placement, rank, outlook)) is not None
    }
    problems: list[str] = []
    if troubles:
        moved, reasons = _moves(placement, outlook, troubles, problems)
        if reasons:
            command = SetPlacement(
                placement.model,
                moved,
                placement.n_ctx,
                placement.n_seq,
                placement.epoch,
                placement.want_standbys,
                placement.want_spares,
                fixed=placement.fixed,
                backends=placement.backends,
                activations=placement.activations,
            )
            return Healing(command, tuple(reasons), tuple(problems))
    if any(not trouble.patient for trouble in troubles.values()):
        return Healing(None, (), tuple(problems))
    return _redraft(placement, outlook, problems) or _reserve(
        placement, outlook, frozenset(troubles), problems
    )


def _redraft(placement: Placement, outlook: Outlook, problems: list[str]) -> Healing | None:
    """Give the drafter rank of a node that is gone, or shall have nothing, to another one.

    Where no other has room, answers do without; a node that is only away keeps the rank then, and
    goes on when it is back.
    """
    drafting = placement.drafting
    peer = drafting.peer_id if drafting is not None else None
    if drafting is None or peer is None:
        return None
    leaves = peer in outlook.expelled | outlook.draining
    lost = outlook.health.get(peer) == "dead"
    lost = lost and outlook.dead_for.get(peer, 0.0) >= RESERVE_LOST_SECONDS
    chosen = _drafter_node(placement, peer, outlook) if leaves or lost else None
    if chosen is not None:
        moved = msgspec.structs.replace(drafting, peer_id=chosen)
        reason = (
            f"the drafter moves to {chosen}: {'its node leaves' if leaves else 'its node is gone'}"
        )
    elif leaves:
        moved = msgspec.structs.replace(drafting, drafter=None, peer_id=None)
        reason = f"{peer} drafts no more: it leaves, or was asked to give its work away"
    else:
        return None
    command = SetDrafting(placement.model, moved, placement.epoch)
    return Healing(command, (reason,), tuple(problems))


def _drafter_node(placement: Placement, before: PeerId, outlook: Outlook) -> PeerId | None:
    """Return the node that guesses soonest for the first rank's, of those that have room."""
    shape, facts = outlook.drafter, outlook.facts
    if shape is None or facts is None or not outlook.settled:
        return None
    able = [
        node
        for peer, node in sorted(facts.items())
        if peer != before and peer in outlook.good and outlook.health.get(peer) == "alive"
    ]
    taken = _pending(placement, outlook, outlook.shape) if outlook.shape is not None else {}
    try:
        return choose_drafter_node(
            shape,
            able,
            {},
            head=placement.ranks[0].peer_id,
            n_ctx=placement.n_ctx,
            n_seq=placement.n_seq,
            taken=taken,
        ).peer_id
    except Unavailable:
        return None


# ---- what is wrong -------------------------------------------------------------------------


def _trouble(placement: Placement, rank: Rank, outlook: Outlook) -> _Trouble | None:
    peer = rank.peer_id
    if outlook.health.get(peer) == "dead":
        return _Trouble("its node is gone", patient=False)
    if peer in outlook.expelled:
        return _Trouble("its node is no member any more", patient=False)
    report = outlook.ranks.get(rank.rank)
    if report is not None and report.streak >= MAX_STREAK:
        return _Trouble(f"its runner failed {report.streak} times in a row", patient=False)
    for seconds, patient in ((CUT_OFF_SECONDS, False), (CUT_SECONDS, True)):
        if peer == _cut_off(placement, rank, outlook, seconds):
            return _Trouble("its node and its neighbour cannot reach each other", patient=patient)
    if (
        report is not None
        and report.failures
        and outlook.not_ready.get(rank.rank, 0.0) >= NOT_READY_SECONDS
    ):
        return _Trouble("its runner does not come back", patient=True)
    if peer in outlook.draining:
        return _Trouble("its node is being drained", patient=True)
    return None


def _cut_off(placement: Placement, rank: Rank, outlook: Outlook, least: float) -> PeerId | None:
    """Return whom to replace of neighbours out of reach for ``least`` seconds, ``rank`` among them.

    It is the one that more nodes of the placement cannot reach, or else the later one.
    """
    peers = [r.peer_id for r in placement.ranks]

    def cut(a: PeerId, b: PeerId) -> bool:
        seconds = max(outlook.cut.get((a, b), 0.0), outlook.cut.get((b, a), 0.0))
        return a != b and seconds >= least

    def misses(peer: PeerId) -> int:
        return sum(cut(peer, other) for other in set(peers))

    for at in (rank.rank - 1, rank.rank):
        if 0 <= at < len(peers) - 1 and cut(peers[at], peers[at + 1]):
            first, second = peers[at], peers[at + 1]
            return first if misses(first) > misses(second) else second
    return None


# ---- moving --------------------------------------------------------------------------------


def _moves(
    placement: Placement,
    outlook: Outlook,
    troubles: Mapping[int, _Trouble],
    problems: list[str],
) -> tuple[tuple[Rank, ...], list[str]]:
    """Return the ranks with those in trouble moved as far as possible, and why."""
    gone = {peer for peer, health in outlook.health.items() if health == "dead"}
    gone |= outlook.expelled
    ranks = list(placement.ranks)
    reasons = []
    promised: Counter[PeerId] = Counter()
    for at, trouble in troubles.items():
        rank = ranks[at]
        chosen = _successor(placement, ranks, rank, outlook, promised, patient=trouble.patient)
        if chosen is None:
            problems.append(_no_successor(rank, trouble, outlook))
            continue
        ranks[at] = msgspec.structs.replace(rank, peer_id=chosen)
        reasons.append(f"rank {at} moves to {chosen}: {trouble.reason}")
    for at, rank in enumerate(ranks):
        away = {rank.peer_id, *gone}
        ranks[at] = msgspec.structs.replace(
            rank,
            standbys=tuple(p for p in rank.standbys if p not in away),
            spares=tuple(p for p in rank.spares if p not in away),
        )
    return tuple(ranks), reasons


def _successor(
    placement: Placement,
    ranks: list[Rank],
    rank: Rank,
    outlook: Outlook,
    promised: Counter[PeerId],
    *,
    patient: bool,
) -> PeerId | None:
    serving = Counter(r.peer_id for r in ranks)

    def order(peer: PeerId) -> tuple[int, PeerId]:
        return serving[peer], peer

    def usable(peer: PeerId) -> bool:
        well = outlook.health.get(peer) == "alive" and peer in outlook.good
        report = outlook.reserves.get((peer, rank.rank))
        broken = report is not None and report.state == "failed"
        return well and not broken and peer != rank.peer_id and _speaks(placement, outlook, peer)

    def ready(peer: PeerId) -> bool:
        report = outlook.reserves.get((peer, rank.rank))
        return report is not None and report.state == "ready"

    standbys = sorted(filter(usable, rank.standbys), key=order)
    spares = sorted(filter(usable, rank.spares), key=order)
    hot = list(filter(ready, standbys))
    if hot or patient:
        return hot[0] if hot else None
    need = _need(placement, rank, outlook)
    facts = outlook.facts or {}

    def fits(peer: PeerId) -> bool:
        node = facts.get(peer)
        if need is None or node is None:
            return False
        return node.usable and node.memory_bytes * MEMORY_SHARE - promised[peer] >= need

    def fits_or_unknown(peer: PeerId) -> bool:
        return fits(peer) or peer not in facts or need is None

    reserves = [*standbys, *filter(ready, spares), *spares]
    others = sorted(
        filter(fits, filter(usable, outlook.good)),
        key=lambda peer: (not facts[peer].willing, order(peer)),
    )
    for peer in (*filter(fits_or_unknown, reserves), *others):
        promised[peer] += need or 0
        return peer
    return None


def _speaks(placement: Placement, outlook: Outlook, peer: PeerId) -> bool:
    """Whether a node knows how activations cross in a placement, as far as that is known."""
    node = (outlook.facts or {}).get(peer)
    exact = placement.crossing == EXACT_ACTIVATIONS
    return exact or node is None or placement.crossing in node.activations


def _need(placement: Placement, rank: Rank, outlook: Outlook) -> int | None:
    if outlook.shape is None:
        return None
    return outlook.shape.needs(rank.slice, n_ctx=placement.n_ctx, n_seq=placement.n_seq)


def _no_successor(rank: Rank, trouble: _Trouble, outlook: Outlook) -> str:
    if trouble.patient and rank.standbys:
        return f"rank {rank.rank} waits for a standby: {trouble.reason}"
    return f"no other node has room for rank {rank.rank}: {trouble.reason}"


# ---- standbys ------------------------------------------------------------------------------


def _reserve(
    placement: Placement, outlook: Outlook, leaving: frozenset[int], problems: list[str]
) -> Healing:
    """Return the change of standbys and spares, if one is due."""
    shape, facts = outlook.shape, outlook.facts
    well = all(
        report is not None and report.state == "ready"
        for report in (outlook.ranks.get(rank.rank) for rank in placement.ranks)
    )
    if shape is None or facts is None or not well or not outlook.settled:
        return Healing(None, (), tuple(problems))

    def kept(peer: PeerId) -> bool:
        lost = outlook.dead_for.get(peer, 0.0) >= RESERVE_LOST_SECONDS
        dead = outlook.health.get(peer) == "dead"
        away = peer in outlook.expelled | outlook.draining or (dead and lost)
        return not away and _speaks(placement, outlook, peer)

    reserves = {p for rank in placement.ranks for p in (*rank.standbys, *rank.spares)}
    options = ReserveOptions(
        n_ctx=placement.n_ctx,
        n_seq=placement.n_seq,
        standbys=_wanted(placement.want_standbys, outlook.standbys),
        spares=_wanted(placement.want_spares, outlook.spares),
        leaving=leaving,
        pending=_pending(placement, outlook, shape),
    )
    able = [
        node
        for peer, node in sorted(facts.items())
        if peer in outlook.good
        and outlook.health.get(peer) == "alive"
        and _speaks(placement, outlook, peer)
    ]
    ranks = choose_reserves(
        shape, placement.ranks, able, options, good=frozenset(filter(kept, reserves))
    )
    if ranks == placement.ranks:
        return Healing(None, (), tuple(problems))
    command = SetStandbys(
        placement.model,
        tuple(rank.standbys for rank in ranks),
        tuple(rank.spares for rank in ranks),
        placement.epoch,
    )
    reasons = tuple(
        f"rank {new.rank} has standbys {_names(new.standbys)} and spares {_names(new.spares)}"
        for old, new in zip(placement.ranks, ranks, strict=True)
        if old != new
    )
    return Healing(command, reasons, tuple(problems))


def _pending(placement: Placement, outlook: Outlook, shape: ModelShape) -> dict[PeerId, int]:
    """Return the memory promised to standbys that are not loaded yet."""
    pending: Counter[PeerId] = Counter()
    for rank in placement.ranks:
        need = shape.needs(rank.slice, n_ctx=placement.n_ctx, n_seq=placement.n_seq)
        for peer in rank.standbys:
            report = outlook.reserves.get((peer, rank.rank))
            if report is None or report.state != "ready":
                pending[peer] += need
    return dict(pending)


def _wanted(own: int | None, setting: int) -> int:
    return setting if own is None else own


def _names(peers: tuple[PeerId, ...]) -> str:
    return ", ".join(peers) or "none"
