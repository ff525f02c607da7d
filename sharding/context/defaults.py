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
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
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


@functools.lru_cache(maxsize=32)
def default_model(identity: str, dimensions: int, centre: bytes = b"") -> Axes:
    """Return the axes of the encoder called ``identity``, whose vectors have ``dimensions``.

    They stand around ``centre`` (:func:`encode_centre`), or where they were learned.  The same
    object comes back each time: tables of sketches are kept by it.

    Raises :class:`InvalidRequest` (``bad_sketch_bits``) for a length that no vector has, and
    (``bad_vectors``) for another one than that of the centre.
    """
    check_size(BITS, dimensions)
    axes = _axes(identity, dimensions)
    return _around(axes, decode_centre(centre, dimensions)) if centre else axes


@functools.lru_cache(maxsize=8)
def _axes(identity: str, dimensions: int) -> Axes:
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


def axes_of(embedder: Embedder, centre: bytes = b"") -> Axes:
    """Return the axes of an encoder: learned ones, or random ones around a centre.

    That is the given one (of the context), or else the one that the encoder tells.
    """
    if not centre and embedder.centre is not None:
        return _around(default_model(embedder.identity, embedder.dimensions), embedder.centre)
    return default_model(embedder.identity, embedder.dimensions, centre)


def _around(axes: Axes, centre: NDArray[np.float32]) -> Axes:
    model, buckets = axes
    return Axes(SketchModel(centre, model.steps, model.scales), Buckets(centre, buckets.axes))


def encode_centre(centre: NDArray[np.float32] | None) -> bytes:
    """Return a centre as a context keeps it: float16; nothing for ``None``."""
    return b"" if centre is None else centre.astype("<f2").tobytes()


def decode_centre(data: bytes, dimensions: int) -> NDArray[np.float32]:
    """Return the centre of some bytes.

    Raises :class:`InvalidRequest` (``bad_vectors``) where it does not have ``dimensions``.
    """
    if len(data) != 2 * dimensions:
        raise InvalidRequest(
            f"Vectors of {dimensions} numbers do not fit a centre of {len(data)} bytes.",
            code="bad_vectors",
        )
    return np.frombuffer(data, "<f2").astype(np.float32)


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
