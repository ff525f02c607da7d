"""What commands about models, placements and buckets do to the state.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pyagent_node.base.errors import Conflict, InvalidRequest, NotFound, Refused
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared, Rank
from pyagent_node.consensus.checks import check_rank
from pyagent_node.consensus.cluster import State, holders, refuse_outsiders, room, stale_epoch
from pyagent_node.consensus.commands import (
    DropPrepared,
    ModelRecord,
    PreparePlacement,
    RemovePlacement,
    SetBuckets,
    SetDrafting,
    SetPlacement,
    SetStandbys,
)
from pyagent_node.consensus.member_changes import draining

MAX_MODELS = 1024


def register(state: State, model: ModelRecord) -> State:
    """Make a model known."""
    known = state.models.get(model.digest)
    if known is not None:
        if msgspec.structs.replace(known, created=model.created) == model:
            return state
        raise Conflict(
            f"The model {model.digest[:16]} is known already, as {known.name!r}.",
            code="model_exists",
            remedy=f"Use it by the name {known.name!r}, or remove it first.",
            name=known.name,
        )
    for other in state.models.values():
        if other.name == model.name:
            raise Conflict(
                f"Another model is called {model.name!r}.",
                code="model_name_taken",
                remedy="Choose another name, or remove that model first.",
                digest=other.digest,
            )
    room("models", len(state.models), MAX_MODELS)
    return msgspec.structs.replace(state, models={**state.models, model.digest: model})


def forget(state: State, digest: Digest) -> State:
    """Forget a model that nobody serves."""
    _known_model(state, digest)
    if digest in state.placements:
        raise Conflict(
            f"The model {digest[:16]} is loaded.", code="model_placed", remedy="Unload it first."
        )
    for placement in state.placements.values():
        if placement.drafting is not None and placement.drafting.drafter == digest:
            raise Conflict(
                f"The model {digest[:16]} drafts for {state.models[placement.model].name!r}.",
                code="model_placed",
                remedy="Unload that one, or take its drafter away, first.",
            )
    rest = {key: model for key, model in state.models.items() if key != digest}
    return msgspec.structs.replace(state, models=rest)


def place(state: State, command: SetPlacement) -> State:
    """Give a model its ranks, under the next epoch."""
    model = _known_model(state, command.model)
    _check_epoch(state, command.model, command.after_epoch)
    if command.prepared:
        _check_prepared(state, command.model, command.prepared)
    epoch = state.last_epoch + 1
    old = state.placements.get(command.model)
    placement = Placement(
        command.model,
        epoch,
        command.ranks,
        command.n_ctx,
        command.n_seq,
        command.want_standbys,
        command.want_spares,
        old.drafting if old is not None else None,
        command.fixed,
        command.backends,
        command.activations,
    )
    _check_peers(state, old, placement)
    placement.check(model.n_layers)
    return msgspec.structs.replace(
        state,
        placements={**state.placements, command.model: placement},
        last_epoch=epoch,
        prepared=_without(state, command.model),
    )


def prepare(state: State, command: PreparePlacement) -> State:
    """Note the next ranks of a placed model; its epoch stays."""
    old = _placed(state, command.model)
    _check_epoch(state, command.model, command.after_epoch)
    known = state.prepared.get(command.model)
    if known is not None:
        raise Conflict(
            f"Another change of {state.models[command.model].name!r} is under way.",
            code="change_in_progress",
            remedy="Wait until it is done; 'pyagent-node status' shows it.",
            number=known.number,
            by=known.by,
        )
    number = state.index + 1
    new = Prepared(
        command.model,
        number,
        old.epoch,
        command.ranks,
        command.n_ctx,
        command.n_seq,
        command.by,
        command.backends,
    )
    refuse_outsiders(state, [command.by])
    _check_ranks(state, old.ranks, new.ranks)
    new.check(state.models[command.model].n_layers)
    return msgspec.structs.replace(state, prepared={**state.prepared, command.model: new})


def drop_prepared(state: State, command: DropPrepared) -> State:
    """Give a preparation up."""
    _check_prepared(state, command.model, command.number)
    return msgspec.structs.replace(state, prepared=_without(state, command.model))


def _without(state: State, model: Digest) -> Mapping[Digest, Prepared]:
    if model not in state.prepared:
        return state.prepared
    return {key: each for key, each in state.prepared.items() if key != model}


def _check_prepared(state: State, model: Digest, number: int) -> None:
    known = state.prepared.get(model)
    if known is None or known.number != number:
        raise Conflict(
            f"The change of {model[:16]} that was prepared as number {number} was given up.",
            code="not_prepared",
            remedy="Plan again: a node of it may have left, or somebody else changed the model.",
            number=number,
        )


def set_standbys(state: State, command: SetStandbys) -> State:
    """Say who could take over each rank of a placement; its epoch stays."""
    old = _placed(state, command.model)
    _check_epoch(state, command.model, command.epoch)
    if not len(old.ranks) == len(command.standbys) == len(command.spares):
        raise InvalidRequest(
            f"The placement has {len(old.ranks)} ranks; standbys are named for"
            f" {len(command.standbys)} and spares for {len(command.spares)}.",
            code="bad_placement",
        )
    ranks = tuple(
        msgspec.structs.replace(rank, standbys=standbys, spares=spares)
        for rank, standbys, spares in zip(old.ranks, command.standbys, command.spares, strict=True)
    )
    for rank in ranks:
        check_rank(rank)
    placement = msgspec.structs.replace(old, ranks=ranks)
    _check_peers(state, old, placement)
    return msgspec.structs.replace(state, placements={**state.placements, command.model: placement})


def set_drafting(state: State, command: SetDrafting) -> State:
    """Say how the sessions of a placement guess, and who drafts for them; its epoch stays."""
    old = _placed(state, command.model)
    _check_epoch(state, command.model, command.epoch)
    new = command.drafting
    before = old.drafting.peer_id if old.drafting is not None else None
    if new is not None and new.drafter is not None and new.peer_id is not None:
        _known_model(state, new.drafter)
        refuse_outsiders(state, [new.peer_id])
        if new.peer_id != before:
            _refuse_draining(state, [new.peer_id])
    placement = msgspec.structs.replace(old, drafting=new)
    return msgspec.structs.replace(state, placements={**state.placements, command.model: placement})


def _check_peers(state: State, old: Placement | None, new: Placement) -> None:
    """Refuse nodes that do not belong here, and new work for those that are being drained."""
    _check_ranks(state, old.ranks if old is not None else (), new.ranks)


def _check_ranks(state: State, old: Sequence[Rank], new: Sequence[Rank]) -> None:
    used = holders(new)
    refuse_outsiders(state, sorted(used))
    _refuse_draining(state, sorted(used - holders(old)))


def _refuse_draining(state: State, peers: Sequence[PeerId]) -> None:
    for peer in peers:
        if draining(state, peer):
            raise Refused(
                f"{state.members[peer].name} is being drained: it takes no new work.",
                code="draining",
                remedy="Plan again without it, or end the draining first.",
                peer_id=peer,
            )


def displace(state: State, command: RemovePlacement) -> State:
    """Take a model's placement back."""
    _placed(state, command.model)
    _check_epoch(state, command.model, command.after_epoch)
    rest = {key: p for key, p in state.placements.items() if key != command.model}
    return msgspec.structs.replace(state, placements=rest, prepared=_without(state, command.model))


def set_buckets(state: State, command: SetBuckets) -> State:
    """Say who owns each bucket, under the next bucket epoch."""
    if command.after_epoch != state.bucket_epoch:
        raise stale_epoch("ownership of buckets", command.after_epoch, state.bucket_epoch)
    refuse_outsiders(state, sorted({peer for owners in command.owners for peer in owners}))
    return msgspec.structs.replace(
        state, buckets=command.owners, bucket_epoch=state.bucket_epoch + 1
    )


def _known_model(state: State, digest: Digest) -> ModelRecord:
    model = state.models.get(digest)
    if model is None:
        raise NotFound(f"The mesh knows no model {digest[:16]}.", code="model_not_found")
    return model


def _placed(state: State, digest: Digest) -> Placement:
    placement = state.placements.get(digest)
    if placement is None:
        raise NotFound(
            f"The model {digest[:16]} is not loaded anywhere.", code="placement_not_found"
        )
    return placement


def _check_epoch(state: State, model: Digest, seen: int) -> None:
    placement = state.placements.get(model)
    epoch = placement.epoch if placement is not None else 0
    if seen != epoch:
        raise stale_epoch(f"placement of {model[:16]}", seen, epoch)
