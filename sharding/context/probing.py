"""Which nodes a question to spread sketches goes to, and what comes of their answers.  Pure.

A window like the question has most likely the signs that the question's vector has, and the nearer
that one lies to a border the likelier the other sign: so every group of windows has a chance
(:func:`chances`).  Groups are looked through in steps, the likeliest first (:func:`steps`), until
what is left has hardly a chance or a step has changed nothing (:class:`Probe`).  Which groups those
are follows from the question's vector and from what is in them, and windows of no others count: so
it is the same whoever asks, and whatever that one has itself.  (Margin-ordered probes: Lv,
Josephson, Wang, Charikar and Li, "Multi-Probe LSH", VLDB 2007.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import PeerId
from pyagent_node.sharding.context.catalog import Catalog
from pyagent_node.sharding.context.index import RERANKED
from pyagent_node.sharding.context.records import ChunkId
from pyagent_node.sharding.context.search import Candidate
from pyagent_node.sharding.context.shares import ALL_GROUPS, GROUP_BITS, GROUPS
from pyagent_node.sharding.context.sketches import Buckets, Sketches
from pyagent_node.sharding.context.tables import GROUP_UNKNOWN, Table

SCALE: Final = 0.05
"""How far from a border a sign is three times as likely as the other (chosen on MiniLM)."""
FIRST: Final = 0.9
"""The groups of the first step have so much chance together,"""
STEP: Final = 8
"""a later step has so many groups more,"""
REST: Final = 0.01
"""and groups of so little chance together are not asked for."""
LOOKED: Final = 16
"""The best chunks by their sketches: a step that changes none of them is the last."""
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


def steps(chance: NDArray[np.float64]) -> list[int]:
    """Return the sets of groups to look through, each with all of the one before, likeliest first.

    The last one leaves no more than :data:`REST` of the chance out.
    """
    found: list[int] = []
    groups, rest, more = 0, 1.0, 0
    for group in sorted(range(GROUPS), key=lambda each: (-chance[each], each)):
        groups |= 1 << group
        rest -= float(chance[group])
        more += 1
        last = rest <= REST or groups == ALL_GROUPS
        if last or (more >= STEP if found else rest <= 1 - FIRST):
            found.append(groups)
            more = 0
        if last:
            break
    return found


def likely(
    table: Table,
    vector: NDArray[np.float32],
    groups: int = ALL_GROUPS,
    count: int = RERANKED,
    *,
    without: Collection[tuple[str, int]] = (),
) -> list[Likely]:
    """Return the ``count`` likeliest windows in some groups by their sketches, by chunk.

    Those of chunks ``without`` (source and place) do not count.

    Of records that are not bare all windows count: in which groups they are their sketches do not
    tell.  Such stand beside bare ones only until the sketches of a context lie spread.
    """
    sketches, at = table.sketches, np.arange(len(table.sketches))
    if groups != ALL_GROUPS or without:
        wanted = np.ones(GROUP_UNKNOWN + 1, bool)
        wanted[:GROUPS] = [bool(groups >> group & 1) for group in range(GROUPS)]
        counts = wanted[table.groups]
        if without:
            counts &= ~_rows_of(table, without)
        at = np.flatnonzero(counts)
        sketches = Sketches(sketches.model, sketches.packed[at], sketches.weights[at])
    if not len(at):
        return []
    best, estimates = sketches.nearest(vector, count)
    rows = at[best]
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for row, estimate in zip(rows, estimates, strict=True):
        chunk = (int(table.documents[row]), int(table.ordinals[row]))
        found.setdefault(chunk, []).append((int(table.places[row]), float(estimate)))
    return [
        Likely(
            table.records[document].id_of(ordinal),
            tuple(place for place, _ in own),
            tuple(estimate for _, estimate in own),
        )
        for (document, ordinal), own in found.items()
    ]


def _rows_of(table: Table, chunks: Collection[tuple[str, int]]) -> NDArray[np.bool_]:
    """Return which windows of a table are of some chunks."""
    numbers = {record.source: number for number, record in enumerate(table.records)}
    keys = [(numbers[source] << 32) + at for source, at in chunks if source in numbers]
    rows = (table.documents.astype(np.uint64) << np.uint64(32)) + table.ordinals
    return np.isin(rows, np.array(keys, np.uint64))


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
    """Says which groups to look through next, and whom to ask for them.

    ``sources`` has for each group the nodes that may have it, those that own it first; ``owners``
    are those.  All owners of a group are equally good.  A step is looked through to its end before
    the next one begins, so that neither the asker nor who answers first makes a difference.
    """

    def __init__(
        self,
        chance: NDArray[np.float64],
        sources: Sequence[Sequence[PeerId]],
        owners: Sequence[Collection[PeerId]],
    ) -> None:
        self._chance, self._sources, self._owners = chance, sources, owners
        self._steps = steps(chance)
        self._next = 0
        self._served = 0
        self._asked: list[set[PeerId]] = [set() for _ in range(GROUPS)]
        self._met: set[PeerId] = set()
        self._top: frozenset[ChunkId] | None = None
        self._settled = False
        self._looked = 0

    @property
    def groups(self) -> int:
        """The groups of all steps so far."""
        return self._steps[self._next - 1] if self._next else 0

    @property
    def short(self) -> bool:
        """Whether there are groups that should have been answered for, and were not."""
        wanted = self.groups if self._settled else self._steps[-1]
        left = _members(wanted & ~self._served)
        return float(sum(self._chance[group] for group in left)) > REST

    def step(self) -> int:
        """Begin the next step; returns the groups that are new in it, 0 when it is enough."""
        if self._settled or self._next == len(self._steps):
            return 0
        before = self.groups
        self._next += 1
        return self.groups & ~before

    def served(self, groups: int) -> None:
        """Note that somebody has answered for ``groups``."""
        self._served |= groups

    def look(self, top: frozenset[ChunkId]) -> None:
        """Note what the best chunks are after a step; one that nobody answered says nothing."""
        if self._served != self._looked:
            self._settled = bool(top) and top == self._top
            self._top, self._looked = top, self._served

    def wave(self) -> dict[PeerId, int]:
        """Return the nodes to ask now, and for which groups; none when there is nobody else.

        As few nodes as will do, those that were asked before rather than others.
        """
        left = {
            group: options
            for group in _members(self.groups & ~self._served)
            if (options := self._options(group))
        }
        wave: dict[PeerId, int] = {}
        while left:
            worth = Counter(peer for options in left.values() for peer in options)
            best = min(worth, key=lambda peer: (-worth[peer], peer not in self._met, peer))
            own = [group for group, options in left.items() if best in options]
            wave[best] = sum(1 << group for group in own)
            self._met.add(best)
            for group in own:
                self._asked[group].add(best)
                del left[group]
        return wave

    def _options(self, group: int) -> list[PeerId]:
        rest = [peer for peer in self._sources[group] if peer not in self._asked[group]]
        return [peer for peer in rest if peer in self._owners[group]] or rest[:1]


def _members(groups: int) -> list[int]:
    return [group for group in range(GROUPS) if groups >> group & 1]
