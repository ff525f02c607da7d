"""Who gets, gives and asks for KV blocks, by the log.  Pure.

The log gives layers of a model to nodes: ranks compute them, standbys keep them loaded, and the
nodes of a placement that is being prepared will.  Whoever was given a layer may ask for its blocks;
only who computes it may send them, to its backups and to who will have the layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from pyagent_node.base.errors import Refused
from pyagent_node.base.types import Digest, PeerId, Placement, Rank
from pyagent_node.consensus.port import ClusterState

BACKUPS: Final = 2
"""Nodes that keep the blocks of a rank besides itself, where there are so many."""


def given(state: ClusterState, model: Digest, peer: PeerId) -> frozenset[int]:
    """Return the layers of ``model`` that ``peer`` computes, stands by for, or will."""
    return _layers(r for r in _ranks(state, model) if peer in (r.peer_id, *r.standbys))


def computed(state: ClusterState, model: Digest, peer: PeerId) -> frozenset[int]:
    """Return the layers of ``model`` that ``peer`` computes now, or will."""
    return _layers(rank for rank in _ranks(state, model) if peer == rank.peer_id)


def epoch_of(state: ClusterState, model: Digest) -> int:
    """Return the epoch of the model's placement, 0 for none."""
    placement = state.placements.get(model)
    return 0 if placement is None else placement.epoch


def targets(
    state: ClusterState, model: Digest, here: PeerId, layers: range
) -> dict[PeerId, tuple[int, ...]]:
    """Return who is to have blocks of ``layers`` that the node ``here`` computed, and which.

    Those that may take its ranks over (see :func:`backups`), and the nodes that a placement in
    preparation gives the layers to.
    """
    found: dict[PeerId, set[int]] = {}
    placement = state.placements.get(model)
    if placement is not None:
        for rank in placement.ranks:
            if rank.peer_id == here:
                _add(found, backups(placement, rank), rank, layers)
    for rank in _prepared(state, model):
        _add(found, (rank.peer_id,), rank, layers)
    found.pop(here, None)
    return {peer: tuple(sorted(own)) for peer, own in sorted(found.items()) if own}


def backups(placement: Placement, rank: Rank) -> tuple[PeerId, ...]:
    """Return who keeps the blocks of a rank, besides itself.

    Its standbys; where these are fewer than :data:`BACKUPS`, also its spares, then the nodes of the
    other ranks from the next one on: some node shall have them when this one dies together with
    a standby, whichever takes its place.
    """
    after = (*placement.ranks[rank.rank + 1 :], *placement.ranks[: rank.rank])
    others = (*rank.standbys, *rank.spares, *(other.peer_id for other in after))
    found = tuple(peer for peer in dict.fromkeys(others) if peer != rank.peer_id)
    return found[: max(BACKUPS, len(rank.standbys))]


def likely_sources(state: ClusterState, model: Digest, layers: range) -> tuple[PeerId, ...]:
    """Return the nodes that should have blocks of ``layers``: who computes them, then standbys."""
    ranks = [r for r in _ranks(state, model) if _overlaps(r, layers)]
    named = [r.peer_id for r in ranks]
    named += [peer for r in ranks for peer in r.standbys]
    return tuple(dict.fromkeys(named))


def check_reader(state: ClusterState, model: Digest, peer: PeerId, layers: range) -> None:
    """Raise :class:`Refused` (``kv_not_yours``) unless the log gives the layers to ``peer``."""
    if not given(state, model, peer).issuperset(layers):
        raise Refused(
            f"{peer} was not given layers {layers.start} to {layers.stop} of this model.",
            code="kv_not_yours",
            remedy="Only ranks and standbys of a model read its KV blocks.",
        )


def check_writer(
    state: ClusterState, model: Digest, peer: PeerId, here: PeerId, layers: range
) -> None:
    """Raise :class:`Refused` unless ``peer`` computes the layers and ``here`` is to have them.

    Codes: ``kv_not_yours`` and ``kv_not_wanted``.
    """
    if not computed(state, model, peer).issuperset(layers):
        raise Refused(
            f"{peer} does not compute layers {layers.start} to {layers.stop} of this model.",
            code="kv_not_yours",
        )
    if not set(layers).issubset(targets(state, model, peer, layers).get(here, ())):
        raise Refused(
            f"This node is no backup for layers {layers.start} to {layers.stop} of this model.",
            code="kv_not_wanted",
        )


def _ranks(state: ClusterState, model: Digest) -> Iterator[Rank]:
    placement = state.placements.get(model)
    if placement is not None:
        yield from placement.ranks
    yield from _prepared(state, model)


def _prepared(state: ClusterState, model: Digest) -> Sequence[Rank]:
    """Return the ranks of the placement that is being prepared."""
    placement, prepared = state.placements.get(model), state.prepared.get(model)
    if placement is None or prepared is None or prepared.after_epoch != placement.epoch:
        return ()
    return prepared.ranks


def _add(found: dict[PeerId, set[int]], peers: Iterable[PeerId], rank: Rank, layers: range) -> None:
    own = set(layers).intersection(range(rank.slice.first, rank.slice.last))
    for peer in peers:
        found.setdefault(peer, set()).update(own)


def _layers(ranks: Iterable[Rank]) -> frozenset[int]:
    return frozenset(layer for rank in ranks for layer in range(rank.slice.first, rank.slice.last))


def _overlaps(rank: Rank, layers: range) -> bool:
    return rank.slice.first < layers.stop and layers.start < rank.slice.last
