"""What the admin API says of the KV blocks that a node keeps."""

from __future__ import annotations

import msgspec


class TierView(msgspec.Struct, frozen=True):
    """Where blocks lie: ``name`` is ``memory`` or ``disk``; a block is one layer of 64 tokens.

    ``state`` is ``on``, ``off``, or the code of what keeps the tier from being used now.
    """

    name: str
    state: str
    bytes: int
    limit: int
    blocks: int
    hits: int


class LoadsView(msgspec.Struct, frozen=True):
    """Sessions that began from blocks: blocks (of all layers of a rank) asked for, and found.

    ``bad_blocks`` are those that peers sent and that were refused, ``distrusted`` how many peers
    are asked nothing for now.
    """

    loads: int
    blocks_wanted: int
    blocks_local: int
    blocks_remote: int
    bytes_fetched: int
    seconds: float
    bad_blocks: int
    distrusted: int

    @property
    def hit_rate(self) -> float:
        """The share of blocks that were found, here or at peers."""
        found = self.blocks_local + self.blocks_remote
        return found / self.blocks_wanted if self.blocks_wanted else 0.0


class StreamView(msgspec.Struct, frozen=True):
    """Blocks of running sessions on their way to standbys.

    ``limit`` is in bytes a second, 0 for none; ``sessions`` counts slices of sessions.
    """

    limit: int
    sessions: int
    targets: int
    blocks_sent: int
    bytes_sent: int
    bytes_kept: int
    failures: int


class KvView(msgspec.Struct, frozen=True):
    """Everything ``kv status`` shows.

    ``kept`` are blocks that ranks here made and kept, ``dropped`` those that came too fast;
    ``misses`` were asked of the store and not there, ``corrupt`` were damaged on the disk.
    ``known_peers`` told what they hold.
    """

    tiers: tuple[TierView, ...]
    misses: int
    corrupt: int
    evicted: int
    kept: int
    dropped: int
    served_bytes: int
    known_peers: int
    loads: LoadsView
    stream: StreamView


class ClearedReply(msgspec.Struct, frozen=True):
    """How many blocks were given up."""

    blocks: int
