"""A node's share of the sketches of a context whose sketches lie spread over the nodes.  Pure.

Windows fall into :data:`GROUPS` groups by the first signs of their own bucket, the ones that say
most: windows that are alike share a group, whatever chunk they stand in.  Group ``g`` belongs to
the owners of bucket ``g``.  A sketch is a function of the window's vector, which whoever holds the
chunk's body has: so a share can be made anew at any time, and nothing is lost with it.

A *part* is what a share has of one chunk: the sketches of its windows in some groups, and in which
groups it was looked for them, so that it is known that there are no others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.sharding.context.defaults import Axes
from pyagent_node.sharding.context.records import MAX_CHUNK_WINDOWS, ChunkBody, ChunkId
from pyagent_node.sharding.context.sketches import BITS, MAX_BITS

GROUP_BITS: Final = 6
GROUPS: Final = 1 << GROUP_BITS
ALL_GROUPS: Final = (1 << GROUPS) - 1
"""The set of all groups; bit ``g`` stands for group ``g``."""


class Part(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Sketches of windows of one chunk: all of its windows in ``groups`` are among them.

    ``places`` (little-endian uint16) are those of the windows in the chunk, ``group_of`` (a byte
    each) their groups, ``packed`` their sketches and ``weights`` (float16) the weights of those.
    """

    groups: int
    places: bytes
    group_of: bytes
    packed: bytes
    weights: bytes

    def __len__(self) -> int:
        return len(self.group_of)

    @property
    def width(self) -> int:
        """Bytes of a sketch; 0 where there is none."""
        return len(self.packed) // len(self.group_of) if self.group_of else 0

    @property
    def size(self) -> int:
        """Bytes of all that."""
        return len(self.places) + len(self.group_of) + len(self.packed) + len(self.weights)

    def rows(self) -> NDArray[np.uint8]:
        """Return the sketches, ``[windows, bytes]``."""
        return np.frombuffer(self.packed, np.uint8).reshape(len(self), -1)

    def scales(self) -> NDArray[np.float16]:
        """Return the weights of the sketches."""
        return np.frombuffer(self.weights, "<f2").astype(np.float16)

    def at(self) -> NDArray[np.uint32]:
        """Return the places of the windows."""
        return np.frombuffer(self.places, "<u2").astype(np.uint32)

    def first(self, windows: int) -> Part:
        """Return what of this part is of the first so many windows of the chunk."""
        keep = self.at() < windows
        if keep.all():
            return self
        if not keep.any():
            return Part(self.groups, b"", b"", b"", b"")
        return _part(
            self.groups,
            self.at()[keep],
            np.frombuffer(self.group_of, np.uint8)[keep],
            self.rows()[keep],
            self.scales()[keep],
        )

    def within(self, groups: int) -> Part:
        """Return what of this part is in some groups."""
        if not self.groups & ~groups:
            return self
        keep = np.array([bool(groups >> group & 1) for group in self.group_of], bool)
        if not keep.any():
            return Part(self.groups & groups, b"", b"", b"", b"")
        return _part(
            self.groups & groups,
            self.at()[keep],
            np.frombuffer(self.group_of, np.uint8)[keep],
            self.rows()[keep],
            self.scales()[keep],
        )

    def fits(self, windows: int) -> bool:
        """Whether this can be of a chunk of so many windows: each is one of them, and packed so."""
        if not len(self):
            return True
        return self.width == BITS // 8 and int(self.at().max()) < windows

    def joined(self, other: Part) -> Part:
        """Return this part and what another one has besides.

        Raises :class:`InvalidRequest` (``bad_sketches``) for sketches of two sizes.
        """
        rest = other.within(other.groups & ~self.groups)
        if len(self) and len(rest) and self.width != rest.width:
            raise InvalidRequest(
                f"Sketches of {self.width} and {rest.width} bytes are no part of one chunk.",
                code="bad_sketches",
            )
        return Part(
            self.groups | other.groups,
            self.places + rest.places,
            self.group_of + rest.group_of,
            self.packed + rest.packed,
            self.weights + rest.weights,
        )


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Part).decode


