"""Placements that are planned and not proposed yet, and how they differ from what is.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import (
    EXACT_ACTIVATIONS,
    Backends,
    Digest,
    Drafting,
    PeerId,
    Placement,
    Rank,
    Slice,
    backend_of,
)
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.pipeline.plan_speeds import Ability
from pyagent_node.inference.pipeline.plan_types import (
    MEMORY_SHARE,
    ModelShape,
    NodeFacts,
    Plan,
    PlanOptions,
)
from pyagent_node.inference.pipeline.planner import plan
from pyagent_node.inference.pipeline.reserves import ReserveOptions, choose_reserves
from pyagent_node.node.api.placement_schema import PlannedRank, PlanView
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.backend_choice import with_activations
from pyagent_node.node.guessing import describe
from pyagent_node.node.plan_views import planned_nodes
from pyagent_node.node.planning import PROMPT_TOKENS, Swarm

MAX_HEADS: Final = 8
"""Nodes from whose point of view two placements are compared."""
MAX_RESERVES: Final = 4
"""Most standbys, and most spares, that a rank can be given."""


def same_cut(placement: Placement, ranks: Sequence[Rank], n_ctx: int, n_seq: int) -> bool:
    """Whether a placement has these slices and sizes, on whatever nodes."""
    return (
        [rank.slice for rank in placement.ranks] == [rank.slice for rank in ranks]
        and placement.n_ctx == n_ctx
        and placement.n_seq == n_seq
    )


class Draft(msgspec.Struct, frozen=True):
    """A placement that was planned and not proposed yet."""

    record: ModelRecord
    plan: Plan
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    want_standbys: int | None
    want_spares: int | None
    drafting: Drafting | None
    before: Placement | None
    before_seconds: float | None
    names: dict[PeerId, str]
    models: dict[Digest, str]
    lacking: dict[PeerId, int]
    """Bytes that nodes lack to hold the next ranks beside those in force."""
    gain: float | None
    """The share of a token's time that it saves, whichever node asks; ``None`` if unknown."""
    fixed: bool
    """Whether a person chose the cut or the nodes."""
    backends: Backends
    able: dict[PeerId, Ability]
    facts: dict[PeerId, NodeFacts]
    activations: str = ""
    """As in ``Placement``."""


def with_reserves(
    shape: ModelShape,
    ranks: Sequence[Rank],
    swarm: Swarm,
    request: LoadRequest,
    settings: Mapping[str, int],
    *,
    before: Placement | None,
    n_ctx: int,
    n_seq: int,
) -> tuple[Rank, ...]:
    """Return planned ranks with as many standbys and spares as are wanted and fit.

    Nodes that cannot pass activations on as the ranks will are none.
    """
    nodes, _ = with_activations(swarm.nodes, request.activations)
    standbys, spares = request.standbys, request.spares
    pending: dict[PeerId, int] = {}
    for rank in ranks:
        need = shape.needs(rank.slice, n_ctx=n_ctx, n_seq=n_seq)
        pending[rank.peer_id] = pending.get(rank.peer_id, 0) + need
    options = ReserveOptions(
        n_ctx=n_ctx,
        n_seq=n_seq,
        standbys=settings.get("standbys", 0) if standbys is None else standbys,
        spares=settings.get("spares", 0) if spares is None else spares,
        pending=pending,
    )
    known = {rank.slice: rank for rank in before.ranks} if before is not None else {}
    kept = tuple(
        rank
        if (old := known.get(rank.slice)) is None
        else msgspec.structs.replace(
            rank,
            standbys=tuple(p for p in old.standbys if p != rank.peer_id),
            spares=tuple(p for p in old.spares if p != rank.peer_id),
        )
        for rank in ranks
    )
    good = frozenset(node.peer_id for node in nodes)
    return choose_reserves(shape, kept, nodes, options, good=good)


def first_ranks(draft: Draft) -> tuple[Rank, ...]:
    """Return the drafted ranks with only those standbys and spares that have their slice already.

    The others are named when the ranks are ready, so that they do not slow those down.
    """
    known = {rank.slice: rank for rank in draft.before.ranks} if draft.before is not None else {}

    def there(rank: Rank) -> Rank:
        old = known.get(rank.slice)
        loaded = (old.peer_id, *old.standbys) if old is not None else ()
        on_disk = old.spares if old is not None else ()
        return msgspec.structs.replace(
            rank,
            standbys=tuple(p for p in rank.standbys if p in loaded),
            spares=tuple(p for p in rank.spares if p in on_disk),
        )

    return tuple(map(there, draft.ranks))


