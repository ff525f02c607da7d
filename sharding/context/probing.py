"""Which nodes a question to spread sketches goes to, and what comes of their answers.  Pure.

A window like the question has most likely the signs that the question's vector has, and the nearer
that one lies to a border the likelier the other sign: so every group of windows has a chance
(:func:`chances`), and a node's worth is the chance of the groups it has that nobody was asked for
yet.  Nodes are asked in waves, the worthiest first, until what is left has hardly a chance or a
wave has changed nothing (:class:`Probe`).  (Margin-ordered probes: Lv, Josephson, Wang, Charikar
and Li, "Multi-Probe LSH", VLDB 2007.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import PeerId
from pyagent_node.sharding.context.catalog import Catalog, Table
from pyagent_node.sharding.context.index import RERANKED
from pyagent_node.sharding.context.records import ChunkId
from pyagent_node.sharding.context.search import Candidate
from pyagent_node.sharding.context.shares import GROUP_BITS, GROUPS
from pyagent_node.sharding.context.sketches import Buckets

SCALE: Final = 0.05
"""How far from a border a sign is three times as likely as the other (chosen on MiniLM)."""
FIRST: Final = 0.9
"""The first wave of nodes has groups of so much chance together,"""
WAVE: Final = 2
"""a later one has so many nodes,"""
REST: Final = 0.01
"""and groups of so little chance together are not asked for."""
LOOKED: Final = 16
"""The best chunks by their sketches: a wave that changes none of them is the last."""
MAX_UNSURE: Final = 256
"""A node that may lack sketches of more chunks has not answered for its groups."""


class Likely(msgspec.Struct, frozen=True, array_like=True):
    """Windows of a chunk by their sketches; ``estimates`` are of their likeness, as they stand."""

    id: bytes
    places: tuple[int, ...]
    estimates: tuple[float, ...]


def chances(buckets: Buckets, vector: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return for each group the chance that a window like ``vector`` is in it; they sum to 1."""
    margins = buckets.margins(vector)[:GROUP_BITS].astype(np.float64)
    upper = 1 / (1 + np.exp(-np.clip(margins / SCALE, -50, 50)))
    found = np.ones(1)
    for bit in range(GROUP_BITS):
        share = upper[bit] if bit < len(upper) else 0.0
        found = np.concatenate([found * (1 - share), found * share])
    return found


def likely(table: Table, vector: NDArray[np.float32], count: int = RERANKED) -> list[Likely]:
    """Return the ``count`` likeliest windows by their sketches, by chunk."""
    if not len(table.sketches):
        return []
    rows, estimates = table.sketches.nearest(vector, count)
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row, estimate in zip(rows, estimates, strict=True):
        at = (int(table.documents[row]), int(table.ordinals[row]))
        found.setdefault(at, []).append((int(table.places[row]), float(estimate)))
    return [
        Likely(
            table.records[document].id_of(ordinal),
            tuple(place for place, _ in own),
            tuple(estimate for _, estimate in own),
        )
        for (document, ordinal), own in found.items()
    ]


class Merged:
    """The likeliest windows of what several nodes said."""

    def __init__(self) -> None:
        self._found: dict[tuple[ChunkId, int], float] = {}

    def add(self, some: Iterable[Likely]) -> None:
        """Take in what a node said; two owners may say the same."""
        for each in some:
            for place, estimate in zip(each.places, each.estimates, strict=True):
                self._found[ChunkId(each.id), place] = estimate

    def best(self, count: int = RERANKED) -> dict[ChunkId, list[int]]:
        """Return the likeliest windows by chunk, likeliest first."""
        order = sorted(self._found, key=lambda at: (-self._found[at], at))[:count]
        chunks: dict[ChunkId, list[int]] = {}
        for chunk, place in order:
            chunks.setdefault(chunk, []).append(place)
        return chunks

    def top(self) -> frozenset[ChunkId]:
        """Return the best :data:`LOOKED` chunks."""
        best = self.best(RERANKED)
        return frozenset(list(best)[:LOOKED])


