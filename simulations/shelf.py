"""A shelf of KV blocks for simulated nodes, where whoever is in reach has what others keep.

It is no more than the ``KvShelf`` port says: it forgets, gives less than it promised, is slow, and
hands out blocks that are broken, all by draws of a seeded generator.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

import msgspec
import trio

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.port import Rest, SettledBlock, Wanted
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.sharding.kv_landmarks import is_landmarks

REST_SECONDS = 0.1
"""How long those who end are waited for."""

Name = tuple[Digest, int, bytes, str]
"""Model, layer, chain hash and cells."""


class ShelfFaults(msgspec.Struct):
    """What may go wrong, as chances of each block or load."""

    lost: float = 0.0
    broken: float = 0.0
    foreign: float = 0.0
    slow: float = 0.0
    seconds: float = 0.0
    """What a load takes; one that is slow takes a thousand times as long."""
    away: float = 0.0
    """What it is told that blocks of others would take."""


class ToyShelves:
    """The shelves of all nodes; ``reach`` says whether one peer can ask another."""

    def __init__(
        self,
        rng: Random,
        faults: ShelfFaults | None = None,
        reach: Callable[[PeerId, PeerId], bool] = lambda one, other: True,
    ) -> None:
        self.rng = rng
        self.faults = faults or ShelfFaults()
        self.reach = reach
        self.shelves: dict[PeerId, ToyShelf] = {}
        self.counts: Counter[str] = Counter()

    def of(self, peer: PeerId) -> ToyShelf:
        """Return the shelf of a node."""
        return self.shelves.setdefault(peer, ToyShelf(self, peer))

    def find(self, asker: PeerId, name: Name) -> LayerKv | None:
        """Return a layer of a block that ``asker`` has or can get."""
        for peer in sorted(self.shelves, key=lambda peer: (peer != asker, peer)):
            if peer == asker or self.reach(asker, peer):
                found = self.shelves[peer].held.get(name)
                if found is not None:
                    return found
        return None


class ToyShelf:
    """The shelf of one node."""

    def __init__(self, shelves: ToyShelves, peer: PeerId) -> None:
        self.held: dict[Name, LayerKv] = {}
        self.sessions: Counter[SessionId] = Counter()
        """Blocks shown by each session that has not ended."""
        self.rests: list[tuple[Rest, KvRange]] = []
        self._shelves = shelves
        self._peer = peer

    def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
        """Return how many leading blocks can be had in some format."""
        formats = {name[3] for shelf in self._shelves.shelves.values() for name in shelf.held}
        return max((self._leading(model, chain, layers, cells) for cells in formats), default=0)

    def _leading(self, model: Digest, chain: Sequence[bytes], layers: range, cells: str) -> int:
        for index, link in enumerate(chain):
            names = [(model, layer, link, cells) for layer in layers]
            if any(self._shelves.find(self._peer, name) is None for name in names):
                return index
        return len(chain)

    async def load(self, wanted: Wanted) -> list[KvRange]:
        """Return what can be had, less what goes wrong."""
        rng, faults = self._shelves.rng, self._shelves.faults
        slow = rng.random() < faults.slow
        await trio.sleep(faults.seconds * (1000 if slow else 1))
        chain = wanted.chain[: wanted.skip + wanted.limit]
        found: list[KvRange] = []
        for index in range(wanted.skip, len(chain)):
            names = [(wanted.model, layer, chain[index], wanted.cells) for layer in wanted.layers]
            layers = [self._shelves.find(self._peer, name) for name in names]
            whole = tuple(layer for layer in layers if layer is not None)
            if len(whole) < len(names) or rng.random() < faults.lost:
                break
            kv = KvRange(wanted.cells, 64 * index, 64 * index + 64, whole)
            if rng.random() < faults.broken:
                kv = KvRange(kv.codec, kv.start, kv.stop, _broken(kv))
            if rng.random() < faults.foreign:
                kv = KvRange("elsewhere/1", kv.start, kv.stop, kv.layers)
            found.append(kv)
        self._shelves.counts["loads"] += 1
        self._shelves.counts["blocks"] += len(found)
        return found

    async def cost(self, wanted: Wanted) -> float:
        """Return what the faults say of blocks that are elsewhere."""
        own = there = True
        for link in wanted.chain[wanted.skip :]:
            for layer in wanted.layers:
                name = (wanted.model, layer, link, wanted.cells)
                own &= name in self.held
                there &= self._shelves.find(self._peer, name) is not None
        await trio.lowlevel.checkpoint()
        if not there:
            return math.inf
        return 0.0 if own else self._shelves.faults.away

    def wants(self, block: SettledBlock) -> bool:
        """Want what is not here yet."""
        if block.index > self.sessions[block.session]:
            raise AssertionError(f"block {block.index} of {block.session} came out of order")
        self.sessions[block.session] = block.index + 1
        return any(
            (block.model, layer, block.chain, block.cells) not in self.held
            for layer in block.layers
        )

    def keep(self, block: SettledBlock, kv: KvRange, seconds: float) -> None:
        """Keep a block; one of the same name must have the same bits."""
        assert [layer.layer for layer in kv.layers] == list(block.layers), "the layers of the rank"
        for layer in kv.layers:
            name = (block.model, layer.layer, block.chain, block.cells)
            for shelf in self._shelves.shelves.values():
                if shelf.held.get(name, layer) != layer:
                    raise AssertionError(f"two blocks {block.index} have one name")
            self.held[name] = layer
        self._shelves.counts["kept"] += 1

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """Keep the cells of a rest."""
        assert (kv.start, kv.stop) == (rest.start, rest.start + len(rest.links)), "all of them"
        self.rests.append((rest, kv))

    async def load_rest(
        self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]
    ) -> KvRange | None:
        """Return what can be had, if nothing goes wrong, after a wait for those who are ending."""
        shelves, rng, faults = self._shelves, self._shelves.rng, self._shelves.faults
        await trio.sleep(faults.seconds)
        until = trio.current_time() + REST_SECONDS
        while len(cells := self._rest_cells(wanted, held)) < len(wanted.layers):
            if trio.current_time() >= until:
                return None
            await trio.sleep(REST_SECONDS / 10)
        if rng.random() < faults.lost:
            return None
        tokens = min(len(wanted.links), *(cells[layer][0] for layer in wanted.layers))
        stop = wanted.start + tokens
        layers = [
            part_of(
                KvRange(wanted.cells, wanted.start, wanted.start + cells[layer][0], (kv,)),
                wanted.start,
                stop,
            ).layers[0]
            for layer in wanted.layers
            for kv in (cells[layer][1],)
        ]
        shelves.counts["rests"] += 1
        return KvRange(wanted.cells, wanted.start, stop, tuple(layers))

    def _rest_cells(
        self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]
    ) -> dict[int, tuple[int, LayerKv]]:
        """Return for each layer how many tokens of a rest are there, and their cells."""
        cells: dict[int, tuple[int, LayerKv]] = {}
        for peer in held:
            if peer != self._peer and not self._shelves.reach(self._peer, peer):
                continue
            for rest, kv in self._shelves.of(peer).rests:
                if rest.epoch != wanted.epoch - 1:
                    continue
                if (rest.parent, rest.cells) != (wanted.parent, wanted.cells):
                    continue
                both = zip(rest.links, wanted.links, strict=False)
                count = sum(one == other for one, other in both)
                for layer in part_of(kv, kv.start, kv.start + count).layers if count else ():
                    if layer.layer in wanted.layers and count > cells.get(layer.layer, (0,))[0]:
                        cells[layer.layer] = (count, layer)
        return cells

    def ended(self, session: SessionId) -> None:
        """Forget a session."""
        if self.sessions.pop(session, None) is not None:
            self._shelves.counts["ended"] += 1


def _broken(kv: KvRange) -> tuple[LayerKv, ...]:
    """Return the layers of a block with something missing."""
    if is_landmarks(kv.codec):
        return tuple(LayerKv(each.layer, each.keys, each.values[:-1]) for each in kv.layers)
    return part_of(kv, kv.start, kv.stop - 1).layers
