"""What a block store knows, and the payloads that it has in memory.  Pure.

One thread at a time: ``block_store`` has the lock around this, and the disk beside it.  What lies
on the disk is noted here, so that both tiers are one tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_records import RECORD_BYTES
from pyagent_node.sharding.block_stats import Counts, Held
from pyagent_node.sharding.block_tree import DISK, MEMORY, BlockTree, Place, Unit, UnitId
from pyagent_node.sharding.kv_keys import BlockKey

OVERHEAD: Final = 512
"""Bytes that a block in memory counts for beside its payload."""


class NewBlock(NamedTuple):
    """A block to be kept or written."""

    place: Place
    cost: float
    payload: bytes

    @property
    def size(self) -> int:
        """Bytes of its record on disk."""
        return RECORD_BYTES + len(self.payload)


class BlockLedger:
    """Both tiers by name, and what is in memory of them.

    ``limit`` bounds payloads in memory and :data:`OVERHEAD` each.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tree = BlockTree()
        self.counts = Counts()
        self._payloads: dict[BlockKey, bytes] = {}
        self._pending: dict[BlockKey, NewBlock] = {}
        self._pins: dict[str, list[UnitId]] = {}
        self._used: dict[UnitId, None] = {}

    @property
    def pending(self) -> int:
        """Blocks that wait to be written."""
        return len(self._pending)

    def held(self) -> list[Held]:
        """Return every link of which something is held."""
        return [
            Held(*unit.id, unit.number, unit.masks[MEMORY] | unit.masks[DISK])
            for unit in self.tree.units.values()
        ]

    def models(self) -> list[Digest]:
        """Return the models of which something is held."""
        return list(dict.fromkeys(name.model for name in self.tree.units))

    # In memory ------------------------------------------------------------------------------------

    def put(self, block: NewBlock, *, write: bool) -> bool:
        """Take a new block, to be written if ``write``; returns whether it is held in memory."""
        key = block.place.key
        if self.tree.holds(key, MEMORY):
            return True
        if not self._keep(block):
            self.counts.refused += 1
            return False
        self.counts.puts += 1
        if write and not self.tree.holds(key, DISK):
            self._pending[key] = block
        return True

    def get(self, key: BlockKey) -> bytes | None:
        """Return a payload that is in memory, and count the hit."""
        payload = self._payloads.get(key)
        if payload is not None:
            self.counts.hits_memory += 1
            self._count_hit(key)
        return payload

    def pin(self, session: str, model: Digest, codec: str, chain: Sequence[bytes]) -> None:
        """Keep a chain for a session, in place of what it had pinned."""
        old = self._pins.get(session, [])
        if not old or len(chain) < len(old) or UnitId(model, codec, chain[len(old) - 1]) != old[-1]:
            names = [UnitId(model, codec, link) for link in chain]
            for name in names:
                self.tree.pin(name)
            self.unpin(session)
            self._pins[session] = names
            return
        for link in chain[len(old) :]:  # a name stands for all before it: it has grown
            old.append(UnitId(model, codec, link))
            self.tree.pin(old[-1])

    def unpin(self, session: str) -> None:
        """End the :meth:`pin` of a session; idempotent."""
        for name in self._pins.pop(session, ()):
            self.tree.unpin(name)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Drop blocks from both tiers."""
        for key in keys:
            self._payloads.pop(key, None)
            self._pending.pop(key, None)
            self.tree.remove(key, MEMORY)
            self.tree.remove(key, DISK)

    # On disk --------------------------------------------------------------------------------------

    def found_on_disk(self, place: Place, size: int, cost: float, hits: int) -> None:
        """Note a block that was on the disk when it was opened, with its uses so far."""
        key = place.key
        self.tree.add(DISK, place, size, cost)
        unit = self._unit(key)
        if hits > unit.uses:
            self.tree.touch(unit.id, hits - unit.uses)
        self._pending.pop(key, None)

    def was_read(self, key: BlockKey, payload: bytes) -> None:
        """Count a hit on the disk, and keep the payload in memory as far as there is room."""
        if not self.tree.holds(key, DISK):
            return
        self.counts.hits_disk += 1
        self._count_hit(key)
        if not self.tree.holds(key, MEMORY):
            self._keep(self._block(key, payload))

    def were_lost(self, keys: Sequence[BlockKey]) -> None:
        """Note what the disk has found damaged."""
        self.counts.corrupt += len(keys)
        for key in keys:
            self.tree.remove(key, DISK)

    def to_write(self, max_bytes: int) -> list[NewBlock]:
        """Return the blocks to write next, at least one if any waits."""
        batch: list[NewBlock] = []
        size = 0
        for block in self._pending.values():
            if batch and size + block.size > max_bytes:
                break
            batch.append(block)
            size += block.size
        return batch

    def make_room(self, need: int, room: int) -> list[BlockKey]:
        """Give up blocks on disk until ``need`` bytes more fit into ``room``; returns which."""
        over = self.tree.nbytes[DISK] + need - room
        gone = self.tree.evict(DISK, over) if over > 0 else []
        self.counts.evicted_disk += len(gone)
        return gone

    def take_uses(self) -> dict[UnitId, int]:
        """Take the uses of the links on disk that were used since the last time."""
        used = {name: self._uses(name) for name in self._used}
        self._used.clear()
        return used

    def were_written(
        self, batch: Iterable[NewBlock], has: Callable[[BlockKey], bool], *, full: bool
    ) -> int:
        """Note which of ``batch`` the disk ``has`` now; returns how many.

        The others wait for the next time, unless the disk is ``full``.
        """
        written = 0
        for block in batch:
            key = block.place.key
            if has(key):
                self.tree.add(DISK, block.place, block.size, block.cost)
                self._pending.pop(key, None)
                written += 1
            elif full:
                self._pending.pop(key, None)
                self.counts.refused += 1
        return written

    def disk_is_gone(self) -> None:
        """Forget what was on disk; what is in memory is to be written anew."""
        for key in self.tree.names():
            payload = self._payloads.get(key)
            if payload is not None:
                self._pending[key] = self._block(key, payload)
            self.tree.remove(key, DISK)

    # Parts ----------------------------------------------------------------------------------------

    def _unit(self, key: BlockKey) -> Unit:
        return self.tree.units[UnitId(key.model, key.codec, key.chain)]

    def _block(self, key: BlockKey, payload: bytes) -> NewBlock:
        """Return a block that the tree knows, with its payload."""
        unit = self._unit(key)
        parent = unit.parent.chain if unit.parent else b""
        return NewBlock(Place(key, parent, unit.number), unit.costs[key.layer], payload)

    def _keep(self, block: NewBlock) -> bool:
        """Take a block into memory if there is, or can be made, room."""
        key, parent, _ = block.place
        size = len(block.payload) + OVERHEAD
        if size > self.limit:
            return False
        over = self.tree.nbytes[MEMORY] + size - self.limit
        if over > 0:
            before = UnitId(key.model, key.codec, parent)
            if parent and before not in self.tree.units:
                return False  # behind a gap: nothing goes for what nobody can use
            # Its own chain must not go to make room for it.
            near = (UnitId(key.model, key.codec, key.chain), before)
            for name in near:
                self.tree.pin(name)
            for gone in self.tree.evict(MEMORY, over):
                del self._payloads[gone]
                self.counts.evicted_memory += 1
                if self._pending.pop(gone, None) is not None:
                    self.counts.lost += 1
            for name in near:
                self.tree.unpin(name)
            if self.tree.nbytes[MEMORY] + size > self.limit:
                return False
        self.tree.add(MEMORY, block.place, size, block.cost)
        self._payloads[key] = block.payload
        return True

    def _count_hit(self, key: BlockKey) -> None:
        unit = self._unit(key)
        layers = (unit.masks[MEMORY] | unit.masks[DISK]).bit_count()
        self.tree.touch(unit.id, 1 / layers)
        if unit.masks[DISK]:
            self._used[unit.id] = None

    def _uses(self, name: UnitId) -> int:
        unit = self.tree.units.get(name)
        return math.ceil(unit.uses) if unit else 1
