"""Cutting and joining :class:`KvRange`: the rows of a layer all have the same length.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.backend import KvRange, LayerKv


def part_of(kv: KvRange, start: int, stop: int) -> KvRange:
    """Return tokens ``[start, stop)`` of ``kv``, which holds them.

    Raises :class:`CorruptData` (``kv_malformed``) for rows of unequal lengths.
    """
    count = kv.stop - kv.start

    def cut(data: bytes) -> bytes:
        size = len(data) // count
        return data[(start - kv.start) * size : (stop - kv.start) * size]

    if any(len(data) % count for x in kv.layers for data in (x.keys, x.values)):
        raise CorruptData(f"KV of {count} tokens has a row of broken length.", code="kv_malformed")
    layers = tuple(LayerKv(x.layer, cut(x.keys), cut(x.values)) for x in kv.layers)
    return KvRange(kv.codec, start, stop, layers)


def joined(pieces: Sequence[KvRange]) -> KvRange:
    """Return consecutive ranges of the same layers as one.

    Raises :class:`CorruptData` (``kv_malformed``) where they are no such thing.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    names = [layer.layer for layer in first.layers]
    for before, piece in pairwise(pieces):
        same = [layer.layer for layer in piece.layers] == names and piece.codec == first.codec
        if piece.start != before.stop or not same:
            raise CorruptData(
                f"KV from {piece.start} on does not follow on KV up to {before.stop}.",
                code="kv_malformed",
            )
    layers = tuple(
        LayerKv(
            parts[0].layer,
            b"".join([part.keys for part in parts]),
            b"".join([part.values for part in parts]),
        )
        for parts in zip(*(piece.layers for piece in pieces), strict=True)
    )
    return KvRange(first.codec, first.start, pieces[-1].stop, layers)


def lacking(kv: KvRange) -> int:
    """Return of how many tokens a range has no rows."""
    return kv.stop - kv.start - sum(b - a for a, b in kv.kept) if kv.kept else 0