def part_of(body: ChunkBody, axes: Axes, groups: int) -> Part:
    """Return the sketches of those windows of a chunk that are in some groups.

    Raises :class:`InvalidRequest` (``bad_vectors``) for vectors of another length.
    """
    vectors = body.matrix()
    bucket = axes.buckets.of(vectors) & (GROUPS - 1)
    at = np.flatnonzero([bool(groups >> int(group) & 1) for group in bucket])
    # All are made together, for a product's last digits vary with its shape, and all owners of a
    # group are to have the same sketches, whatever other groups they have.
    packed, weights = axes.model.sketch(vectors)
    rows = at.astype(np.uint32)
    return _part(groups, rows, bucket[at].astype(np.uint8), packed[at], weights[at])


def encode_part(part: Part) -> bytes:
    """Return the bytes of a part."""
    return _encode(part)


def decode_part(data: bytes | memoryview) -> Part:
    """Return the part of some bytes; raises :class:`CorruptData` (``bad_context_part``)."""
    try:
        part = _decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise _corrupt() from None
    count = len(part.group_of)
    fits = len(part.places) == 2 * count == len(part.weights) and 0 <= part.groups <= ALL_GROUPS
    if not fits or count > MAX_CHUNK_WINDOWS or len(part.packed) > count * MAX_BITS // 8:
        raise _corrupt()
    if count and (not part.packed or len(part.packed) % count):
        raise _corrupt()
    places = part.at()
    sane = all(part.groups >> group & 1 for group in part.group_of)
    if not sane or len(np.unique(places)) != count or (count and places.max() >= MAX_CHUNK_WINDOWS):
        raise _corrupt()
    if not np.isfinite(part.scales()).all():
        raise _corrupt()
    return part


class Share:
    """The parts that a node has of one context."""

    def __init__(self) -> None:
        self._parts: dict[ChunkId, Part] = {}
        self._generation = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[ChunkId]:
        return iter(self._parts)

    @property
    def generation(self) -> int:
        """Grows with every change."""
        return self._generation

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return self._bytes

    def copy(self) -> Mapping[ChunkId, Part]:
        """Return all parts as they are now."""
        return self._parts.copy()

    def get(self, chunk: ChunkId) -> Part | None:
        """Return what there is of a chunk."""
        return self._parts.get(chunk)

    def covers(self, chunk: ChunkId, groups: int) -> bool:
        """Whether all sketches of a chunk that are in some groups are here."""
        part = self._parts.get(chunk)
        return part is not None and not groups & ~part.groups

    def put(self, parts: Mapping[ChunkId, Part]) -> None:
        """Take parts instead of those that were there of the same chunks."""
        for chunk, part in parts.items():
            held = self._parts.get(chunk)
            self._bytes += part.size - (held.size if held is not None else 0)
            self._parts[chunk] = part
        self._generation += bool(parts)

    def drop(self, chunks: Iterable[ChunkId]) -> None:
        """Give parts up."""
        for chunk in chunks:
            held = self._parts.pop(chunk, None)
            if held is not None:
                self._bytes -= held.size
                self._generation += 1

    def beyond(self, groups: int) -> dict[ChunkId, Part]:
        """Return the parts that have more than some groups, cut down to those."""
        return {
            chunk: part.within(groups)
            for chunk, part in self._parts.items()
            if part.groups & ~groups
        }


def _part(
    groups: int,
    places: NDArray[np.uint32],
    group_of: NDArray[np.uint8],
    packed: NDArray[np.uint8],
    weights: NDArray[np.float16],
) -> Part:
    return Part(
        groups,
        places.astype("<u2").tobytes(),
        group_of.tobytes(),
        packed.tobytes(),
        weights.astype("<f2").tobytes(),
    )


def _corrupt() -> CorruptData:
    return CorruptData("These bytes are no part of an index.", code="bad_context_part")
