"""What it costs to hold the sketches of a context spread over 16 nodes: the form that nodes have.

Who owns which group, whom a question goes to and when it stops is the program's own code
(``sharding.context.shares``, ``probing``, ``owners``); only the network is left out.  The node that
is asked is another one for each question, and counts as one of the nodes.  The windows that the
nodes name, 300 at most, are compared exactly.

    python -m pyagent_node.benchmarks.context_index --tokens 1000000 --cache /tmp/vectors --json
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import PeerId
from pyagent_node.sharding.context.catalog import SKETCH_BYTES
from pyagent_node.sharding.context.defaults import Axes
from pyagent_node.sharding.context.index import RERANKED
from pyagent_node.sharding.context.owners import owner_table
from pyagent_node.sharding.context.probing import LOOKED, Probe, chances
from pyagent_node.sharding.context.records import ChunkId
from pyagent_node.sharding.context.shares import GROUPS
from pyagent_node.sharding.context.sketches import Sketches

if TYPE_CHECKING:
    from pyagent_node.benchmarks.context_index import Row, Searched

NODES: Final = 16
PLACE_BYTES: Final = 3
"""Of a window in a part: its place in the chunk, and its group."""
STEPS: Final = (1, 2, 4, 6, 8, 16)


def sharded(found: Searched, axes: Axes) -> Row:
    """Return recall@8 against the number of nodes asked, and what asking by need comes to."""
    peers = [PeerId(f"node{number:02}") for number in range(NODES)]
    table = owner_table(dict.fromkeys(peers, 1.0))
    groups = axes.buckets.of(found.vectors) & (GROUPS - 1)
    sketches = Sketches.of(axes.model, found.vectors)
    owned = {peer: _set(g for g in range(GROUPS) if peer in table[g]) for peer in peers}
    held = [float(np.isin(groups, _members(owned[peer])).sum()) for peer in peers]
    hits = dict.fromkeys(STEPS, 0)
    needed = 0
    contacted: list[int] = []

    def answers(number: int, served: int) -> list[int]:
        """Return the chunks that some groups lead to, best first."""
        rows = np.flatnonzero(np.isin(groups, _members(served))).astype(np.uint32)
        if not len(rows):
            return []
        some = Sketches(sketches.model, sketches.packed[rows], sketches.weights[rows])
        question = found.questions[number]
        best = rows[some.nearest(question, RERANKED)[0]]
        order = np.argsort(-(found.vectors[best] @ question), kind="stable")
        return list(dict.fromkeys(found.chunk_of[best[order]].tolist()))

    for number, wanted in enumerate(found.answers):
        chance = chances(axes.buckets, found.questions[number])
        here = peers[number % NODES]
        order = _order(chance, table, owned, here)
        for step in STEPS:
            served = 0
            for peer in order[:step]:
                served |= owned[peer]
            hits[step] += bool(wanted & set(answers(number, served)[:8]))
        others = [[peer for peer in row if peer != here] for row in table]
        probe, met = Probe(chance, others, table), {here}
        while groups_now := probe.step():
            probe.served(groups_now & owned[here])
            while wave := probe.wave():
                met |= wave.keys()
                for wanted_there in wave.values():
                    probe.served(wanted_there)
            top = answers(number, probe.groups)[:LOOKED]
            probe.look(frozenset(ChunkId(chunk.to_bytes(16, "big")) for chunk in top))
        needed += bool(wanted & set(answers(number, probe.groups)[:8]))
        contacted.append(len(met))
    count = max(1, len(found.answers))
    row: Row = {f"nodes_{step}": round(hits[step] / count, 4) for step in STEPS}
    row["recall_at_8"] = round(needed / count, 4)
    row["nodes_asked"] = round(float(np.mean(contacted)), 2)
    row["nodes_asked_fraction"] = round(float(np.mean(contacted)) / NODES, 4)
    row["bytes_a_node"] = round(float(np.mean(held)) * (SKETCH_BYTES + PLACE_BYTES))
    row["bytes_largest_node"] = round(max(held) * (SKETCH_BYTES + PLACE_BYTES))
    row["bytes_a_node_replicated"] = len(groups) * SKETCH_BYTES
    return row


def _order(
    chance: NDArray[np.float64],
    table: tuple[tuple[PeerId, ...], ...],
    owned: dict[PeerId, int],
    here: PeerId,
) -> list[PeerId]:
    """Return all nodes in the order in which they are asked one by one."""
    order, served = [here], owned[here]
    while len(order) < len(owned):
        rest = [peer for peer in owned if peer not in order]
        best = max(rest, key=lambda peer: float(chance[_members(owned[peer] & ~served)].sum()))
        order.append(best)
        served |= owned[best]
    return order


def _set(groups: Iterable[int]) -> int:
    return sum(1 << group for group in groups)


def _members(groups: int) -> list[int]:
    return [group for group in range(GROUPS) if groups >> group & 1]
