"""What a node has to hold so that every placement is as the log says.  Pure.

A runner is named by what it computes, not by the placement that asks for it: the same slice with
the same context stays loaded through any number of epochs, and whether it serves a rank or waits
as a standby is decided from one entry of the log to the next.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pyagent_node.base.types import (
    AUTO_BACKEND,
    Digest,
    PeerId,
    Placement,
    Prepared,
    Rank,
    Slice,
    backend_of,
)


class RunnerKey(NamedTuple):
    """A loaded slice with room for ``n_seq`` sessions of ``n_ctx`` tokens.

    ``backend`` is one that a person chose, or :data:`AUTO_BACKEND`.
    """

    model: Digest
    slice: Slice
    n_ctx: int
    n_seq: int
    backend: str = AUTO_BACKEND

    def __str__(self) -> str:
        return f"the runner of layers {self.slice}"


class SpareKey(NamedTuple):
    """A slice on disk."""

    model: Digest
    slice: Slice

    def __str__(self) -> str:
        return f"the spare of layers {self.slice}"


class HeadKey(NamedTuple):
    """The embeddings and the tokenizer of a model."""

    model: Digest

    def __str__(self) -> str:
        return "the head"


Key = RunnerKey | SpareKey | HeadKey


class Wanted(NamedTuple):
    """What one node has to hold; ``stages`` are the ranks it serves, by (model, rank)."""

    runners: frozenset[RunnerKey]
    spares: frozenset[SpareKey]
    heads: frozenset[HeadKey]
    stages: dict[tuple[Digest, int], Placement]

    @property
    def keys(self) -> frozenset[Key]:
        """Everything that is to be kept."""
        return self.runners | self.spares | self.heads

    def slices(self, model: Digest) -> frozenset[Slice]:
        """Return the slices of a model whose files are needed here."""
        loaded = (key.slice for key in self.runners if key.model == model)
        return frozenset(loaded) | {key.slice for key in self.spares if key.model == model}


NOTHING = Wanted(frozenset(), frozenset(), frozenset(), {})


def runner_key(placement: Placement | Prepared, rank: Rank, peer: PeerId) -> RunnerKey:
    """Return the runner with which ``peer`` serves ``rank``, or stands by for it."""
    return RunnerKey(
        placement.model,
        rank.slice,
        placement.n_ctx,
        placement.n_seq,
        backend_of(placement.backends, peer),
    )


def wanted(
    placements: Collection[Placement], peer_id: PeerId, prepared: Collection[Prepared] = ()
) -> Wanted:
    """Return what the node ``peer_id`` has to hold.

    Every node holds the head of every placed model, so that it can take requests.  What is
    ``prepared`` is held beside, and serves nothing yet; the same slice is held once.
    """
    runners: set[RunnerKey] = set()
    spares: set[SpareKey] = set()
    heads: set[HeadKey] = set()
    stages: dict[tuple[Digest, int], Placement] = {}
    for placement in placements:
        heads.add(HeadKey(placement.model))
        for rank in placement.ranks:
            if rank.peer_id == peer_id:
                stages[placement.model, rank.rank] = placement
    held: list[Placement | Prepared] = [*placements, *prepared]
    for each in held:
        for rank in each.ranks:
            if peer_id in (rank.peer_id, *rank.standbys):
                runners.add(runner_key(each, rank, peer_id))
            elif peer_id in rank.spares:
                spares.add(SpareKey(each.model, rank.slice))
    return Wanted(frozenset(runners), frozenset(spares), frozenset(heads), stages)
