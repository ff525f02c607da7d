"""New files made of stretches of an old one, of literal bytes and of holes: the plans.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pyagent_node.inference.models.chunks import merge_ranges
from pyagent_node.inference.models.gguf_types import ByteRange


class Hole(NamedTuple):
    """Bytes that nobody reads: zeros, not stored where the file system allows it."""

    nbytes: int


Segment = bytes | ByteRange | Hole
"""A stretch of the new file: literal bytes, bytes of the source, or a hole."""


class CopyPlan(NamedTuple):
    """How to make a file.

    ``segments`` follow each other in the new file of ``size`` bytes; ``needs`` are the bytes of the
    source that must be there, sorted and merged.
    """

    segments: tuple[Segment, ...]
    size: int
    needs: tuple[ByteRange, ...]


def copy_plan(segments: Sequence[Segment], also: Iterable[ByteRange] = ()) -> CopyPlan:
    """Return the plan for ``segments``; ``also`` are bytes that the maker of the plan read."""
    size = sum(length(segment) for segment in segments)
    needs = merge_ranges([*also, *(s for s in segments if isinstance(s, ByteRange))])
    return CopyPlan(tuple(segments), size, needs)


def length(segment: Segment) -> int:
    """Return how many bytes of the new file a segment makes."""
    match segment:
        case bytes():
            return len(segment)
        case ByteRange(start, stop):
            return stop - start
        case Hole(nbytes):
            return nbytes
