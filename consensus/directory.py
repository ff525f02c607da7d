"""The file system as a log needs it: a port, and the real directory behind it.

Every method raises errors of ours only (:class:`NotFound`, :class:`Refused`, :class:`Unavailable`
``disk_full`` or ``disk_failed``, each naming the path).  The simulated twin, which can lose what
was not synced, is in ``pyagent_node.simulations.disk``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from pyagent_node.base.files import (
    make_private_dir,
    mapped,
    read_limited,
    sync_dir,
    sync_file,
    write_atomic,
)


class LogFile(Protocol):
    """An open file that grows at its end."""

    def write(self, data: bytes) -> None:
        """Append ``data``; a part of it may be there when this raises."""
        ...

    def truncate(self, size: int) -> None:
        """Cut the file to its first ``size`` bytes."""
        ...

    def sync(self) -> None:
        """Make the content durable; after a failure nobody knows what the disk holds."""
        ...

    def close(self) -> None:
        """Give the file back; idempotent."""
        ...


class LogDirectory(Protocol):
    """One directory of files, all a log's own."""

    def names(self) -> list[str]:
        """Return the names of the files; creates the directory, removes half-written files."""
        ...

    def label(self, name: str = "") -> str:
        """Return what to call a file (or the directory) in a message."""
        ...

    def exists(self, name: str) -> bool:
        """Say whether there is such a file."""
        ...

    def read(self, name: str, limit: int) -> bytes:
        """Return a file's content; raises :class:`LimitExceeded` over ``limit`` bytes."""
        ...

    def create(self, name: str, data: bytes) -> None:
        """Write a whole file, replacing one of that name; durable when it returns.

        A crash leaves the file before or the file after.  When this raises and the file exists,
        it is not known which of the two the disk holds.
        """
        ...

    def open_end(self, name: str) -> LogFile:
        """Open a file to append to."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file; durable after :meth:`sync`."""
        ...

    def sync(self) -> None:
        """Make removals durable."""
        ...


class FileDirectory:
    """A directory of the operating system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """See :meth:`LogDirectory.names`."""
        make_private_dir(self._path)
        with mapped(self._path, "opening"):
            for leftover in self._path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            return sorted(os.listdir(self._path))

    def label(self, name: str = "") -> str:
        """See :meth:`LogDirectory.label`."""
        return str(self._path / name)

    def exists(self, name: str) -> bool:
        """See :meth:`LogDirectory.exists`."""
        return (self._path / name).exists()

    def read(self, name: str, limit: int) -> bytes:
        """See :meth:`LogDirectory.read`."""
        return read_limited(self._path / name, limit)

    def create(self, name: str, data: bytes) -> None:
        """See :meth:`LogDirectory.create`."""
        write_atomic(self._path / name, data)

    def open_end(self, name: str) -> LogFile:
        """See :meth:`LogDirectory.open_end`."""
        return _OpenFile(self._path / name)

    def remove(self, name: str) -> None:
        """See :meth:`LogDirectory.remove`."""
        with mapped(self._path / name, "removing"):
            (self._path / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """See :meth:`LogDirectory.sync`."""
        with mapped(self._path, "syncing"):
            sync_dir(self._path)


class _OpenFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        with mapped(path, "opening"):
            flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._fd = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with mapped(self._path, "writing"):
            while view:
                view = view[os.write(self._fd, view) :]

    def truncate(self, size: int) -> None:
        with mapped(self._path, "truncating"):
            os.ftruncate(self._fd, size)

    def sync(self) -> None:
        with mapped(self._path, "syncing"):
            sync_file(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
