"""The file system and the index of stored KV blocks, on a :class:`SimulatedDisk`.

Everything that the disk does to a log it does to blocks: lost power at any operation, torn and
zeroed writes, flipped bits, a full disk, failing syncs.
"""

from __future__ import annotations

import random

import msgspec

from pyagent_node.base.errors import Unavailable
from pyagent_node.sharding.block_disk import BlockDisk
from pyagent_node.sharding.block_files import BlockFile
from pyagent_node.sharding.block_index import Changes, Row
from pyagent_node.sharding.block_tree import UnitId
from pyagent_node.sharding.kv_keys import BlockKey
from pyagent_node.simulations.disk import OpenFile, SimulatedDisk

_PLENTY = 1 << 50


class SimulatedBlocks:
    """Implements ``BlockDirectory``."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self._disk = disk

    def label(self) -> str:
        """See ``BlockDirectory.label``."""
        return self._disk.label()

    def names(self) -> list[str]:
        """See ``BlockDirectory.names``."""
        return self._disk.names()

    def create(self, name: str, data: bytes) -> None:
        """See ``BlockDirectory.create``."""
        self._disk.create(name, data)

    def open(self, name: str) -> BlockFile:
        """See ``BlockDirectory.open``."""
        return _File(self._disk, name)

    def remove(self, name: str) -> None:
        """See ``BlockDirectory.remove``."""
        self._disk.remove(name)

    def free(self) -> int:
        """See ``BlockDirectory.free``."""
        return int(min(self._disk.room, _PLENTY))


class _File:
    def __init__(self, disk: SimulatedDisk, name: str) -> None:
        self._disk = disk
        self._name = name
        self._end: OpenFile = disk.open_end(name)

    def size(self) -> int:
        return self._disk.size(self._name)

    def append(self, data: bytes) -> None:
        self._end.write(data)

    def read(self, offset: int, size: int) -> bytes:
        return self._disk.read(self._name, _PLENTY)[offset : offset + size]

    def truncate(self, size: int) -> None:
        self._end.truncate(size)

    def sync(self) -> None:
        self._end.sync()

    def close(self) -> None:
        self._end.close()


class SimulatedIndex:
    """Implements ``BlockIndex``; a crash brings an earlier state back, or none at all."""

    def __init__(self, disk: SimulatedDisk, rng: random.Random) -> None:
        self.failing = 0
        """How many of the next commits fail."""
        self._disk = disk
        self._rng = rng
        self._states: list[tuple[dict[BlockKey, Row], dict[int, int]]] = [({}, {})]

    def load(self) -> tuple[list[Row], dict[int, int]]:
        """See ``BlockIndex.load``."""
        rows, ends = self._states[-1]
        return list(rows.values()), dict(ends)

    def commit(self, changes: Changes) -> None:
        """See ``BlockIndex.commit``; one operation of the disk."""
        self._disk.operate()
        if self.failing > 0:
            self.failing -= 1
            raise Unavailable("The index cannot be written.", code="disk_failed")
        rows, ends = dict(self._states[-1][0]), dict(self._states[-1][1])
        for key in changes.gone:
            rows.pop(key, None)
        rows |= changes.rows
        for key, row in rows.items():
            hits = changes.hits.get(UnitId(key.model, key.codec, key.chain))
            if hits is not None:
                rows[key] = msgspec.structs.replace(row, hits=hits)
        ends |= changes.ends
        for number in changes.emptied:
            ends.pop(number, None)
        self._states.append((rows, ends))

    def close(self) -> None:
        """See ``BlockIndex.close``."""

    def crash(self) -> None:
        """Lose some of the last commits, or everything."""
        if self._rng.random() < 0.2:
            self._states = [({}, {})]
        else:
            last = len(self._states) - 1
            self._states = self._states[: max(0, last - self._rng.randrange(4)) + 1]


def simulated_block_disk(
    disk: SimulatedDisk, index: SimulatedIndex, limit: int, *, reserve: int = 0
) -> BlockDisk:
    """Return the real disk tier on a simulated disk."""
    return BlockDisk(SimulatedBlocks(disk), index, limit=limit, reserve=reserve)
