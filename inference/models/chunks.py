"""Which chunks of a file are there: pure arithmetic on byte ranges and a bitmap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.models.gguf_types import ByteRange


def chunk_count(size: int, chunk_bytes: int) -> int:
    """Return how many chunks a file of ``size`` bytes has."""
    return -(-size // chunk_bytes)


def chunk_range(index: int, size: int, chunk_bytes: int) -> ByteRange:
    """Return the bytes of chunk ``index``; the last one may be shorter."""
    return ByteRange(index * chunk_bytes, min(size, (index + 1) * chunk_bytes))


def merge_ranges(ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Return the union of ``ranges``, sorted, neighbours joined, empty ones dropped."""
    merged: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if stop <= start:
            continue
        if merged and start <= merged[-1].stop:
            merged[-1] = ByteRange(merged[-1].start, max(stop, merged[-1].stop))
        else:
            merged.append(ByteRange(start, stop))
    return tuple(merged)


def chunks_of(ranges: Sequence[ByteRange], chunk_bytes: int) -> list[int]:
    """Return the chunks that hold at least one byte of ``ranges``, in order, each once."""
    found: list[int] = []
    for start, stop in merge_ranges(ranges):
        first, last = start // chunk_bytes, (stop - 1) // chunk_bytes
        if found and first == found[-1]:
            first += 1
        found.extend(range(first, last + 1))
    return found


class ChunkSet:
    """A set of chunk numbers below ``count``, kept as a bitmap (bit ``i % 8`` of byte ``i // 8``).

    Raises :class:`CorruptData` (``bitmap_malformed``) when ``bits`` do not fit ``count``.
    """

    def __init__(self, count: int, bits: bytes | None = None) -> None:
        length = -(-count // 8)
        self.count = count
        self._bits = bytearray(length) if bits is None else bytearray(bits)
        unused = 8 * length - count
        if len(self._bits) != length or (unused and self._bits[-1] >> (8 - unused)):
            raise CorruptData(
                f"A chunk bitmap of {len(self._bits)} bytes does not fit {count} chunks.",
                code="bitmap_malformed",
            )

    @classmethod
    def full(cls, count: int) -> ChunkSet:
        """Return the set of all chunks."""
        chunks = cls(count)
        for index in range(count):
            chunks.add(index)
        return chunks

    def add(self, index: int) -> None:
        """Put a chunk into the set."""
        self._check(index)
        self._bits[index >> 3] |= 1 << (index & 7)

    def discard(self, index: int) -> None:
        """Take a chunk out of the set."""
        self._check(index)
        self._bits[index >> 3] &= ~(1 << (index & 7))

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self.count and bool(self._bits[index >> 3] >> (index & 7) & 1)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(self.count) if index in self)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ChunkSet) and self.count == other.count and self._bits == other._bits
        )

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    @property
    def complete(self) -> bool:
        """Whether every chunk is there."""
        return len(self) == self.count

    def missing(self, wanted: Iterable[int]) -> list[int]:
        """Return the wanted chunks that are not there, in the order given."""
        return [index for index in wanted if index not in self]

    def to_bytes(self) -> bytes:
        """Return the bitmap."""
        return bytes(self._bits)

    def copy(self) -> ChunkSet:
        """Return an independent copy."""
        return ChunkSet(self.count, self.to_bytes())

    def _check(self, index: int) -> None:
        if not 0 <= index < self.count:
            raise IndexError(index)
