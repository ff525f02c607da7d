"""The words of the design as types: slices, ranks, placements."""

from __future__ import annotations

from typing import Final, NewType

import msgspec

from pyagent_node.base.errors import InvalidRequest

PeerId = NewType("PeerId", str)
"""A libp2p peer id of an Ed25519 key in its base58 form (``12D3KooW...``)."""

Digest = NewType("Digest", str)
"""A BLAKE3-256 digest as 64 lowercase hexadecimal digits."""

SessionId = NewType("SessionId", str)
"""One generation in progress: 32 lowercase hexadecimal digits."""

AUTO_BACKEND: Final = "auto"
"""Leaves the choice of a backend to the node that loads a slice."""

EXACT_ACTIVATIONS: Final = "f32"
ACTIVATIONS: Final = (EXACT_ACTIVATIONS, "f16", "bf16")
"""In which numbers activations may cross from rank to rank; in the first one unless said."""

Backends = tuple[tuple[PeerId, str], ...]
"""Which backend nodes shall use for a model, by name; the others choose."""


ContextId = NewType("ContextId", bytes)
"""One context, whatever its name: 16 random bytes, given when it is created."""


class Slice(msgspec.Struct, frozen=True, order=True):
    """The layers ``[first, last)`` of a model; ``head`` when the output head belongs to it."""

    first: int
    last: int
    head: bool

    def __str__(self) -> str:
        return f"{self.first}-{self.last}{'+head' if self.head else ''}"


class Rank(msgspec.Struct, frozen=True):
    """Position ``rank`` of a pipeline: which node holds which slice.

    ``standbys`` keep the slice loaded and take over at once; ``spares`` keep it on disk.
    """

    rank: int
    slice: Slice
    peer_id: PeerId
    standbys: tuple[PeerId, ...] = ()
    spares: tuple[PeerId, ...] = ()


class Drafting(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the sessions of a placed model guess ahead.

    ``speculation``, with ``length`` and ``depth`` where they are fixed, holds for requests that do
    not say (``None``: the head's own setting); with ``tree`` guesses of a fixed length form one.
    ``drafter`` is a whole model that guesses for them on the node ``peer_id``, the *drafter rank*;
    both are given, or neither.
    """

    speculation: str | None = None
    length: int | None = None
    depth: int | None = None
    drafter: Digest | None = None
    peer_id: PeerId | None = None
    tree: bool | None = None


class Placement(msgspec.Struct, frozen=True, omit_defaults=True):
    """The ranks of one model under an epoch.

    ``epoch`` comes from the log and only grows; ``n_ctx`` is the context length in tokens that
    every rank reserves for each of ``n_seq`` concurrent sessions.  ``want_standbys`` and
    ``want_spares`` are how many each rank shall have, ``None`` what the mesh's settings say.
    ``drafting`` says how its sessions guess, ``None`` that nothing was said.  ``fixed``: a person
    chose the cut or the nodes, so they are not changed for more speed.  ``backends`` names those
    that a person chose.  ``activations`` says in which numbers they cross between ranks, where
    that is not :data:`EXACT_ACTIVATIONS`.
    """

    model: Digest
    epoch: int
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    want_standbys: int | None = None
    want_spares: int | None = None
    drafting: Drafting | None = None
    fixed: bool = False
    backends: Backends = ()
    activations: str = ""

    @property
    def crossing(self) -> str:
        """In which numbers activations cross between ranks."""
        return self.activations or EXACT_ACTIVATIONS

    @property
    def tail(self) -> Rank:
        """The last rank: output head and sampling."""
        return self.ranks[-1]

    def check(self, n_layers: int) -> None:
        """Check that the ranks cover layers ``[0, n_layers)`` once, in order, head last.

        Raises :class:`InvalidRequest` (``bad_placement``) naming the first rank that does not fit.
        """
        _check_cover(self.ranks, n_layers)


class Prepared(msgspec.Struct, frozen=True, omit_defaults=True):
    """The next ranks of a placed model: loaded beside those in force, which go on serving.

    ``after_epoch`` is the epoch in force; with another one there is nothing prepared any more.
    ``number`` is that of the log entry that said so and names this preparation for ever.  ``by``
    is the node that sees to it: that has it committed once everything is loaded, or drops it.
    """

    model: Digest
    number: int
    after_epoch: int
    ranks: tuple[Rank, ...]
    n_ctx: int
    n_seq: int
    by: PeerId
    backends: Backends = ()

    def check(self, n_layers: int) -> None:
        """Check the ranks as :meth:`Placement.check` does."""
        _check_cover(self.ranks, n_layers)


class ContextPolicy(msgspec.Struct, frozen=True, omit_defaults=True):
    """How long what lies in a context is good for an answer; 0 sets no limit.

    ``max_age_seconds`` counts from when a document was added, ``unused_seconds`` from when it was
    last found; beyond ``max_tokens`` in all, the oldest documents give way.
    """

    max_age_seconds: int = 0
    max_tokens: int = 0
    unused_seconds: int = 0


def _check_cover(ranks: tuple[Rank, ...], n_layers: int) -> None:
    at = 0
    for index, rank in enumerate(ranks):
        part = rank.slice
        last = index == len(ranks) - 1
        if rank.rank != index or part.first != at or part.last <= at or part.head != last:
            raise InvalidRequest(
                f"Rank {index} holds layers {part}, but layer {at} comes next"
                f" and the output head belongs to the last rank alone.",
                code="bad_placement",
                rank=index,
            )
        at = part.last
    if at != n_layers:
        raise InvalidRequest(f"The ranks cover {at} of {n_layers} layers.", code="bad_placement")


def backend_of(backends: Backends, peer: PeerId) -> str:
    """Return the backend that a node shall use, :data:`AUTO_BACKEND` where nobody chose."""
    return dict(backends).get(peer, AUTO_BACKEND)
