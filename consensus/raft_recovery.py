"""Rebuilding a mesh's log from one survivor, after a majority of the voters is lost for good.

This is no part of Raft: what the lost voters alone had agreed on is gone, and if they come back
with their logs they are a second mesh of the same name.  So whoever calls it asks first.
"""

from __future__ import annotations

import os

import msgspec

from pyagent_node.base.errors import CorruptData, NotFound
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.log import LogStore
from pyagent_node.consensus.raft_storage import (
    INCARNATION_BYTES,
    HardState,
    decode_peers,
    encode_content,
    encode_hard_state,
    encode_snapshot,
    raft_id,
    read_stored,
    to_log_entry,
)
from pyagent_node.native import RaftConf

GAP = 1 << 20
"""Entries left out after the survivor's last one.

No other survivor's log reaches that far, so each takes the rebuilt state as a snapshot, even if it
held entries that this one had not seen.
"""


class Recovered(msgspec.Struct, frozen=True):
    """What was rebuilt.

    The state is that after entry ``applied``, of which everything above ``committed`` had not been
    known here to be agreed on; it now counts as entry ``index``.  ``lost`` are the other nodes that
    voted or followed; those that are left must follow anew.
    """

    index: int
    term: int
    applied: int
    committed: int
    lost: tuple[PeerId, ...]


async def recover(
    store: LogStore, peer_id: PeerId, *, incarnation: bytes | None = None
) -> Recovered:
    """Make the stopped node ``peer_id`` the only voter, with everything that its log holds.

    Choose the survivor whose log goes furthest.  Entries that may not have been agreed on are
    kept, because what was acknowledged is among them.  The others join as new followers.  Raises
    :class:`NotFound` (``no_log``) for a node that never had the log, :class:`CorruptData` for a
    damaged one, :class:`Unsupported` (``unknown_command``) for one of a later version; nothing
    has changed then.
    """
    loaded = read_stored(await store.load())
    if loaded.hard is None or loaded.snapshot_index == 0:
        raise NotFound(
            "This node was never given the mesh's log, so there is nothing to rebuild it from.",
            code="no_log",
            remedy="Do it on a node that voted or followed.",
        )
    replica = loaded.replica
    peers = dict(loaded.peers)
    applied = loaded.snapshot_index
    for entry in loaded.entries:
        stored = to_log_entry(entry)
        peers.update(decode_peers(entry.context) if entry.kind == 1 else {})
        try:
            if entry.kind == 0 and entry.data:
                replica.apply_once(stored, entry.data)
            else:
                replica.skip(stored)
        except CorruptData:
            replica.skip(stored)  # as every node did
        applied = entry.index
    replica.jump(applied + GAP)
    term = 1 + max(loaded.hard.term, loaded.snapshot_term, *(e.term for e in loaded.entries))
    drawn = incarnation or os.urandom(INCARNATION_BYTES)
    me = raft_id(peer_id, drawn)
    hard = HardState(1, drawn, term, 0, replica.state.index)
    content = encode_content({me: peer_id}, replica)
    await store.compact(encode_snapshot(replica.state.index, term, RaftConf([me]), content), ())
    await store.append((), encode_hard_state(hard))
    lost = set(peers.values()) - {peer_id}
    return Recovered(
        index=replica.state.index,
        term=term,
        applied=applied,
        committed=max(loaded.hard.commit, loaded.snapshot_index),
        lost=tuple(sorted(lost)),
    )