def lacking(
    shape: ModelShape,
    ranks: Sequence[Rank],
    before: Placement | None,
    free: Mapping[PeerId, int],
    *,
    n_ctx: int,
    n_seq: int,
) -> dict[PeerId, int]:
    """Return the bytes of memory that nodes lack to load new ranks beside what they hold.

    ``free`` are the bytes that nodes can give beside the placement as it is.  A slice that a node
    has loaded with these sizes already, for a rank or as a standby, is not loaded again.
    """
    if before is None:
        return {}
    same_sizes = (before.n_ctx, before.n_seq) == (n_ctx, n_seq)
    loaded = {
        (peer, rank.slice)
        for rank in before.ranks
        for peer in (rank.peer_id, *rank.standbys)
        if same_sizes
    }
    needs: dict[PeerId, int] = {}
    for rank in ranks:
        if (rank.peer_id, rank.slice) not in loaded:
            need = shape.needs(rank.slice, n_ctx=n_ctx, n_seq=n_seq)
            needs[rank.peer_id] = needs.get(rank.peer_id, 0) + need
    return {
        peer: need - int(free.get(peer, 0) * MEMORY_SHARE)
        for peer, need in needs.items()
        if need > free.get(peer, 0) * MEMORY_SHARE
    }


def switching(draft: Draft) -> str:
    """Say how a draft comes into force: at once, or with a pause, where and why."""
    before = draft.before
    if before is None or same(draft):
        return ""
    if not draft.lacking:
        return "new slices are loaded beside those in force; answers go on meanwhile"
    short = ", ".join(
        f"{draft.names.get(peer, peer[-8:])} lacks {-(-size // MIB)} MiB"
        for peer, size in sorted(draft.lacking.items())
    )
    return (
        f"{short} to hold the new slices beside the old: answers pause while they are loaded;"
        " free memory there, choose other nodes, or place in smaller steps to avoid that"
    )


def token_seconds(
    shape: ModelShape, before: Placement | None, swarm: Swarm, head: PeerId
) -> float | None:
    """Return what a token costs in the placement as it is, by the same measure."""
    now = _judged(shape, before, swarm, head)
    return now.token_seconds if now is not None else None


def _judged(shape: ModelShape, before: Placement | None, swarm: Swarm, head: PeerId) -> Plan | None:
    """Return a placement as a plan; ``None`` where a node is away or short of memory."""
    if before is None:
        return None
    options = PlanOptions(
        n_ctx=1,
        n_seq=1,
        boundaries=tuple(rank.slice.last for rank in before.ranks[:-1]),
        nodes=tuple(rank.peer_id for rank in before.ranks),
        prompt_tokens=PROMPT_TOKENS,
    )
    try:
        return plan(shape, swarm.nodes, swarm.rtt_ms, options, head=head)
    except PyAgentError:
        return None


def gain(
    shape: ModelShape, before: Placement | None, ranks: Sequence[Rank], swarm: Swarm
) -> float | None:
    """Return the share of a token's time that new ranks save at least, whichever node asks.

    Prompts and what nodes wish to count for are weighed as in planning.
    """
    if before is None:
        return None
    after = msgspec.structs.replace(before, ranks=tuple(ranks))
    least: float | None = None
    for node in swarm.nodes[:MAX_HEADS]:
        now = _judged(shape, before, swarm, node.peer_id)
        then = _judged(shape, after, swarm, node.peer_id)
        if now is None or then is None or now.weighed_seconds <= 0:
            return None
        saved = 1 - then.weighed_seconds / now.weighed_seconds
        least = saved if least is None else min(least, saved)
    return least


def slowed(swarm: Swarm, slowness: Mapping[PeerId, float]) -> Swarm:
    """Return the swarm with what nodes really do instead of what they say."""
    nodes = [
        msgspec.structs.replace(
            node,
            bandwidth=node.bandwidth / slowness.get(node.peer_id, 1.0),
            compute=node.compute / slowness.get(node.peer_id, 1.0),
            head_bandwidth=node.head_bandwidth / slowness.get(node.peer_id, 1.0),
            prompt_compute=node.prompt_compute / slowness.get(node.peer_id, 1.0),
        )
        for node in swarm.nodes
    ]
    return Swarm(nodes, swarm.rtt_ms)


def chooses(request: LoadRequest) -> bool:
    """Whether the request says how the model is to be placed."""
    chosen = (request.ranks, request.layers, request.nodes, request.n_ctx, request.n_seq)
    more = (request.standbys, request.spares, request.backend, request.activations)
    return any(value is not None for value in (*chosen, *more))


