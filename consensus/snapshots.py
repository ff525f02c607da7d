"""The state as bytes: equal states, equal bytes; every earlier version can be read.  Pure."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.base.types import PeerId, Placement, Prepared
from pyagent_node.consensus.cluster import Burn, State, is_member
from pyagent_node.consensus.commands import Checkpoint, ModelRecord
from pyagent_node.consensus.port import MemberRecord

SNAPSHOT_MAGIC = b"pyagent-state\0"
SNAPSHOT_VERSION: Final = 4
"""The latest; each state is written as the lowest version that can say it, for older programs."""


class _SnapshotV1(msgspec.Struct, frozen=True):
    version: Literal[1]
    index: int
    members: list[MemberRecord]
    burnt: dict[str, Burn]
    models: list[ModelRecord]
    placements: list[Placement]
    last_epoch: int


class _SnapshotV2(msgspec.Struct, frozen=True):
    version: Literal[2]
    index: int
    members: list[MemberRecord]
    burnt: dict[str, Burn]
    models: list[ModelRecord]
    placements: list[Placement]
    last_epoch: int
    checkpoints: list[Checkpoint]
    buckets: tuple[tuple[PeerId, ...], ...]
    bucket_epoch: int
    settings: dict[str, int]


class _VersionOnly(msgspec.Struct):
    version: int


class _SnapshotV3(msgspec.Struct, frozen=True):
    version: Literal[3]
    index: int
    members: list[MemberRecord]
    burnt: dict[str, Burn]
    models: list[ModelRecord]
    placements: list[Placement]
    last_epoch: int
    checkpoints: list[Checkpoint]
    buckets: tuple[tuple[PeerId, ...], ...]
    bucket_epoch: int
    settings: dict[str, int]
    prepared: list[Prepared]


class _SnapshotV4(msgspec.Struct, frozen=True):
    version: Literal[4]
    index: int
    members: list[MemberRecord]
    burnt: dict[str, Burn]
    models: list[ModelRecord]
    placements: list[Placement]
    last_epoch: int
    checkpoints: list[Checkpoint]
    buckets: tuple[tuple[PeerId, ...], ...]
    bucket_epoch: int
    settings: dict[str, int]
    prepared: list[Prepared]
    contexts: list[ContextInfo]


_encoder = msgspec.msgpack.Encoder(order="deterministic")


def encode_snapshot(state: State) -> bytes:
    """Return ``state`` as bytes: equal states, equal bytes, in whatever order they were reached."""
    plain = _SnapshotV2(
        version=2,
        index=state.index,
        members=sorted(state.members.values(), key=lambda m: m.peer_id),
        burnt=dict(state.burnt),
        models=sorted(state.models.values(), key=lambda m: m.digest),
        placements=sorted(state.placements.values(), key=lambda p: p.model),
        last_epoch=state.last_epoch,
        checkpoints=sorted(state.checkpoints.values(), key=lambda c: c.session),
        buckets=state.buckets,
        bucket_epoch=state.bucket_epoch,
        settings=dict(state.changed_settings),
    )
    if not state.prepared and not state.contexts:
        return SNAPSHOT_MAGIC + _encoder.encode(plain)
    prepared = sorted(state.prepared.values(), key=lambda p: p.model)
    fields = msgspec.structs.asdict(plain) | {"version": 3, "prepared": prepared}
    if not state.contexts:
        return SNAPSHOT_MAGIC + _encoder.encode(_SnapshotV3(**fields))
    fields |= {
        "version": SNAPSHOT_VERSION,
        "contexts": sorted(state.contexts.values(), key=lambda c: c.name),
    }
    return SNAPSHOT_MAGIC + _encoder.encode(_SnapshotV4(**fields))


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
        state = _READERS.get(version, _read_v4)(body)
        check_invariants(state)
    except (msgspec.DecodeError, ValueError, RecursionError, InvalidRequest, CorruptData) as error:
        raise CorruptData(
            f"A snapshot of the replicated state is damaged: {str(error)[:200]}.",
            code="bad_snapshot",
            remedy="Remove it on a node that follows; restore it from a backup on the writer.",
        ) from None
    return state


def _read_v1(body: memoryview) -> State:
    raw = msgspec.msgpack.decode(body, type=_SnapshotV1)
    return _state(raw)


def _read_v2(body: memoryview) -> State:
    return _whole_state(msgspec.msgpack.decode(body, type=_SnapshotV2))


def _read_v3(body: memoryview) -> State:
    raw = msgspec.msgpack.decode(body, type=_SnapshotV3)
    return msgspec.structs.replace(_whole_state(raw), prepared={p.model: p for p in raw.prepared})


def _read_v4(body: memoryview) -> State:
    raw = msgspec.msgpack.decode(body, type=_SnapshotV4)
    return msgspec.structs.replace(
        _whole_state(raw),
        prepared={p.model: p for p in raw.prepared},
        contexts={c.name: c for c in raw.contexts},
    )


_READERS: Final = {1: _read_v1, 2: _read_v2, 3: _read_v3}


def _whole_state(raw: _SnapshotV2 | _SnapshotV3 | _SnapshotV4) -> State:
    return msgspec.structs.replace(
        _state(raw),
        checkpoints={c.session: c for c in raw.checkpoints},
        buckets=raw.buckets,
        bucket_epoch=raw.bucket_epoch,
        changed_settings=raw.settings,
    )


def _state(raw: _SnapshotV1 | _SnapshotV2 | _SnapshotV3 | _SnapshotV4) -> State:
    return State(
        index=raw.index,
        members={m.peer_id: m for m in raw.members},
        burnt=raw.burnt,
        models={m.digest: m for m in raw.models},
        placements={p.model: p for p in raw.placements},
        last_epoch=raw.last_epoch,
    )


def check_invariants(state: State) -> None:
    """Raise :class:`CorruptData` (``broken_invariant``) if ``state`` could not have been reached.

    Maps are keyed by what their values name; a placed model is known and fully covered; epochs
    are distinct and at most ``last_epoch``; what drafts is a known model; what is prepared follows
    on the placement in force; names of members and of models, and ids of contexts, are distinct.
    """
    epochs = [p.epoch for p in state.placements.values()]
    live = [m.name for m in state.members.values() if is_member(m)]
    names = [m.name for m in state.models.values()]
    good = (
        state.index >= state.last_epoch + state.bucket_epoch
        and state.last_epoch >= 0
        and state.bucket_epoch >= 0
        and all(key == m.peer_id for key, m in state.members.items())
        and all(key == m.digest for key, m in state.models.items())
        and all(key == p.model and key in state.models for key, p in state.placements.items())
        and all(
            p.drafting is None or p.drafting.drafter is None or p.drafting.drafter in state.models
            for p in state.placements.values()
        )
        and all(key == c.session and c.claim > 0 for key, c in state.checkpoints.items())
        and all(
            key == p.model
            and 0 < p.number <= state.index
            and key in state.placements
            and state.placements[key].epoch == p.after_epoch
            for key, p in state.prepared.items()
        )
        and all(key == c.name for key, c in state.contexts.items())
        and len({c.id for c in state.contexts.values()}) == len(state.contexts)
        and all(0 <= c.floor <= c.horizon for c in state.contexts.values())
        and all(c.raised_index <= state.index for c in state.contexts.values())
        and all(0 < epoch <= state.last_epoch for epoch in epochs)
        and len(set(epochs)) == len(epochs)
        and len(set(live)) == len(live)
        and len(set(names)) == len(names)
        and (state.bucket_epoch > 0 or not state.buckets)
    )
    if not good:
        raise CorruptData(
            "The replicated state contradicts itself.",
            code="broken_invariant",
            remedy="Report this with the log directory of the mesh.",
        )
    for key, placement in state.placements.items():
        placement.check(state.models[key].n_layers)
    for key, prepared in state.prepared.items():
        prepared.check(state.models[key].n_layers)
