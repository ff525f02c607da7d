"""Small files written so that a crash leaves the old content or the new, never half of it.

The one module of ``base`` that touches the disk.  Every :class:`OSError` is mapped here:
:class:`NotFound` (``file_not_found``), :class:`Refused` (``file_not_permitted``),
:class:`Unavailable` (``disk_full``, ``disk_failed``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from pyagent_node.base.errors import (
    Conflict,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unavailable,
)

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

OWNER_ONLY = 0o600
"""Mode of a file that holds a secret."""
OWNER_ONLY_DIR = 0o700
"""Mode of a directory that holds secrets."""


def map_os_error(error: OSError, path: Path | str, doing: str) -> PyAgentError:
    """Return our error for ``error``, which happened while ``doing`` ("writing") ``path``."""
    text = f"{doing.capitalize()} {path} failed: {error.strerror or error}."
    if isinstance(error, FileNotFoundError):
        return NotFound(f"{path} does not exist.", code="file_not_found", path=str(path))
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return Refused(
            text,
            code="file_not_permitted",
            remedy="Check who owns it and whether the file system is writable.",
            path=str(path),
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Unavailable(
            text, code="disk_full", remedy="Free some space, then try again.", path=str(path)
        )
    return Unavailable(
        text,
        code="disk_failed",
        remedy="Check the disk, and that the path is what it should be.",
        path=str(path),
    )


@contextlib.contextmanager
def mapped(path: Path | str, doing: str) -> Iterator[None]:
    """Map every :class:`OSError` of the block to an error of ours that names ``path``."""
    try:
        yield
    except OSError as error:
        raise map_os_error(error, path, doing) from error


def sync_dir(path: Path) -> None:
    """Make renames and new names in ``path`` durable (Windows does so by itself)."""
    if sys.platform == "win32":
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(fd: int) -> None:
    """Make the content of an open file durable, on macOS too, where ``fsync`` alone does not."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def make_private_dir(path: Path) -> Path:
    """Create ``path`` and its parents, readable by the owner only; an existing one is kept."""
    with mapped(path, "creating"):
        path.mkdir(mode=OWNER_ONLY_DIR, parents=True, exist_ok=True)
    return path


def _write_temporary(path: Path, data: bytes, mode: int) -> str:
    make_private_dir(path.parent)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            if sys.platform != "win32":
                os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            sync_file(file.fileno())
    except BaseException:
        _unlink(temporary)
        raise
    return temporary


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def write_atomic(path: Path, data: bytes, mode: int = OWNER_ONLY) -> None:
    """Replace ``path`` by ``data``: temporary name, sync, rename, sync of the directory.

    Parent directories are created for the owner only.  Durable when it returns.
    """
    with mapped(path, "writing"):
        temporary = _write_temporary(path, data, mode)
        try:
            os.replace(temporary, path)
        except BaseException:
            _unlink(temporary)
            raise
        sync_dir(path.parent)


def create_exclusive(path: Path, data: bytes, mode: int = OWNER_ONLY) -> bool:
    """Write ``path`` only if there is none; of several callers at once exactly one gets ``True``.

    A reader sees no file or the whole of it (where the file system knows hard links).
    """
    with mapped(path, "writing"):
        if path.exists():
            return False
        temporary = _write_temporary(path, data, mode)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return _create_in_place(path, data, mode)
        finally:
            _unlink(temporary)
        sync_dir(path.parent)
        return True


def _create_in_place(path: Path, data: bytes, mode: int) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    except FileExistsError:
        return False
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())
    sync_dir(path.parent)
    return True


def read_limited(path: Path, limit: int) -> bytes:
    """Return the content of ``path``.

    Raises :class:`NotFound` (``file_not_found``) and, over ``limit`` bytes,
    :class:`LimitExceeded` (``file_too_large``).
    """
    with mapped(path, "reading"), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise LimitExceeded(
            f"{path} is larger than {limit} bytes.",
            code="file_too_large",
            remedy="It is not a file that this program wrote: move it away.",
            path=str(path),
            limit=limit,
        )
    return data


def check_private(path: Path) -> None:
    """Refuse a secret that others of this machine may read.

    Raises :class:`Refused` (``file_readable_by_others``).  Windows keeps a user's files
    private by their access list, which this does not look at.
    """
    if sys.platform == "win32":
        return
    with mapped(path, "checking"):
        mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise Refused(
            f"{path} holds a secret and may be read by others (mode {mode:04o}).",
            code="file_readable_by_others",
            remedy=f"Run: chmod 600 {path}",
            path=str(path),
        )


class FileLock:
    """One process at a time: an advisory lock that the system drops when its holder dies.

    ``what`` is the subject of the error, as in "the home /x is in use by process 7".
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock at once or raise :class:`Conflict` (``in_use``, fact ``pid``)."""
        make_private_dir(self.path.parent)
        with mapped(self.path, "locking"):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            if not _try_lock(fd):
                raise self._in_use(fd)
            with mapped(self.path, "locking"):
                os.ftruncate(fd, 0)
                os.lseek(fd, 0, os.SEEK_SET)
                os.write(fd, str(os.getpid()).encode())
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; idempotent.  The file stays: removing it would race."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
            os.close(fd)

    def _in_use(self, fd: int) -> Conflict:
        try:
            text = os.read(fd, 32).decode("ascii", "replace").strip()
        except OSError:  # Windows refuses to read a locked range
            text = ""
        pid = int(text) if text.isascii() and text.isdigit() else 0
        holder = f"process {pid}" if pid else "another process"
        return Conflict(
            f"{self._what} is in use by {holder}.",
            code="in_use",
            remedy="Stop it first (pyagent-node down), or use another home (PYAGENT_HOME).",
            pid=pid,
        )

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


if sys.platform == "win32":

    def _try_lock(fd: int) -> bool:
        os.lseek(fd, 64, os.SEEK_SET)  # beyond the process number, so that it stays readable
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True

else:

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
