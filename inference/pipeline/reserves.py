"""Who could take over which rank: standbys and spares.  Pure.

A standby keeps the rank's slice loaded and costs as much memory as the rank; a spare keeps the file
and costs none.  What is there already stays as long as it is good, so that a plan made again and
again does not wander.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import msgspec

from pyagent_node.base.types import PeerId, Rank
from pyagent_node.inference.pipeline.plan_types import MEMORY_SHARE, ModelShape, NodeFacts


class ReserveOptions(msgspec.Struct, frozen=True):
    """How many ``standbys`` and ``spares`` each rank shall have.

    Ranks in ``leaving`` must be taken over soon: they get a standby at least.  ``pending`` are
    bytes of memory, by node, that are promised to runners that are not loaded yet.
    """

    n_ctx: int
    n_seq: int
    standbys: int
    spares: int
    leaving: frozenset[int] = frozenset()
    pending: Mapping[PeerId, int] = {}


def choose_reserves(
    model: ModelShape,
    ranks: Sequence[Rank],
    nodes: Sequence[NodeFacts],
    options: ReserveOptions,
    *,
    good: AbstractSet[PeerId],
) -> tuple[Rank, ...]:
    """Return ``ranks`` with their standbys and spares, as many as there is room for.

    Those of ``ranks`` that are in ``good`` stay, the others go.  New ones come from ``nodes``, of
    which ``memory_bytes`` is what is free now; those that want no work are not asked.
    """
    return _Chooser(model, ranks, nodes, options, good).run()


class _Chooser:
    def __init__(
        self,
        model: ModelShape,
        ranks: Sequence[Rank],
        nodes: Sequence[NodeFacts],
        options: ReserveOptions,
        good: AbstractSet[PeerId],
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._nodes = [node for node in nodes if node.usable and node.willing]
        self._options = options
        self._serving = Counter(rank.peer_id for rank in ranks)
        self._room = {
            node.peer_id: int(node.memory_bytes * MEMORY_SHARE)
            - options.pending.get(node.peer_id, 0)
            for node in self._nodes
        }
        self._standbys = [
            [p for p in rank.standbys if p in good][: self._want(rank)] for rank in ranks
        ]
        self._spares = [
            [p for p in rank.spares if p in good and p not in self._standbys[at]]
            for at, rank in enumerate(ranks)
        ]

    def _want(self, rank: Rank) -> int:
        return max(self._options.standbys, int(rank.rank in self._options.leaving))

    def run(self) -> tuple[Rank, ...]:
        """Choose, one for each rank in turn, so that little memory is shared out fairly."""
        for count in range(1, max(map(self._want, self._ranks), default=0) + 1):
            for at, rank in enumerate(self._ranks):
                if len(self._standbys[at]) < min(count, self._want(rank)):
                    self._add_standby(at, rank)
        for count in range(1, self._options.spares + 1):
            for at, rank in enumerate(self._ranks):
                if len(self._spares[at]) < count:
                    self._add_spare(at, rank)
        return tuple(
            msgspec.structs.replace(
                rank,
                standbys=tuple(self._standbys[at]),
                spares=tuple(self._spares[at][: self._options.spares]),
            )
            for at, rank in enumerate(self._ranks)
        )

    def _add_standby(self, at: int, rank: Rank) -> None:
        options = self._options
        need = self._model.needs(rank.slice, n_ctx=options.n_ctx, n_seq=options.n_seq)
        used = Counter(peer for chosen in self._standbys for peer in chosen)
        able = [
            node
            for node in self._nodes
            if node.peer_id != rank.peer_id
            and node.peer_id not in self._standbys[at]
            and self._room[node.peer_id] >= need
        ]
        if not able:
            return
        best = min(
            able,
            key=lambda node: (
                self._serving[node.peer_id] + used[node.peer_id],
                self._serving[node.peer_id] > 0,
                node.peer_id not in self._spares[at],
                not _holds(node, rank),
                -self._room[node.peer_id],
                node.peer_id,
            ),
        )
        self._room[best.peer_id] -= need
        self._standbys[at].append(best.peer_id)
        if best.peer_id in self._spares[at]:
            self._spares[at].remove(best.peer_id)

    def _add_spare(self, at: int, rank: Rank) -> None:
        taken = {rank.peer_id, *self._standbys[at], *self._spares[at]}
        used = Counter(peer for chosen in (*self._spares, *self._standbys) for peer in chosen)
        able = [node for node in self._nodes if node.peer_id not in taken]
        if able:
            best = min(
                able,
                key=lambda node: (not _holds(node, rank), used[node.peer_id], node.peer_id),
            )
            self._spares[at].append(best.peer_id)


def _holds(node: NodeFacts, rank: Rank) -> bool:
    """Whether the bytes of the rank's slice lie on the node's disk."""
    part = rank.slice
    return any(
        held.first <= part.first and part.last <= held.last and (held.head or not part.head)
        for held in node.held
    )
