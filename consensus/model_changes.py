"""What commands about models, placements and buckets do to the state.  Pure."""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import Conflict, NotFound, Refused
from pyagent_node.base.types import Digest, PeerId, Placement
from pyagent_node.consensus.cluster import State, refuse_outsiders, room, stale_epoch
from pyagent_node.consensus.commands import (
    ModelRecord,
    RemovePlacement,
    SetBuckets,
    SetPlacement,
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
    rest = {key: model for key, model in state.models.items() if key != digest}
    return msgspec.structs.replace(state, models=rest)


def place(state: State, command: SetPlacement) -> State:
    """Give a model its ranks, under the next epoch."""
    model = _known_model(state, command.model)
    _check_epoch(state, command.model, command.after_epoch)
    epoch = state.last_epoch + 1
    placement = Placement(command.model, epoch, command.ranks, command.n_ctx, command.n_seq)
    used = peers_of(placement)
    refuse_outsiders(state, sorted(used))
    old = state.placements.get(command.model)
    for peer in sorted(used - (peers_of(old) if old is not None else frozenset())):
        if draining(state, peer):
            raise Refused(
                f"{state.members[peer].name} is being drained: it takes no new work.",
                code="draining",
                remedy="Plan again without it, or end the draining first.",
                peer_id=peer,
            )
    placement.check(model.n_layers)
    return msgspec.structs.replace(
        state, placements={**state.placements, command.model: placement}, last_epoch=epoch
    )


def peers_of(placement: Placement) -> frozenset[PeerId]:
    """Return every node that a placement names, whatever for."""
    return frozenset(
        peer for rank in placement.ranks for peer in (rank.peer_id, *rank.standbys, *rank.spares)
    )


def displace(state: State, command: RemovePlacement) -> State:
    """Take a model's placement back."""
    if command.model not in state.placements:
        raise NotFound(
            f"The model {command.model[:16]} is not loaded anywhere.", code="placement_not_found"
        )
    _check_epoch(state, command.model, command.after_epoch)
    rest = {key: p for key, p in state.placements.items() if key != command.model}
    return msgspec.structs.replace(state, placements=rest)


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


def _check_epoch(state: State, model: Digest, seen: int) -> None:
    placement = state.placements.get(model)
    epoch = placement.epoch if placement is not None else 0
    if seen != epoch:
        raise stale_epoch(f"placement of {model[:16]}", seen, epoch)
