"""Carries out a :class:`~.copy_plan.CopyPlan` with bounded memory."""

from __future__ import annotations

import os
import tempfile
from io import FileIO
from pathlib import Path
from typing import IO, Final

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import mapped, sync_dir
from pyagent_node.base.limits import MIB
from pyagent_node.inference.models.copy_plan import CopyPlan, Hole
from pyagent_node.inference.models.gguf_types import ByteRange
from pyagent_node.inference.models.model_file import ModelFile

_COPY_BYTES: Final = 1 * MIB


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
