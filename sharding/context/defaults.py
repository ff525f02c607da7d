"""The sketch model and the buckets of an encoder: fixed, so that no node has to agree on them.

Those of MiniLM were learned from texts of many kinds (``benchmarks/context_axes.py``) and travel
with this package.  An encoder that has no axes of its own here gets random ones, the same on every
node, around the mean of its vectors of some fixed texts (:func:`calibration_texts`): a rotation
keeps distances, and signs along random axes keep neighbours, if not as well as learned ones.
Pure, but for the files of the package.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Final, NamedTuple

import numpy as np

from pyagent_node.base.errors import CorruptData
from pyagent_node.native import blake3
from pyagent_node.sharding.context.embedder import Embedder, Vectors
from pyagent_node.sharding.context.sketches import (
    BITS,
    Buckets,
    SketchModel,
    check_size,
    random_axes,
)

BUCKET_BITS: Final = 8
"""A bucket is one of 256."""
LEARNED: Final = ("minilm.axes",)
"""Files of this package that :func:`encode_axes` made."""
_SKETCH_SEED: Final = 0x736B6574
_BUCKET_SEED: Final = 0x6275636B
_MAGIC: Final = b"pyagent axes 1\0\0"
_SUM: Final = 32
_SIZES: Final = 4


def calibration_texts() -> list[str]:
    """Return the texts whose vectors' mean is the centre of an encoder without learned axes."""
    data = (files("pyagent_node.sharding.context") / "calibration.txt").read_text("utf-8")
    return [text for text in data.split("\n\n") if text.strip()]


class Axes(NamedTuple):
    """What sketches and buckets of an encoder's vectors are made with."""

    model: SketchModel
    buckets: Buckets


@functools.lru_cache(maxsize=8)
def default_model(identity: str, dimensions: int) -> Axes:
    """Return the axes of the encoder called ``identity``, whose vectors have ``dimensions``.

    Raises :class:`InvalidRequest` (``bad_sketch_bits``) for a length that no vector has.
    """
    check_size(BITS, dimensions)
    for name in LEARNED:
        data = (files("pyagent_node.sharding.context") / name).read_bytes()
        whose, axes = decode_axes(data)
        if (whose, axes.model.dimensions) == (identity, dimensions):
            return axes
    rotated = random_axes(BITS, dimensions, _SKETCH_SEED)
    centre = np.zeros(dimensions, np.float32)
    return Axes(
        SketchModel.of_axes(centre, rotated),
        Buckets(centre, random_axes(BUCKET_BITS, dimensions, _BUCKET_SEED).astype(np.float32)),
    )


def axes_of(embedder: Embedder) -> Axes:
    """Return the axes of an encoder: learned ones, or random ones around the centre it tells."""
    axes = default_model(embedder.identity, embedder.dimensions)
    centre = embedder.centre
    if centre is None:
        return axes
    model, buckets = axes
    return Axes(SketchModel(centre, model.steps, model.scales), Buckets(centre, buckets.axes))


def learn_axes(vectors: Vectors, bucket_bits: int = BUCKET_BITS) -> Axes:
    """Learn axes from vectors; raises :class:`InvalidRequest` as the two ``train`` do."""
    return Axes(SketchModel.train(vectors), Buckets.train(vectors, bucket_bits))


def encode_axes(axes: Axes, identity: str) -> bytes:
    """Return the bytes of a file of axes."""
    model, buckets = axes
    whose = identity.encode()
    sizes = (model.bits, model.dimensions, len(buckets.axes), len(whose))
    content = b"".join(
        (
            _MAGIC,
            np.array(sizes, "<u4").tobytes(),
            whose,
            model.centre.astype("<f4").tobytes(),
            model.scales.astype("<f4").tobytes(),
            model.steps.tobytes(),
            buckets.axes.astype("<f4").tobytes(),
        )
    )
    return content + blake3(content)


def decode_axes(data: bytes) -> tuple[str, Axes]:
    """Return whose axes a file has, and them; raises :class:`CorruptData` (``axes_corrupt``)."""
    content = data[:-_SUM]
    head = len(_MAGIC) + _SIZES * 4
    if not data.startswith(_MAGIC) or len(data) < head + _SUM or blake3(content) != data[-_SUM:]:
        raise CorruptData(
            "The axes of an encoder are damaged.",
            code="axes_corrupt",
            remedy="Install pyagent-node anew.",
        )
    bits, dimensions, own, length = map(int, np.frombuffer(content[len(_MAGIC) : head], "<u4"))
    whose = content[head : head + length].decode()
    at = head + length
    centre = np.frombuffer(content, "<f4", dimensions, at).astype(np.float32)
    at += centre.nbytes
    scales = np.frombuffer(content, "<f4", bits, at).astype(np.float32)
    at += scales.nbytes
    steps = np.frombuffer(content, np.int8, bits * dimensions, at).reshape(bits, dimensions)
    at += steps.nbytes
    axes = np.frombuffer(content, "<f4", own * dimensions, at).reshape(own, dimensions)
    model = SketchModel(centre, steps, scales)
    return whose, Axes(model, Buckets(centre, axes.astype(np.float32)))
