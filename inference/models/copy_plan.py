"""New files made of stretches of an old one, of literal bytes and of holes.

A :class:`CopyPlan` is decided without I/O; :func:`write_copy` carries it out with bounded memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Final, NamedTuple

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import mapped, sync_dir
from pyagent_node.base.limits import MIB
from pyagent_node.inference.models.chunks import merge_ranges
from pyagent_node.inference.models.gguf_header import ByteRange
from pyagent_node.inference.models.model_file import ModelFile

_COPY_BYTES: Final = 1 * MIB


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

    @property
    def needed_bytes(self) -> int:
        """Bytes of the source that are needed."""
        return sum(stop - start for start, stop in self.needs)


def copy_plan(segments: Sequence[Segment], also: Iterable[ByteRange] = ()) -> CopyPlan:
    """Return the plan for ``segments``; ``also`` are bytes that the maker of the plan read."""
    size = sum(length(segment) for segment in segments)
    needs = merge_ranges([*also, *(s for s in segments if isinstance(s, ByteRange))])
    return CopyPlan(tuple(segments), size, needs)


def write_copy(file: ModelFile, plan: CopyPlan, path: Path) -> None:
    """Make ``path`` out of ``file``: temporary name, sync, rename.

    Raises :class:`Unavailable` (``bytes_missing``, ``disk_full``) and :class:`CorruptData`
    (``gguf_truncated``) when the source shrinks meanwhile.  On any error nothing is left behind.
    """
    file.require(plan.needs)
    with mapped(path, "writing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as target:
                _write_segments(file.path, target, plan)
                target.flush()
                os.fsync(target.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_dir(path.parent)


def length(segment: Segment) -> int:
    """Return how many bytes of the new file a segment makes."""
    match segment:
        case bytes():
            return len(segment)
        case ByteRange(start, stop):
            return stop - start
        case Hole(nbytes):
            return nbytes


def _write_segments(source: Path, target: IO[bytes], plan: CopyPlan) -> None:
    with mapped(source, "reading"):
        origin = source.open("rb", buffering=0)
    with origin:
        for segment in plan.segments:
            match segment:
                case bytes():
                    target.write(segment)
                case ByteRange(start, stop):
                    _copy(source, origin, target, start, stop)
                case Hole(nbytes):
                    target.seek(nbytes, os.SEEK_CUR)
        target.truncate(plan.size)


def _copy(source: Path, origin: FileIO, target: IO[bytes], start: int, stop: int) -> None:
    with mapped(source, "reading"):
        origin.seek(start)
    while start < stop:
        with mapped(source, "reading"):
            data = origin.read(min(_COPY_BYTES, stop - start))
        if not data:
            raise CorruptData(
                f"{source} ended at byte {start} while it was being read.", code="gguf_truncated"
            )
        target.write(data)
        start += len(data)
