"""Sketches: a vector in 256 bits, to pick the few hundred that are compared exactly.  Pure.

A model is learned from vectors: their mean, their principal axes, and a random rotation of those,
so that each bit carries as much as any other (Gong and Lazebnik, "Iterative quantization", CVPR
2011, with its random start).  A sketch is the signs of the centred vector along the rotated axes.
The query keeps its floats.  A weight beside each sketch undoes what cutting to signs did to that
one vector's length (Gao and Long, "RaBitQ", SIGMOD 2024).

The axes are kept in 8 bits, exactly as they travel: whoever holds a model makes the same sketches.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.native import lsh_probes, sketch_pack, sketch_scan
from pyagent_node.sharding.context.embedder import Vectors

Rows = NDArray[np.uint32]
"""Numbers of windows."""

BITS: Final = 256
MAX_BITS: Final = 4096
MAX_DIMENSIONS: Final = 4096
MAX_BUCKET_BITS: Final = 30
TRAINING_ROWS: Final = 1 << 16
"""More vectors than these teach nothing: evenly spaced ones are taken."""
MAX_NUMBER: Final = 1e3
"""The largest number in a vector or a model: with it no sum gets near infinity."""
_LEVELS: Final = 127


class SketchModel:
    """The mean of the vectors, and the axes: ``steps[i, j] * scales[i]``, int8 by float32.

    ``steps`` is ``[bits, dimensions]``.  Read-only.
    """

    def __init__(
        self, centre: NDArray[np.float32], steps: NDArray[np.int8], scales: NDArray[np.float32]
    ) -> None:
        bits, dimensions = steps.shape
        check_size(bits, dimensions)
        if centre.shape != (dimensions,) or scales.shape != (bits,):
            raise InvalidRequest(
                "The parts of a sketch model do not fit together.", code="bad_sketch_model"
            )
        self.centre, self.steps, self.scales = centre, steps, scales
        self._axes = steps.astype(np.float32) * scales[:, None]

    @property
    def bits(self) -> int:
        """Bits of a sketch."""
        return int(self.steps.shape[0])

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        return int(self.steps.shape[1])

    @classmethod
    def train(cls, vectors: Vectors, *, bits: int = BITS, seed: int = 0) -> SketchModel:
        """Learn a model; the same vectors and seed give the same one on the same machine.

        Raises :class:`InvalidRequest`: ``bad_vectors``, ``bad_sketch_bits``.
        """
        check_vectors(vectors)
        check_size(bits, vectors.shape[1])
        if bits > vectors.shape[1]:
            raise InvalidRequest(
                f"Vectors of {vectors.shape[1]} numbers have no {bits} axes.",
                code="bad_sketch_bits",
                remedy=f"Take at most {vectors.shape[1] // 8 * 8} bits.",
            )
        centre, axes = _principal(vectors)
        return cls.of_axes(centre.astype(np.float32), _upright(bits, bits, seed) @ axes[:bits])

    @classmethod
    def of_axes(cls, centre: NDArray[np.float32], axes: NDArray[np.float64]) -> SketchModel:
        """Return the model of some axes, ``[bits, dimensions]``, none of them all zero."""
        scales = (np.abs(axes).max(axis=1) / _LEVELS).astype(np.float32)
        steps = np.rint(axes / scales[:, None]).clip(-_LEVELS, _LEVELS).astype(np.int8)
        return cls(centre, steps, scales)

    def aim(self, question: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the direction to look in for a question's vector: away from the centre, unit.

        What is like everything is like any question too.  Taking the centre off the question
        takes that away from every window's inner product, and leaves their vectors as they are.
        """
        check_vectors(question[None], self.dimensions)
        aimed = question - self.centre
        norm = float(np.linalg.norm(aimed))
        return question if norm < 1e-6 else (aimed / np.float32(norm)).astype(np.float32)

    def project(self, vectors: Vectors) -> NDArray[np.float32]:
        """Return the coordinates of vectors along the axes, ``[n, bits]``, without centring."""
        check_vectors(vectors, self.dimensions)
        return np.ascontiguousarray(vectors @ self._axes.T, np.float32)

    def sketch(self, vectors: Vectors) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
        """Return sketches, ``[n, bits / 8]``, and their weights, ``[n]``."""
        check_vectors(vectors, self.dimensions)
        at = np.ascontiguousarray((vectors - self.centre) @ self._axes.T, np.float32)
        packed = sketch_pack(at.reshape(-1), self.bits).reshape(len(at), self.bits // 8)
        reach = np.abs(at).sum(axis=1)
        weights = (at * at).sum(axis=1) / np.maximum(reach, 1e-9)
        return packed, np.minimum(weights, MAX_NUMBER).astype(np.float16)


class Sketches:
    """The sketches of windows, ``packed`` ``[n, bits / 8]``, and their ``weights`` ``[n]``."""

    def __init__(
        self, model: SketchModel, packed: NDArray[np.uint8], weights: NDArray[np.float16]
    ) -> None:
        if packed.shape != (len(weights), model.bits // 8):
            raise InvalidRequest(
                "The sketches do not have the size of their model.", code="bad_sketches"
            )
        self.model, self.packed, self.weights = model, packed, weights
        self._flat = np.ascontiguousarray(packed).reshape(-1)
        self._weights = weights.astype(np.float32)

    @classmethod
    def of(cls, model: SketchModel, vectors: Vectors) -> Sketches:
        """Sketch vectors."""
        return cls(model, *model.sketch(vectors))

    def __len__(self) -> int:
        return len(self.weights)

    def nearest(self, query: NDArray[np.float32], count: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the windows most like ``query`` and estimates of their likeness, best first.

        An estimate is the inner product less a number that is the same for all windows.
        """
        if count < 1:
            raise InvalidRequest(f"{count} windows cannot be looked for.", code="bad_count")
        turned = self.model.project(query[None])[0]
        return sketch_scan(self._flat, turned, min(count, len(self)), self._weights)


class Buckets:
    """The windows by bucket: the signs of their centred coordinates along the first principal axes.

    For an index that is spread over nodes: a node holds whole buckets, and a question goes to the
    nodes of the likeliest ones.  Unlike in a sketch the axes are not rotated: the few that say
    most about a vector are what keeps neighbours together.
    ``axes`` is ``[bits, dimensions]``.
    """

    def __init__(self, centre: NDArray[np.float32], axes: NDArray[np.float32]) -> None:
        if axes.ndim != 2 or not 1 <= len(axes) <= MAX_BUCKET_BITS:
            raise InvalidRequest(
                f"Buckets have 1 to {MAX_BUCKET_BITS} bits.", code="bad_bucket_bits"
            )
        if centre.shape != axes.shape[1:]:
            raise InvalidRequest("The centre does not fit the axes.", code="bad_bucket_bits")
        self.centre, self.axes = centre, axes

    @classmethod
    def train(cls, vectors: Vectors, bits: int) -> Buckets:
        """Learn buckets; raises :class:`InvalidRequest`: ``bad_vectors``, ``bad_bucket_bits``."""
        check_vectors(vectors)
        if not 1 <= bits <= min(MAX_BUCKET_BITS, vectors.shape[1]):
            raise InvalidRequest(
                f"Vectors of {vectors.shape[1]} numbers have no buckets of {bits} bits.",
                code="bad_bucket_bits",
            )
        centre, axes = _principal(vectors)
        return cls(centre.astype(np.float32), np.ascontiguousarray(axes[:bits], np.float32))

    def of(self, vectors: Vectors) -> Rows:
        """Return the bucket of each vector."""
        powers = 1 << np.arange(len(self.axes), dtype=np.uint32)
        return ((self._at(vectors) > 0) @ powers).astype(np.uint32)

    def probe(self, query: NDArray[np.float32], count: int) -> Rows:
        """Return the ``count`` likeliest buckets for ``query``, its own first."""
        if count < 1:
            raise InvalidRequest(f"{count} buckets cannot be looked for.", code="bad_count")
        return lsh_probes(self._at(query[None])[0], min(count, 1 << len(self.axes)))[0]

    def margins(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how far ``query`` lies from the border of each bit: its sign is the bit."""
        found: NDArray[np.float32] = self._at(query[None])[0]
        return found

    def _at(self, vectors: Vectors) -> NDArray[np.float32]:
        check_vectors(vectors, self.axes.shape[1])
        return np.ascontiguousarray((vectors - self.centre) @ self.axes.T, np.float32)


def _principal(vectors: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the principal axes (rows, the first says most) of at least one vector."""
    if not len(vectors):
        raise InvalidRequest("There is nothing to learn from.", code="bad_vectors")
    sample = vectors[:: -(-len(vectors) // TRAINING_ROWS)].astype(np.float64)
    centre = sample.mean(axis=0)
    spread = sample - centre
    _, axes = np.linalg.eigh(spread.T @ spread / len(sample))
    # A vector's sign is anybody's choice: make its largest number positive.
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    return np.asarray(centre, np.float64), np.asarray(axes.T[::-1], np.float64)


def check_vectors(vectors: Vectors, dimensions: int | None = None) -> None:
    """Check the shape and the values; raises :class:`InvalidRequest` (``bad_vectors``)."""
    wanted = f"[n, {dimensions}]" if dimensions else "[n, dimensions]"
    if vectors.ndim != 2 or (dimensions and vectors.shape[1] != dimensions):
        raise InvalidRequest(
            f"Vectors of shape {vectors.shape} were given where {wanted} are wanted.",
            code="bad_vectors",
        )
    if not in_range(vectors):
        raise InvalidRequest(
            "A vector holds a number that is not finite, or far too large.", code="bad_vectors"
        )


def in_range(numbers: NDArray[np.float32] | NDArray[np.float16]) -> bool:
    """Whether every number is one, and none exceeds :data:`MAX_NUMBER`."""
    return bool((np.abs(numbers) <= MAX_NUMBER).all())


def random_axes(count: int, dimensions: int, seed: int) -> NDArray[np.float64]:
    """Return unit axes, ``[count, dimensions]``; up to ``dimensions`` of them stand upright."""
    turns = range(0, count, dimensions)
    return np.concatenate(
        [
            _upright(dimensions, min(count - at, dimensions), seed + turn).T
            for turn, at in enumerate(turns)
        ]
    )


def check_size(bits: int, dimensions: int) -> None:
    """Check the size of a sketch; raises :class:`InvalidRequest` (``bad_sketch_bits``)."""
    if bits % 8 or not 8 <= bits <= MAX_BITS or not 1 <= dimensions <= MAX_DIMENSIONS:
        raise InvalidRequest(
            f"A sketch of {bits} bits of {dimensions} dimensions cannot be made.",
            code="bad_sketch_bits",
            remedy=f"Bits are a multiple of 8 up to {MAX_BITS}, dimensions at most "
            f"{MAX_DIMENSIONS}.",
        )


def _upright(size: int, count: int, seed: int) -> NDArray[np.float64]:
    """Return ``count`` upright unit columns of ``size``, all equally likely (QR of normal numbers).

    It takes ``size * count * count`` steps, not ``size`` cubed.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    q, r = np.linalg.qr(generator.standard_normal((size, count)))
    return np.asarray(q * np.sign(np.diagonal(r)), np.float64)
