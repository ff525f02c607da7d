"""The replicated part of an index as bytes: sketch model, sketches, chunks.  Pure.

::

    magic "PASX"  version u16  zero u16  bits u32  dimensions u32  windows u32
    length of the encoder's identity u16, its UTF-8
    centre f32[dimensions]   scales f32[bits]   steps i8[bits, dimensions]
    sketches u8[windows, bits / 8]   weights f16[windows]
    one bit a window, set on the first window of each chunk
    BLAKE3 of all that

Numbers are little-endian.  What was not written by :func:`encode_index` is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.native import blake3
from pyagent_node.sharding.context.sketches import (
    MAX_BITS,
    MAX_DIMENSIONS,
    Sketches,
    SketchModel,
    in_range,
)

MAGIC: Final = b"PASX"
VERSION: Final = 1
MAX_IDENTITY: Final = 256
_HEAD: Final = struct.Struct("<4sHHIIIH")
_DIGEST: Final = 32


class StoredIndex(NamedTuple):
    """Sketches, the chunk of each window (rising from 0), and the encoder that made the vectors."""

    sketches: Sketches
    chunk_of: NDArray[np.uint32]
    identity: str


def encode_index(index: StoredIndex) -> bytes:
    """Return the bytes of an index.

    Windows come chunk by chunk and every chunk has one, else :class:`InvalidRequest`
    (``bad_index``) is raised.
    """
    sketches, chunk_of, identity = index
    model, name = sketches.model, identity.encode()
    steps = np.diff(chunk_of.astype(np.int64), prepend=-1)
    first_is_new = not len(steps) or steps[0] == 1
    if chunk_of.shape != (len(sketches),) or not first_is_new or not np.isin(steps, (0, 1)).all():
        raise InvalidRequest("The windows do not come chunk by chunk.", code="bad_index")
    if not 0 < len(name) <= MAX_IDENTITY:
        raise InvalidRequest(
            f"An encoder's identity has 1 to {MAX_IDENTITY} bytes.", code="bad_index"
        )
    head = _HEAD.pack(MAGIC, VERSION, 0, model.bits, model.dimensions, len(sketches), len(name))
    parts = (
        model.centre.astype("<f4"),
        model.scales.astype("<f4"),
        model.steps,
        sketches.packed,
        sketches.weights.astype("<f2"),
        np.packbits(steps.astype(np.uint8), bitorder="little"),
    )
    body = b"".join([head, name, *(part.tobytes() for part in parts)])
    return body + blake3(body)


def decode_index(data: bytes) -> StoredIndex:
    """Return the index of some bytes.

    Raises :class:`CorruptData` (``index_corrupt``) and, for a newer version, :class:`Unsupported`
    (``index_version``).
    """
    if len(data) < _HEAD.size + _DIGEST:
        raise _corrupt("it is too short")
    magic, version, zero, bits, dimensions, windows, named = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise _corrupt("it does not begin like one")
    if version != VERSION:
        raise Unsupported(
            f"The index has version {version}; this program knows {VERSION}.",
            code="index_version",
            remedy="Update this node.",
        )
    if zero or bits % 8 or not 8 <= bits <= MAX_BITS or not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _corrupt("its sizes make no sense")
    sizes = (
        4 * dimensions,
        4 * bits,
        bits * dimensions,
        windows * bits // 8,
        2 * windows,
        -(-windows // 8),
    )
    if not 0 < named <= MAX_IDENTITY or len(data) != _HEAD.size + named + sum(sizes) + _DIGEST:
        raise _corrupt("it does not have the length that it says")
    if blake3(data[:-_DIGEST]) != data[-_DIGEST:]:
        raise _corrupt("its checksum is wrong")
    centre, scales, steps, packed, weights, ends = _parts(data, _HEAD.size + named, sizes)
    try:
        identity = data[_HEAD.size : _HEAD.size + named].decode()
    except UnicodeDecodeError:
        raise _corrupt("the name of its encoder is not text") from None
    model = SketchModel(
        np.frombuffer(centre, "<f4").astype(np.float32),
        np.frombuffer(steps, np.int8).reshape(bits, dimensions),
        np.frombuffer(scales, "<f4").astype(np.float32),
    )
    flags = np.unpackbits(np.frombuffer(ends, np.uint8), bitorder="little")
    half = np.frombuffer(weights, "<f2").astype(np.float16)
    good = in_range(model.centre) and in_range(model.scales) and in_range(half)
    if not good or flags[windows:].any():
        raise _corrupt("it holds numbers that are none")
    if windows and not flags[0]:
        raise _corrupt("its first window has no chunk")
    found = Sketches(model, np.frombuffer(packed, np.uint8).reshape(windows, bits // 8), half)
    chunk_of = np.cumsum(flags[:windows], dtype=np.int64) - 1
    return StoredIndex(found, chunk_of.astype(np.uint32), identity)


def _parts(data: bytes, at: int, sizes: tuple[int, ...]) -> Iterator[bytes]:
    for size in sizes:
        yield data[at : at + size]
        at += size


def _corrupt(why: str) -> CorruptData:
    return CorruptData(
        f"These bytes are no context index: {why}.",
        code="index_corrupt",
        remedy="Fetch or build the index again.",
    )