def as_it_is(request: LoadRequest, current: Placement | None) -> LoadRequest:
    """Return the request with the sizes of the placement where it names none."""
    if current is None:
        return request
    return msgspec.structs.replace(
        request,
        n_ctx=current.n_ctx if request.n_ctx is None else request.n_ctx,
        n_seq=current.n_seq if request.n_seq is None else request.n_seq,
        standbys=current.want_standbys if request.standbys is None else request.standbys,
        spares=current.want_spares if request.spares is None else request.spares,
        backend=_said(current.backends) if request.backend is None else request.backend,
        activations=current.crossing if request.activations is None else request.activations,
    )


def _said(backends: Backends) -> str | None:
    """Return what a request has to say so that a placement's backends stay."""
    return ",".join(f"{peer}={name}" for peer, name in backends) or None


def check_reserves(request: LoadRequest) -> None:
    """Raise :class:`InvalidRequest` (``bad_parameter``) for numbers that cannot be."""
    for name, value in (("standbys", request.standbys), ("spares", request.spares)):
        if value is not None and not 0 <= value <= MAX_RESERVES:
            raise InvalidRequest(
                f"{name} is {value}; a rank can have 0 to {MAX_RESERVES}.",
                code="bad_parameter",
                parameter=name,
            )


def same(draft: Draft) -> bool:
    """Whether the ranks stay where they are."""
    before = draft.before
    if before is None or not same_cut(before, draft.ranks, draft.n_ctx, draft.n_seq):
        return False
    wanted = (before.want_standbys, before.want_spares)
    peers = [rank.peer_id for rank in before.ranks]
    if any(backend_of(before.backends, p) != backend_of(draft.backends, p) for p in peers):
        return False
    if before.activations != draft.activations:
        return False
    return wanted == (draft.want_standbys, draft.want_spares) and peers == [
        rank.peer_id for rank in draft.ranks
    ]


def plan_view(draft: Draft) -> PlanView:
    """Return the draft as the API shows it."""

    def name(peer: PeerId) -> str:
        return draft.names.get(peer, peer[-8:])

    return PlanView(
        model=draft.record.digest,
        name=draft.record.name,
        epoch=draft.before.epoch if draft.before is not None else None,
        n_ctx=draft.n_ctx,
        n_seq=draft.n_seq,
        token_seconds=draft.plan.token_seconds,
        token_seconds_now=draft.before_seconds,
        ranks=tuple(
            PlannedRank(
                rank=rank.rank,
                layers=(rank.slice.first, rank.slice.last),
                head=rank.slice.head,
                peer_id=rank.peer_id,
                name=name(rank.peer_id),
                standbys=tuple(map(name, rank.standbys)),
                spares=tuple(map(name, rank.spares)),
            )
            for rank in draft.ranks
        ),
        changes=tuple(_changes(draft, name)),
        explanation=draft.plan.explanation,
        guessing=describe(draft.drafting, lambda digest: _model(draft, digest), name),
        switch=switching(draft),
        prompt_seconds=draft.plan.prompt_seconds,
        nodes=planned_nodes(draft.plan, draft.facts, draft.able),
    )


def _model(draft: Draft, digest: Digest) -> str:
    return draft.models.get(digest, digest[:12])


def _layers(part: Slice) -> str:
    """Return a slice as tables show it: first and last layer."""
    return f"{part.first}-{part.last - 1}{' + head' if part.head else ''}"


def _changes(draft: Draft, name: Callable[[PeerId], str]) -> list[str]:
    """Say what would be different."""
    before = draft.before
    if before is None:
        return ["the model is not loaded: it would be"]
    lines = []
    if before.drafting != draft.drafting:
        guessing = describe(draft.drafting, lambda digest: _model(draft, digest), name)
        lines.append(f"guessing: {guessing}")
    if (before.n_ctx, before.n_seq) != (draft.n_ctx, draft.n_seq):
        lines.append(f"{draft.n_seq} sessions of {draft.n_ctx} tokens")
    if before.activations != draft.activations:
        lines.append(f"activations cross in {draft.activations or EXACT_ACTIVATIONS}")
    old = {rank.slice: rank for rank in before.ranks}
    for rank in draft.ranks:
        was, layers = old.get(rank.slice), _layers(rank.slice)
        if was is None:
            lines.append(f"layers {layers} are cut anew, for {name(rank.peer_id)}")
            continue
        if was.peer_id != rank.peer_id:
            lines.append(f"layers {layers} move from {name(was.peer_id)} to {name(rank.peer_id)}")
        now_with = backend_of(draft.backends, rank.peer_id)
        if backend_of(before.backends, was.peer_id) != now_with:
            lines.append(f"layers {layers} are computed with: {now_with}")
        for what, now, then in (
            ("standbys", rank.standbys, was.standbys),
            ("spares", rank.spares, was.spares),
        ):
            if now != then:
                names = ", ".join(map(name, now)) or "none"
                lines.append(f"{what} of layers {layers}: {names}")
    return lines
