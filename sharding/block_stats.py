"""What a block store says of itself.  Pure."""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Digest


class Counts(msgspec.Struct):
    """Blocks counted since a store was made.

    ``hits_memory``, ``hits_disk`` and ``misses`` were asked for by ``BlockStore.get`` and ``read``;
    ``puts`` were taken, ``refused`` found no room, ``evicted_memory`` and ``evicted_disk`` were
    given up for others, ``lost`` are those of them that were nowhere else, ``corrupt`` are those
    that the disk gave back damaged or had to drop.
    """

    hits_memory: int = 0
    hits_disk: int = 0
    misses: int = 0
    puts: int = 0
    refused: int = 0
    evicted_memory: int = 0
    evicted_disk: int = 0
    lost: int = 0
    corrupt: int = 0


class StoreStats(msgspec.Struct, frozen=True):
    """What the store holds and has done since it was made; blocks are one layer of 64 tokens.

    ``pending`` blocks wait to be written; the counts are those of :class:`Counts`.
    ``disk`` is ``"on"``, ``"off"`` (not wanted), or the code of the error for which it is not used
    now (``"disk_full"``, ``"in_use"``, ...).
    """

    memory_bytes: int
    memory_limit: int
    memory_blocks: int
    disk_bytes: int
    disk_limit: int
    disk_blocks: int
    pending: int
    hits_memory: int
    hits_disk: int
    misses: int
    puts: int
    refused: int
    evicted_memory: int
    evicted_disk: int
    lost: int
    corrupt: int
    disk: str


class Held(msgspec.Struct, frozen=True):
    """A link of which something is held here: which layers (bit i: layer i), and how deep it is."""

    model: Digest
    codec: str
    chain: bytes
    number: int
    layers: int
