"""The sketch model and the buckets of an encoder: fixed, so that no node has to agree on them.

An encoder that has no axes of its own here gets random ones, the same on every node: a rotation
keeps distances, and signs along random axes keep neighbours, if not as well as learned ones.  Pure.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import numpy as np

from pyagent_node.sharding.context.sketches import (
    BITS,
    Buckets,
    SketchModel,
    check_size,
    random_axes,
)

BUCKET_BITS: Final = 8
"""A bucket is one of 256."""
_SKETCH_SEED: Final = 0x736B6574
_BUCKET_SEED: Final = 0x6275636B


class Axes(NamedTuple):
    """What sketches and buckets of an encoder's vectors are made with."""

    model: SketchModel
    buckets: Buckets


@functools.lru_cache(maxsize=8)
def default_model(identity: str, dimensions: int) -> Axes:
    """Return the axes of the encoder called ``identity``, whose vectors have ``dimensions``.

    Raises :class:`InvalidRequest` (``bad_sketch_bits``) for a length that no vector has.
    """
    del identity  # none has axes of its own yet
    check_size(BITS, dimensions)
    rotated = random_axes(BITS, dimensions, _SKETCH_SEED)
    centre = np.zeros(dimensions, np.float32)
    return Axes(
        SketchModel.of_axes(centre, rotated),
        Buckets(centre, random_axes(BUCKET_BITS, dimensions, _BUCKET_SEED).astype(np.float32)),
    )
