"""Which blocks are held, as a tree of prefixes, and which of them to give up first.  Pure.

The tree is a radix tree over chains of block names: an edge stands for the 64 tokens of a block,
and because a name is the digest of everything before it, a node is found by its name at once,
without walking down to it.  A node (:class:`Unit`) is one link of one chain at one codec level and
holds a set of layers in each of two tiers, memory and disk.

What is given up first is decided by GreedyDual-Size-Frequency (L. Cherkasova, *Improving WWW
Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy*, HP Labs HPL-98-69, 1998; after
P. Cao and S. Irani, *Cost-Aware WWW Proxy Caching Algorithms*, USITS 1997): the unit with the least
``L + uses * seconds to compute it again / bytes`` goes, and ``L`` rises to its value, so that what
was worth keeping once grows old.  Two rules bend it to prefixes: a block without those before it is
of no use, so **only ends of chains go** (all layers of a link at once); and units that a running
session has pinned stay.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final, NamedTuple

from pyagent_node.base.types import Digest
from pyagent_node.sharding.kv_keys import BlockKey

MEMORY: Final = 0
"""The tier of payloads in memory."""
DISK: Final = 1
"""The tier of payloads on disk."""


class UnitId(NamedTuple):
    """A link of a chain, of one model, at one codec level."""

    model: Digest
    codec: str
    chain: bytes


class Place(NamedTuple):
    """A block and its place in a chain.

    ``parent`` is the name of the link before (empty when that is not known), ``number`` counts the
    blocks of the chain from 0.
    """

    key: BlockKey
    parent: bytes
    number: int


_Edge = tuple[UnitId, int]


class Unit:
    """What is held of a link.

    ``costs`` are seconds by layer.  By tier: ``masks`` are layers as bits, ``sizes`` are bytes by
    layer, ``nbytes`` and ``seconds`` sums over what is held.
    """

    __slots__ = (
        "costs",
        "id",
        "masks",
        "nbytes",
        "number",
        "parent",
        "priority",
        "seconds",
        "sizes",
        "stamp",
        "uses",
    )

    def __init__(self, unit: UnitId, parent: UnitId | None, number: int) -> None:
        self.id = unit
        self.parent = parent
        self.number = number
        self.uses = 1.0
        self.costs: dict[int, float] = {}
        self.sizes: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.nbytes = [0, 0]
        self.seconds = [0.0, 0.0]
        self.masks = [0, 0]
        self.priority = [0.0, 0.0]
        self.stamp = [0, 0]

    def key(self, layer: int) -> BlockKey:
        """Return the name of the block of a layer."""
        return BlockKey(self.id.model, layer, self.id.chain, self.id.codec)


class BlockTree:
    """The units of both tiers; every answer is immediate.  One thread at a time."""

    def __init__(self) -> None:
        self.units: dict[UnitId, Unit] = {}
        self.nbytes = [0, 0]
        """Bytes held, by tier, as the sizes given to :meth:`add` say."""
        self.blocks = [0, 0]
        """Blocks (a layer of a link each) held, by tier."""
        # How many units follow a link, by its name and the number that comes after its own: what
        # follows counts upwards, so that no lie about parents can close a circle.
        self._children: tuple[dict[_Edge, int], dict[_Edge, int]] = ({}, {})
        self._pins: dict[UnitId, int] = {}
        self._heaps: tuple[list[_Candidate], list[_Candidate]] = ([], [])
        self._ages = [0.0, 0.0]
        self._stamps = 0

    def add(self, tier: int, place: Place, size: int, cost: float) -> None:
        """Note that a block is held in ``tier``; one that is there already stays as it is.

        ``size`` is in bytes, ``cost`` the seconds that it takes to compute.
        """
        key, parent, number = place
        name = UnitId(key.model, key.codec, key.chain)
        unit = self.units.get(name)
        if unit is None:
            before = UnitId(key.model, key.codec, parent) if parent else None
            unit = self.units[name] = Unit(name, before, number)
        if key.layer in unit.sizes[tier]:
            return
        if not unit.masks[tier] and unit.parent is not None:
            children, edge = self._children[tier], (unit.parent, unit.number)
            children[edge] = children.get(edge, 0) + 1
        unit.sizes[tier][key.layer] = size
        unit.masks[tier] |= 1 << key.layer
        unit.nbytes[tier] += size
        unit.seconds[tier] += unit.costs.setdefault(key.layer, cost)
        self.nbytes[tier] += size
        self.blocks[tier] += 1
        self._rate(unit, tier)

    def remove(self, key: BlockKey, tier: int) -> None:
        """Note that a block is held no more in ``tier``; idempotent."""
        unit = self.units.get(UnitId(key.model, key.codec, key.chain))
        if unit is None or key.layer not in unit.sizes[tier]:
            return
        size = unit.sizes[tier].pop(key.layer)
        unit.nbytes[tier] -= size
        unit.seconds[tier] -= unit.costs[key.layer]
        self.nbytes[tier] -= size
        self.blocks[tier] -= 1
        unit.masks[tier] &= ~(1 << key.layer)
        if key.layer not in unit.sizes[1 - tier]:
            unit.costs.pop(key.layer, None)
        if unit.masks[tier]:
            self._rate(unit, tier)
        else:
            self._emptied(unit, tier)

    def _emptied(self, unit: Unit, tier: int) -> None:
        unit.stamp[tier] = 0
        if not unit.masks[1 - tier]:
            del self.units[unit.id]
        if unit.parent is None:
            return
        children, edge = self._children[tier], (unit.parent, unit.number)
        left = children[edge] - 1
        if left:
            children[edge] = left
            return
        del children[edge]
        parent = self.units.get(unit.parent)
        if parent is not None and parent.masks[tier]:
            self._offer(parent, tier)  # it may have become the end of a chain

    def holds(self, key: BlockKey, tier: int | None = None) -> bool:
        """Say whether a block is held, in ``tier`` or in any."""
        unit = self.units.get(UnitId(key.model, key.codec, key.chain))
        if unit is None:
            return False
        tiers = (MEMORY, DISK) if tier is None else (tier,)
        return any(key.layer in unit.sizes[one] for one in tiers)

    def leading(
        self, model: Digest, chain: Sequence[bytes], layers: range, codec: str, tier: int | None
    ) -> int:
        """Return how many leading links of ``chain`` are held with all of ``layers``."""
        want = mask_of(layers)
        for count, link in enumerate(chain):
            unit = self.units.get(UnitId(model, codec, link))
            if unit is None:
                return count
            held = unit.masks[MEMORY] | unit.masks[DISK] if tier is None else unit.masks[tier]
            if held & want != want:
                return count
        return len(chain)

    def counts(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> list[int]:
        """Return for each of ``layers`` how many leading links of ``chain`` are held with it."""
        found = dict.fromkeys(layers, 0)
        left = mask_of(layers)
        for count, link in enumerate(chain, 1):
            unit = self.units.get(UnitId(model, codec, link))
            left &= unit.masks[MEMORY] | unit.masks[DISK] if unit else 0
            if not left:
                break
            for layer in layers:
                if left >> layer & 1:
                    found[layer] = count
        return list(found.values())

    def touch(self, name: UnitId, share: float) -> None:
        """Note that ``share`` of the layers of a unit were used."""
        unit = self.units.get(name)
        if unit is not None:
            unit.uses += share
            for tier in (MEMORY, DISK):
                if unit.masks[tier]:
                    self._rate(unit, tier)

    def pin(self, name: UnitId) -> None:
        """Keep a link, held or not yet, until it is unpinned as often."""
        self._pins[name] = self._pins.get(name, 0) + 1

    def unpin(self, name: UnitId) -> None:
        """Undo one :meth:`pin`."""
        left = self._pins[name] - 1
        if left:
            self._pins[name] = left
            return
        del self._pins[name]
        unit = self.units.get(name)
        if unit is not None:
            for tier in (MEMORY, DISK):
                if unit.masks[tier]:
                    self._offer(unit, tier)

    def evict(self, tier: int, nbytes: int) -> list[BlockKey]:
        """Give up at least ``nbytes`` of a tier if that can be; returns what was given up."""
        gone: list[BlockKey] = []
        goal = self.nbytes[tier] - nbytes
        heap = self._heaps[tier]
        while self.nbytes[tier] > goal and heap:
            candidate = heapq.heappop(heap)
            unit = self.units.get(candidate.name)
            if unit is None or unit.stamp[tier] != candidate.stamp or not self._free(unit, tier):
                continue
            self._ages[tier] = max(self._ages[tier], unit.priority[tier])
            gone += [unit.key(layer) for layer in unit.sizes[tier]]
            self._clear(unit, tier)
        return gone

    def _clear(self, unit: Unit, tier: int) -> None:
        """Drop all layers of a unit from a tier."""
        self.nbytes[tier] -= unit.nbytes[tier]
        self.blocks[tier] -= len(unit.sizes[tier])
        unit.nbytes[tier], unit.seconds[tier] = 0, 0.0
        unit.sizes[tier].clear()
        unit.masks[tier] = 0
        for layer in unit.costs.keys() - unit.sizes[1 - tier].keys():
            del unit.costs[layer]
        self._emptied(unit, tier)

    def names(self, model: Digest | None = None) -> list[BlockKey]:
        """Return the names of all blocks, or of a model's."""
        return [
            unit.key(layer)
            for unit in self.units.values()
            if model is None or unit.id.model == model
            for layer in sorted(unit.sizes[MEMORY].keys() | unit.sizes[DISK].keys())
        ]

    def _rate(self, unit: Unit, tier: int) -> None:
        """Set a unit's priority by its uses, cost and size, and by the age of the tier."""
        worth = unit.uses * max(0.0, unit.seconds[tier]) / max(1, unit.nbytes[tier])
        unit.priority[tier] = self._ages[tier] + worth
        self._offer(unit, tier)

    def _offer(self, unit: Unit, tier: int) -> None:
        """Make a unit a candidate, if it may go; whatever was offered of it before is void."""
        self._stamps += 1
        unit.stamp[tier] = self._stamps
        if not self._free(unit, tier):
            return
        heap = self._heaps[tier]
        heapq.heappush(heap, _Candidate(unit.priority[tier], -unit.number, self._stamps, unit.id))
        if len(heap) > 64 + 4 * len(self.units):
            self._tidy(tier)

    def _tidy(self, tier: int) -> None:
        """Throw void candidates out, so that the heap stays as small as the tree."""
        heap = self._heaps[tier]
        heap[:] = [
            one
            for one in heap
            if one.name in self.units and self.units[one.name].stamp[tier] == one.stamp
        ]
        heapq.heapify(heap)

    def _free(self, unit: Unit, tier: int) -> bool:
        return (
            bool(unit.masks[tier])
            and unit.id not in self._pins
            and (unit.id, unit.number + 1) not in self._children[tier]
        )


class _Candidate(NamedTuple):
    """An entry of a heap: the least priority first, of equals the deepest, then the oldest."""

    priority: float
    shallowness: int
    stamp: int
    name: UnitId


def mask_of(layers: range) -> int:
    """Return layers as bits."""
    mask = 0
    for layer in layers:
        mask |= 1 << layer
    return mask
