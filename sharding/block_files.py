"""The file system as the disk tier of blocks needs it: a port, and the real directory behind it.

Every method raises errors of ours only (:class:`NotFound`, :class:`Refused`, :class:`Unavailable`
``disk_full`` or ``disk_failed``, each naming the path).  All of it blocks.  The simulated twin,
which loses power, fills up and flips bits, is in ``pyagent_node.simulations.block_disk``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from pathlib import Path
from typing import Protocol

from pyagent_node.base.files import make_private_dir, mapped, sync_dir, sync_file, write_atomic


class BlockFile(Protocol):
    """An open segment: it grows at its end and is read anywhere."""

    def size(self) -> int:
        """Return how many bytes there are."""
        ...

    def append(self, data: bytes) -> None:
        """Add ``data`` at the end; a part of it may be there when this raises."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """Return the bytes there; fewer where the file ends."""
        ...

    def truncate(self, size: int) -> None:
        """Cut the file to its first ``size`` bytes."""
        ...

    def sync(self) -> None:
        """Make the content durable."""
        ...

    def close(self) -> None:
        """Give the file back; idempotent."""
        ...


class BlockDirectory(Protocol):
    """One directory of segments, all a store's own."""

    def label(self) -> str:
        """Return what to call the directory in a message."""
        ...

    def names(self) -> list[str]:
        """Return the names of the files; creates the directory, removes half-written files."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Write a new file; a crash leaves the whole of it or none."""
        ...

    def open(self, name: str) -> BlockFile:
        """Open a file to read and to append to."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        ...

    def free(self) -> int:
        """Return how many bytes the disk has left for us."""
        ...


class RealDirectory:
    """A directory of the operating system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def label(self) -> str:
        """See :meth:`BlockDirectory.label`."""
        return str(self._path)

    def names(self) -> list[str]:
        """See :meth:`BlockDirectory.names`."""
        make_private_dir(self._path)
        with mapped(self._path, "opening"):
            for leftover in self._path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            return sorted(entry.name for entry in os.scandir(self._path) if entry.is_file())

    def create(self, name: str, data: bytes) -> None:
        """See :meth:`BlockDirectory.create`."""
        write_atomic(self._path / name, data)

    def open(self, name: str) -> BlockFile:
        """See :meth:`BlockDirectory.open`."""
        return _RealFile(self._path / name)

    def remove(self, name: str) -> None:
        """See :meth:`BlockDirectory.remove`."""
        with mapped(self._path / name, "removing"):
            (self._path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                sync_dir(self._path)

    def free(self) -> int:
        """See :meth:`BlockDirectory.free`."""
        with mapped(self._path, "checking"):
            return shutil.disk_usage(self._path).free


class _RealFile:
    """Written through a descriptor, read through a mapping that follows the file as it grows.

    The size is asked of the system before every read, because touching a page of a mapping beyond
    the end of a file that somebody has cut ends the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        with mapped(path, "opening"):
            flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))

    def size(self) -> int:
        with mapped(self._path, "checking"):
            return os.fstat(self._fd).st_size

    def append(self, data: bytes) -> None:
        view = memoryview(data)
        with mapped(self._path, "writing"):
            while view:
                view = view[os.write(self._fd, view) :]

    def read(self, offset: int, size: int) -> bytes:
        end = min(self.size(), offset + size)
        if offset >= end:
            return b""
        if self._map is None or len(self._map) < end:
            self._unmap()
            with mapped(self._path, "mapping"):
                self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return self._map[offset:end]

    def truncate(self, size: int) -> None:
        self._unmap()
        with mapped(self._path, "truncating"):
            os.ftruncate(self._fd, size)

    def sync(self) -> None:
        with mapped(self._path, "syncing"):
            sync_file(self._fd)

    def close(self) -> None:
        self._unmap()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _unmap(self) -> None:
        kept, self._map = self._map, None
        if kept is not None:
            kept.close()
