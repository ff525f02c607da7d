"""Finds and reads the files that are added to a context.

A folder's files are taken in order, without those that ``.gitignore`` files leave out (read through
``pathspec``), hidden folders, and what is no ordinary file.  Links are not followed: a folder of
somebody else's could name any file of the user that way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from pyagent_node.base.contexts import MAX_DOCUMENT
from pyagent_node.base.errors import Conflict, InvalidRequest, LimitExceeded, Unavailable
from pyagent_node.base.files import map_os_error

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

SNIFFED: Final = 8192
"""Bytes at a file's beginning that show whether it can be text."""
ATTEMPTS: Final = 3
"""How often a file that changes while it is read is read."""
_TEXT_MARKS: Final = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff", b"%PDF-")
_MAX_DEPTH: Final = 64


class File(NamedTuple):
    """A file to add: where it is, what its document is called, and its size when it was found."""

    path: Path
    source: str
    size: int


class Content(NamedTuple):
    """A file's bytes and when it was changed last (Unix seconds)."""

    data: bytes
    modified: int


def find(path: Path, name: str | None) -> list[File]:
    """Return the file at ``path``, or the files in the folder there.

    ``name`` is what the document is called, or the prefix of those of a folder; without it, they
    are called as the path was given.  Raises errors of the disk, :class:`InvalidRequest`
    (``not_a_file``) and :class:`Unavailable` (``context_extra_missing``).
    """
    prefix = name if name is not None else source_of(path)
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return [File(path, prefix, found.st_size)]
        if not stat.S_ISDIR(found.st_mode):
            raise InvalidRequest(
                f"{path} is neither a file nor a folder.",
                code="not_a_file",
                remedy="Use `-` to read from stdin.",
            )
        return list(_walk(path, prefix))
    except OSError as error:
        raise map_os_error(error, path, "reading") from error


def source_of(path: Path) -> str:
    """Return what the document of ``path`` is called: the path without what leads outside."""
    parts = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    return _shown("/".join(parts) or path.resolve().name or "root")


def can_be_text(path: Path) -> bool:
    """Whether a file may be one that is read: no zero bytes at its beginning, or a mark."""
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED)
    except OSError as error:
        raise map_os_error(error, path, "reading") from error
    return b"\0" not in start or start.startswith(_TEXT_MARKS)


def read(file: File) -> Content:
    """Read a file that stays the same meanwhile.

    Raises :class:`Conflict` (``file_changing``), :class:`LimitExceeded` (``document_too_large``)
    and errors of the disk.
    """
    for _ in range(ATTEMPTS):
        try:
            with file.path.open("rb") as opened:
                before = os.fstat(opened.fileno())
                check_size(before.st_size, str(file.path))
                data = opened.read(MAX_DOCUMENT + 1)
            after = file.path.stat()
        except OSError as error:
            raise map_os_error(error, file.path, "reading") from error
        check_size(len(data), str(file.path))
        same = (before.st_size, before.st_mtime_ns, before.st_ino)
        if same == (after.st_size, after.st_mtime_ns, after.st_ino) and len(data) == same[0]:
            return Content(data, max(0, int(before.st_mtime)))
    raise Conflict(
        f"{file.path} changes while it is read.",
        code="file_changing",
        remedy="Add it again when nobody writes to it.",
    )


def check_size(size: int, name: str) -> None:
    """Check the size of a file; raises :class:`LimitExceeded` (``document_too_large``)."""
    if size > MAX_DOCUMENT:
        raise LimitExceeded(
            f"{name} has {size} bytes; a document may have {MAX_DOCUMENT}.",
            code="document_too_large",
            remedy="Cut it into parts, and add those.",
        )


def _walk(
    folder: Path, prefix: str, rules: tuple[tuple[str, GitIgnoreSpec], ...] = (), depth: int = 0
) -> Iterator[File]:
    """Yield the files below ``folder``; each rule set holds below its own folder (a prefix)."""
    here = _rules(folder / ".gitignore")
    if here is not None:
        rules = (*rules, (prefix, here))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        source = f"{prefix}/{_shown(entry.name)}"
        if entry.is_dir(follow_symlinks=False):
            hidden = entry.name.startswith(".")
            if not hidden and depth < _MAX_DEPTH and not _ignored(f"{source}/", rules):
                yield from _walk(folder / entry.name, source, rules, depth + 1)
        elif entry.is_file(follow_symlinks=False) and not _ignored(source, rules):
            yield File(folder / entry.name, source, entry.stat().st_size)


def _ignored(source: str, rules: tuple[tuple[str, GitIgnoreSpec], ...]) -> bool:
    """Whether the innermost rule set that says anything leaves a file out."""
    for prefix, spec in reversed(rules):
        said = spec.check_file(source[len(prefix) + 1 :]).include
        if said is not None:
            return said
    return False


def _rules(path: Path) -> GitIgnoreSpec | None:
    if not path.is_file():
        return None
    try:
        from pathspec import GitIgnoreSpec  # noqa: PLC0415 - optional
    except ImportError:
        raise Unavailable(
            "Reading .gitignore files needs pathspec.",
            code="context_extra_missing",
            remedy="Run: pip install 'pyagent-node[context]'",
        ) from None
    lines = path.read_bytes()[: 1 << 20].decode("utf-8", "replace").splitlines()
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise InvalidRequest(
            f"{path} cannot be read: {str(error)[:200]}.", code="bad_gitignore"
        ) from None


def _shown(text: str) -> str:
    """Return a name that can be printed."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else "?" for c in str(PurePosixPath(text)))
