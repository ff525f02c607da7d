"""Who owns a bucket: weighted rendezvous hashing, two owners each.  Pure.

Every node gets a score in every bucket, and the best own it.  A node's share of the buckets follows
its weight; when one comes, leaves or changes its weight, only what it gains or loses moves:
Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998), with the
logarithmic weights of Schindelhauer and Schomaker, "Weighted distributed hash tables" (2005).

Scores are floats, which two machines may round differently: one node makes the table, and the
log carries it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import PeerId
from pyagent_node.native import blake3

BUCKETS: Final = 256
"""Buckets of a mesh."""
REPLICATION: Final = 2
"""Owners of a bucket, where there are so many nodes."""

Table = tuple[tuple[PeerId, ...], ...]
"""The owners of each bucket, the first one first; empty while nobody owns anything."""

_DOMAIN: Final = b"pyagent bucket owner 1\0"
_SPAN: Final = 2.0**64


def ranking(bucket: int, weights: Mapping[PeerId, float]) -> list[PeerId]:
    """Return the nodes by their score in a bucket, the best first; those of weight 0 are left out.

    Raises :class:`InvalidRequest` (``bad_weight``).
    """
    scored = []
    for peer, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise InvalidRequest(f"The weight of {peer} is {weight}.", code="bad_weight")
        if weight:
            scored.append((-_score(bucket, peer, weight), peer))
    return [peer for _, peer in sorted(scored)]


def owner_table(
    weights: Mapping[PeerId, float], *, buckets: int = BUCKETS, replication: int = REPLICATION
) -> Table:
    """Return the owners of every bucket, empty where no node has a weight.

    Raises :class:`InvalidRequest` (``bad_weight``).
    """
    rows = tuple(tuple(ranking(bucket, weights)[:replication]) for bucket in range(buckets))
    return rows if rows and rows[0] else ()


def owners_of(table: Table, bucket: int) -> tuple[PeerId, ...]:
    """Return the owners of a bucket; nobody where there is no such bucket, or no table.

    A table of fewer rows, which the log takes if it has a power of two of them, says by a bucket's
    lower bits who owns it: none is without owners.
    """
    return table[bucket % len(table)] if table and 0 <= bucket < BUCKETS else ()


def sources(bucket: int, tables: Sequence[Table], others: Collection[PeerId]) -> tuple[PeerId, ...]:
    """Return whom to ask for what lies in a bucket: its owners, those before them, anybody else.

    ``tables`` is the one in force and then earlier ones.  The ``others`` come in the order of their
    scores: who owned the bucket before a table that is forgotten by now is among the first.
    """
    owners = [peer for table in tables for peer in owners_of(table, bucket)]
    rest = ranking(bucket, dict.fromkeys(others, 1.0))
    return tuple(dict.fromkeys((*owners, *rest)))


def _score(bucket: int, peer: PeerId, weight: float) -> float:
    digest = blake3(b"".join((_DOMAIN, bucket.to_bytes(4, "big"), peer.encode())))
    share = (int.from_bytes(digest[:8], "big") + 0.5) / _SPAN
    # Two digests in 2**11 more than half of the span round to 1, whose logarithm is 0.
    return weight / -math.log(min(share, 1 - 2.0**-53))
