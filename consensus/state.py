"""The replicated state machine: a pure function from state and command to state.

Every node applies the same commands in the same order and so reaches the same state, byte for
byte.  Nothing here reads a clock, a file or a random number; a command brings all it needs.
A :class:`State` is never changed: :func:`apply` returns another one that shares what is equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    ErrorInfo,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unsupported,
)
from pyagent_node.base.types import Digest, PeerId, Placement
from pyagent_node.consensus.checks import check_command
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    Command,
    ForgetModel,
    ModelRecord,
    RegisterModel,
    RemovePlacement,
    RevokeMember,
    SetPlacement,
)
from pyagent_node.consensus.port import MemberRecord

MAX_MEMBERS = 4096
MAX_MODELS = 1024
MAX_BURNT = 16_384
FORGET_BURNT_AFTER = 86_400
"""Seconds past its expiry after which a burnt ticket is forgotten (it can do no harm then)."""

SNAPSHOT_MAGIC = b"pyagent-state\0"
SNAPSHOT_VERSION: Final = 1


class Burn(msgspec.Struct, frozen=True):
    """Who redeemed a ticket, and when the ticket itself expires (Unix seconds)."""

    peer_id: PeerId
    expires: int


class State(msgspec.Struct, frozen=True):
    """The state after ``index`` entries; implements ``ClusterState``.

    ``last_epoch`` is the highest epoch ever given; epochs are never given twice.
    """

    index: int = 0
    members: Mapping[PeerId, MemberRecord] = {}
    burnt: Mapping[str, Burn] = {}
    models: Mapping[Digest, ModelRecord] = {}
    placements: Mapping[Digest, Placement] = {}
    last_epoch: int = 0

    @property
    def burnt_tickets(self) -> Mapping[str, PeerId]:
        """Ticket ids that were redeemed, with who did."""
        return {ticket: burn.peer_id for ticket, burn in self.burnt.items()}


def apply(state: State, command: Command) -> tuple[State, ErrorInfo | None]:
    """Return the state after ``command`` and the error that refused it, if one did.

    The index grows by one either way.  A refused command changes nothing else.
    """
    try:
        after = _step(state, command)
    except PyAgentError as error:
        return msgspec.structs.replace(state, index=state.index + 1), error.to_info()
    return msgspec.structs.replace(after, index=state.index + 1), None


def _step(state: State, command: Command) -> State:
    check_command(command)
    match command:
        case AdmitMember():
            return _admit(state, command)
        case RevokeMember():
            return _revoke(state, command)
        case BurnTicket():
            return _burn(state, command)
        case RegisterModel():
            return _register(state, command.model)
        case ForgetModel():
            return _forget(state, command.digest)
        case SetPlacement():
            return _place(state, command)
        case RemovePlacement():
            return _displace(state, command)


def _admit(state: State, command: AdmitMember) -> State:
    known = state.members.get(command.peer_id)
    if known is not None and known.revoked is not None:
        raise _revoked(command.peer_id)
    if known is None:
        _room("members", len(state.members), MAX_MEMBERS)
    for other in state.members.values():
        if other.name == command.name and other.peer_id != command.peer_id and not other.revoked:
            raise Conflict(
                f"Another member is called {command.name!r}.",
                code="member_name_taken",
                remedy="Choose another name (setting `name`).",
                peer_id=other.peer_id,
            )
    record = MemberRecord(command.peer_id, command.name, command.role, command.certificate)
    return msgspec.structs.replace(state, members={**state.members, command.peer_id: record})


def _revoke(state: State, command: RevokeMember) -> State:
    known = state.members.get(command.peer_id)
    if known is None:
        raise NotFound(f"{command.peer_id} is not a member.", code="member_not_found")
    if known.revoked is not None:
        return state
    record = msgspec.structs.replace(known, revoked=command.reason)
    return msgspec.structs.replace(state, members={**state.members, command.peer_id: record})


def _burn(state: State, command: BurnTicket) -> State:
    known = state.burnt.get(command.ticket_id)
    if known is not None:
        if known.peer_id == command.peer_id:
            return state
        raise Refused(
            "The ticket was used already, by another node.",
            code="ticket_used",
            remedy="A ticket admits one node: ask for another one.",
        )
    horizon = command.at - FORGET_BURNT_AFTER
    kept = {ticket: burn for ticket, burn in state.burnt.items() if burn.expires >= horizon}
    _room("burnt tickets", len(kept), MAX_BURNT)
    kept[command.ticket_id] = Burn(command.peer_id, command.expires)
    return msgspec.structs.replace(state, burnt=kept)


def _register(state: State, model: ModelRecord) -> State:
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
    _room("models", len(state.models), MAX_MODELS)
    return msgspec.structs.replace(state, models={**state.models, model.digest: model})


def _forget(state: State, digest: Digest) -> State:
    _known_model(state, digest)
    if digest in state.placements:
        raise Conflict(
            f"The model {digest[:16]} is loaded.", code="model_placed", remedy="Unload it first."
        )
    rest = {key: model for key, model in state.models.items() if key != digest}
    return msgspec.structs.replace(state, models=rest)


def _place(state: State, command: SetPlacement) -> State:
    model = _known_model(state, command.model)
    _check_epoch(state, command.model, command.after_epoch)
    for rank in command.ranks:
        for peer in (rank.peer_id, *rank.standbys):
            member = state.members.get(peer)
            if member is not None and member.revoked is not None:
                raise _revoked(peer)
    epoch = state.last_epoch + 1
    placement = Placement(command.model, epoch, command.ranks, command.n_ctx, command.n_seq)
    placement.check(model.n_layers)
    return msgspec.structs.replace(
        state, placements={**state.placements, command.model: placement}, last_epoch=epoch
    )


def _displace(state: State, command: RemovePlacement) -> State:
    if command.model not in state.placements:
        raise NotFound(
            f"The model {command.model[:16]} is not loaded anywhere.", code="placement_not_found"
        )
    _check_epoch(state, command.model, command.after_epoch)
    rest = {key: p for key, p in state.placements.items() if key != command.model}
    return msgspec.structs.replace(state, placements=rest)


def _known_model(state: State, digest: Digest) -> ModelRecord:
    model = state.models.get(digest)
    if model is None:
        raise NotFound(f"The mesh knows no model {digest[:16]}.", code="model_not_found")
    return model


def _check_epoch(state: State, model: Digest, seen: int) -> None:
    placement = state.placements.get(model)
    epoch = placement.epoch if placement is not None else 0
    if seen != epoch:
        raise Conflict(
            f"The placement of {model[:16]} changed: its epoch is {epoch}, not {seen}.",
            code="stale_epoch",
            remedy="Look at the placement again and repeat the change if it still makes sense.",
            epoch=epoch,
        )


def _room(what: str, count: int, limit: int) -> None:
    if count >= limit:
        raise LimitExceeded(
            f"The mesh holds {limit} {what}, which is the most it can.",
            code="state_full",
            limit=limit,
        )


def _revoked(peer: PeerId) -> Refused:
    return Refused(
        f"The membership of {peer} was revoked.",
        code="revoked",
        remedy="A revoked node needs a new identity and a new invitation.",
        peer_id=peer,
    )


def check_invariants(state: State) -> None:
    """Raise :class:`CorruptData` (``broken_invariant``) if ``state`` could not have been reached.

    Maps are keyed by what their values name; a placed model is known and fully covered; epochs
    are distinct and at most ``last_epoch``; names of live members and of models are distinct.
    """
    epochs = [p.epoch for p in state.placements.values()]
    live = [m.name for m in state.members.values() if m.revoked is None]
    names = [m.name for m in state.models.values()]
    good = (
        state.index >= state.last_epoch >= 0
        and all(key == m.peer_id for key, m in state.members.items())
        and all(key == m.digest for key, m in state.models.items())
        and all(key == p.model and key in state.models for key, p in state.placements.items())
        and all(0 < epoch <= state.last_epoch for epoch in epochs)
        and len(set(epochs)) == len(epochs)
        and len(set(live)) == len(live)
        and len(set(names)) == len(names)
    )
    if not good:
        raise CorruptData(
            "The replicated state contradicts itself.",
            code="broken_invariant",
            remedy="Report this with the log directory of the mesh.",
        )
    for key, placement in state.placements.items():
        placement.check(state.models[key].n_layers)


class _SnapshotV1(msgspec.Struct, frozen=True):
    version: Literal[1]
    index: int
    members: list[MemberRecord]
    burnt: dict[str, Burn]
    models: list[ModelRecord]
    placements: list[Placement]
    last_epoch: int


_encoder = msgspec.msgpack.Encoder(order="deterministic")


def encode_snapshot(state: State) -> bytes:
    """Return ``state`` as bytes: equal states, equal bytes, in whatever order they were reached."""
    return SNAPSHOT_MAGIC + _encoder.encode(
        _SnapshotV1(
            version=SNAPSHOT_VERSION,
            index=state.index,
            members=sorted(state.members.values(), key=lambda m: m.peer_id),
            burnt=dict(state.burnt),
            models=sorted(state.models.values(), key=lambda m: m.digest),
            placements=sorted(state.placements.values(), key=lambda p: p.model),
            last_epoch=state.last_epoch,
        )
    )


class _VersionOnly(msgspec.Struct):
    version: int


def decode_snapshot(data: bytes | memoryview) -> State:
    """Return the state in a snapshot of this or any earlier version.

    Raises :class:`Unsupported` (``snapshot_version``) for a later one and :class:`CorruptData`
    (``bad_snapshot``) for anything else that is wrong.
    """
    try:
        if bytes(data[: len(SNAPSHOT_MAGIC)]) != SNAPSHOT_MAGIC:
            raise ValueError("it does not begin like one")
        body = memoryview(data)[len(SNAPSHOT_MAGIC) :]
        version = msgspec.msgpack.decode(body, type=_VersionOnly).version
        if version > SNAPSHOT_VERSION:
            raise Unsupported(
                f"The snapshot is of version {version}; this program knows {SNAPSHOT_VERSION}.",
                code="snapshot_version",
                remedy="Upgrade pyagent-node on this machine.",
                version=version,
            )
        raw = msgspec.msgpack.decode(body, type=_SnapshotV1)
        state = State(
            index=raw.index,
            members={m.peer_id: m for m in raw.members},
            burnt=raw.burnt,
            models={m.digest: m for m in raw.models},
            placements={p.model: p for p in raw.placements},
            last_epoch=raw.last_epoch,
        )
        check_invariants(state)
    except (msgspec.DecodeError, ValueError, RecursionError, InvalidRequest, CorruptData) as error:
        raise CorruptData(
            f"A snapshot of the replicated state is damaged: {str(error)[:200]}.",
            code="bad_snapshot",
            remedy="Remove it on a node that follows; restore it from a backup on the writer.",
        ) from None
    return state