def picked(
    windows: dict[ChunkId, list[int]], unsure: Iterable[ChunkId], catalog: Catalog, live: set[str]
) -> tuple[list[Candidate], set[ChunkId]]:
    """Return the candidates of a question, and chunks that this node's catalog does not know.

    Those of documents that are not ``live`` are left out.  ``unsure`` chunks may have been left out
    by whoever was asked, so all their windows are compared.
    """
    found: list[Candidate] = []
    strange: set[ChunkId] = set()
    for chunk in dict.fromkeys((*windows, *unsure)):
        place = catalog.locate(chunk)
        if place is None:
            strange.add(chunk)
            continue
        record, ordinal = place
        count = record.chunks[ordinal].windows
        own = tuple(at for at in windows.get(chunk, range(count)) if at < count)
        if chunk in unsure and chunk in windows:
            own = tuple(range(count))
        if record.source in live and own:
            found.append(Candidate(chunk, record, ordinal, own))
    return found, strange


def unsure_of(
    catalog: Catalog, marks: Sequence[int], wanted: Callable[[ChunkId], bool]
) -> list[ChunkId]:
    """Return the chunks whose sketches somebody with these marks may lack.

    Those of documents that were added last come first; ``wanted`` says which are of interest.
    """
    slots = [slot for slot, mark in enumerate(catalog.marks()) if mark != marks[slot]]
    return [chunk for slot in slots for chunk in catalog.in_slot(slot) if wanted(chunk)]


class Probe:
    """Says whom to ask next.

    ``sources`` has for each group the nodes that may have it, those that own it first; ``owners``
    are those.  All owners of a group are equally good.
    """

    def __init__(
        self,
        chance: NDArray[np.float64],
        sources: Sequence[Sequence[PeerId]],
        owners: Sequence[Collection[PeerId]],
    ) -> None:
        self._chance, self._sources, self._owners = chance, sources, owners
        self._served = 0
        self._asked: set[PeerId] = set()
        self._top: frozenset[ChunkId] | None = None
        self._settled = False
        self._looked = 0

    @property
    def short(self) -> bool:
        """Whether there are groups that should have been answered for, and were not."""
        if self._settled:
            return False
        left = [group for group in range(GROUPS) if not self._served >> group & 1]
        return float(sum(self._chance[group] for group in left)) > REST

    def served(self, peer: PeerId, groups: int) -> None:
        """Note that a node was asked, and has answered for ``groups``."""
        self._asked.add(peer)
        self._served |= groups

    def look(self, top: frozenset[ChunkId]) -> None:
        """Note what the best chunks are after a wave; one that nobody answered says nothing."""
        if self._served != self._looked:
            self._settled = top == self._top
            self._top, self._looked = top, self._served
        elif self._top is None:
            self._top = frozenset()

    def wave(self) -> list[PeerId]:
        """Return the nodes to ask now; none when it is enough, or there is nobody else."""
        hoped = self._served
        wave: list[PeerId] = []
        while True:
            left = [group for group in range(GROUPS) if not hoped >> group & 1]
            rest = sum(float(self._chance[group]) for group in left)
            first = self._top is None
            enough = rest <= (1 - FIRST if first and wave else REST)
            if enough or self._settled or (not first and len(wave) == WAVE):
                return wave
            worth: dict[PeerId, float] = {}
            for group in left:
                for peer in self._options(group):
                    if peer not in wave:
                        worth[peer] = worth.get(peer, 0.0) + float(self._chance[group])
            if not worth:
                return wave
            best = min(worth, key=lambda peer: (-worth[peer], peer))
            wave.append(best)
            hoped |= sum(1 << group for group in left if best in self._options(group))

    def _options(self, group: int) -> list[PeerId]:
        rest = [peer for peer in self._sources[group] if peer not in self._asked]
        return [peer for peer in rest if peer in self._owners[group]] or rest[:1]
