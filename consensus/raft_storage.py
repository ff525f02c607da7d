"""What a Raft node keeps on disk, as bytes, and which Raft id it goes by.  Pure.

The hard state beside the log is term, vote and commit index, and the **incarnation**: random
bytes drawn when the log directory was first used.  The Raft id is a hash of peer id and
incarnation, so a node that lost its disk comes back as another node and cannot vote twice in a
term that it has forgotten.

A snapshot is the configuration, the peer behind each Raft id, and the replica.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.log import StoredLog
from pyagent_node.consensus.replica import Replica, decode_replica
from pyagent_node.consensus.segments import LogEntry, Snapshot
from pyagent_node.native import RaftConf, RaftEntry, blake3

INCARNATION_BYTES = 16
FOUNDING_INDEX = 1
"""The log of a mesh begins with a snapshot, so that whoever joins later is sent one first."""
MAX_PEERS_LISTED = 1024


class HardState(msgspec.Struct, frozen=True, array_like=True):
    """The durable facts of a node beside its log."""

    version: Literal[1]
    incarnation: bytes
    term: int
    vote: int
    commit: int


class _Item(msgspec.Struct, frozen=True, array_like=True):
    kind: int
    data: bytes
    context: bytes


class Content(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot holds besides its configuration."""

    version: Literal[1]
    peers: list[tuple[int, PeerId]]
    replica: bytes


class _StoredSnapshot(msgspec.Struct, frozen=True, array_like=True):
    version: Literal[1]
    voters: tuple[int, ...]
    learners: tuple[int, ...]
    voters_outgoing: tuple[int, ...]
    learners_next: tuple[int, ...]
    auto_leave: bool
    content: bytes


class Loaded(msgspec.Struct, frozen=True):
    """A store's content in the terms of the Raft core."""

    hard: HardState | None
    conf: RaftConf
    snapshot_index: int
    snapshot_term: int
    snapshot_data: bytes
    peers: dict[int, PeerId]
    replica: Replica
    entries: list[RaftEntry]


def raft_id(peer: PeerId, incarnation: bytes) -> int:
    """Return the Raft id of a node: never 0, which stands for nobody."""
    return int.from_bytes(blake3(peer.encode() + incarnation)[:8], "big") or 1


def encode_hard_state(hard: HardState) -> bytes:
    """Return the bytes kept beside the log."""
    return msgspec.msgpack.encode(hard)


def decode_hard_state(data: bytes) -> HardState:
    """Return the facts in ``data``; raises :class:`CorruptData` (``bad_hard_state``)."""
    try:
        hard = msgspec.msgpack.decode(data, type=HardState)
        if len(hard.incarnation) != INCARNATION_BYTES or min(hard.term, hard.vote, hard.commit) < 0:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise CorruptData(
            "The log of this node is of another engine or version.",
            code="bad_hard_state",
            remedy="Move the log directory away: the node then fetches the log again.",
        ) from None
    return hard


def to_log_entry(entry: RaftEntry) -> LogEntry:
    """Return the entry as it is stored and hashed."""
    item = msgspec.msgpack.encode(_Item(entry.kind, entry.data, entry.context))
    return LogEntry(entry.index, entry.term, item)


def to_raft_entry(entry: LogEntry) -> RaftEntry:
    """Return the entry as the core takes it; raises :class:`CorruptData` (``bad_entry``)."""
    try:
        item = msgspec.msgpack.decode(entry.data, type=_Item)
        return RaftEntry(entry.index, entry.term, item.kind, item.data, item.context)
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError):
        raise CorruptData(
            f"Entry {entry.index} of the stored log is not one of this engine's.",
            code="bad_entry",
            remedy="Move the log directory away: the node then fetches the log again.",
        ) from None


def encode_peers(peers: dict[int, PeerId]) -> bytes:
    """Return the context of a configuration entry: the peers of the ids that it brings in."""
    return msgspec.msgpack.encode(sorted(peers.items()))


def decode_peers(data: bytes) -> dict[int, PeerId]:
    """Return the peers in a context, none if it is malformed (alike on every node)."""
    try:
        return dict(msgspec.msgpack.decode(data, type=list[tuple[int, PeerId]]))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return {}


def encode_content(peers: dict[int, PeerId], replica: Replica) -> bytes:
    """Return what the core keeps as the data of a snapshot."""
    return msgspec.msgpack.encode(Content(1, sorted(peers.items()), replica.encode()))


def decode_content(data: bytes, index: int) -> tuple[dict[int, PeerId], Replica]:
    """Return peers and replica; raises :class:`CorruptData` (``bad_snapshot``)."""
    try:
        content = msgspec.msgpack.decode(data, type=Content)
        if len(content.peers) > MAX_PEERS_LISTED:
            raise ValueError
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _bad_snapshot("is damaged") from None
    replica = decode_replica(content.replica)
    if replica.state.index != index:
        raise _bad_snapshot("is of another index than it says")
    return dict(content.peers), replica


def encode_snapshot(index: int, term: int, conf: RaftConf, content: bytes) -> Snapshot:
    """Return a snapshot of the core as it is stored."""
    stored = _StoredSnapshot(
        1,
        conf.voters,
        conf.learners,
        conf.voters_outgoing,
        conf.learners_next,
        conf.auto_leave,
        content,
    )
    return Snapshot(index, term, msgspec.msgpack.encode(stored))


def read_stored(stored: StoredLog) -> Loaded:
    """Return what a store holds, checked.

    Raises :class:`CorruptData` (``bad_hard_state``, ``bad_snapshot``, ``bad_entry``).
    """
    hard = decode_hard_state(stored.hard_state) if stored.hard_state is not None else None
    if stored.last_index and hard is None:
        decode_hard_state(b"")
    entries = [to_raft_entry(entry) for entry in stored.entries]
    if stored.snapshot is None:
        if entries:
            raise _bad_snapshot("is missing")
        return Loaded(hard, RaftConf(), 0, 0, b"", {}, Replica(), entries)
    snapshot = stored.snapshot
    try:
        kept = msgspec.msgpack.decode(snapshot.data, type=_StoredSnapshot)
        conf = RaftConf(
            kept.voters, kept.learners, kept.voters_outgoing, kept.learners_next, kept.auto_leave
        )
    except (msgspec.DecodeError, ValueError, OverflowError, RecursionError):
        raise _bad_snapshot("is damaged") from None
    peers, replica = decode_content(kept.content, snapshot.index)
    return Loaded(hard, conf, snapshot.index, snapshot.term, kept.content, peers, replica, entries)


def founding_snapshot(node_id: int, peer: PeerId) -> Snapshot:
    """Return the beginning of a mesh's log: this node as the only voter, and nothing decided."""
    replica = Replica()
    replica.skip(LogEntry(FOUNDING_INDEX, FOUNDING_INDEX, b""))
    content = encode_content({node_id: peer}, replica)
    return encode_snapshot(FOUNDING_INDEX, FOUNDING_INDEX, RaftConf([node_id]), content)


def _bad_snapshot(why: str) -> CorruptData:
    return CorruptData(
        f"A snapshot of the log {why}.",
        code="bad_snapshot",
        remedy="Move the log directory away: the node then fetches the log again.",
    )
