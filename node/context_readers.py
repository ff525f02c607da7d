"""Makes text of a file's bytes: plain text of any sort, HTML, PDF; refuses what is no text.

PDF and HTML are read in a child process (``node.context_extract``) with a deadline and a bound on
its memory, because a broken or hostile file can keep a parser busy for ever.
"""

from __future__ import annotations

import codecs
import re
import subprocess
import sys
from typing import Final, NamedTuple

import msgspec
import trio

from pyagent_node.base.contexts import MAX_DOCUMENT, MAX_TEXT
from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    ErrorInfo,
    InvalidRequest,
    LimitExceeded,
    Unavailable,
    Unsupported,
    error_from_info,
)

EXTRACT_SECONDS: Final = 120.0
"""Longest time for making text of one PDF or HTML file."""
BAD_SHARE: Final = 0.1
"""A text with more than this share of bytes that are none is no text."""
FOREIGN_SHARE: Final = 0.3
"""A text in Windows-1252 with more than this share of letters beyond ASCII is no text."""

_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x80-\x9f]")
_HTML_NAME: Final = re.compile(r"\.x?html?$", re.IGNORECASE)
_HTML_START: Final = re.compile(
    # possessive: a match is not looked for anew with comments taken together
    rb"\s*+(?:<!--(?>.*?-->)\s*+)*+<(?:!doctype\s+html|html)[\s>]",
    re.I | re.S,
)


class ReadText(NamedTuple):
    """The text of a file, and what the reader should know of how it was got (may be empty)."""

    text: str
    note: str


class Extracted(msgspec.Struct, frozen=True):
    """What the child answers."""

    text: str = ""
    note: str = ""
    error: ErrorInfo | None = None


def kind_of(data: bytes, source: str) -> str:
    """Return ``"pdf"``, ``"html"`` or ``"text"``."""
    if data[:1024].lstrip().startswith(b"%PDF-"):
        return "pdf"
    if _HTML_NAME.search(source) or _HTML_START.match(data[:4096]):
        return "html"
    return "text"


async def read_document(data: bytes, source: str) -> ReadText:
    """Return the text of a file's bytes; ``source`` is its name.

    Raises :class:`Unsupported` (``binary_file``), :class:`CorruptData` (``broken_document``),
    :class:`InvalidRequest` (``no_text``), :class:`LimitExceeded` (``document_too_large``),
    :class:`DeadlineExceeded` (``document_too_slow``), :class:`Unavailable`
    (``context_extra_missing``).
    """
    check_size(len(data), source)
    kind = kind_of(data, source)
    if kind == "text":
        read = await trio.to_thread.run_sync(decode_text, data, source)
    else:
        read = await _extract(data, source, kind)
    if not read.text.strip():
        raise InvalidRequest(
            f"There is no text in {source[:200]!r}.",
            code="no_text",
            remedy="A scanned PDF needs text recognition first." if kind == "pdf" else None,
        )
    if len(read.text) > MAX_TEXT:
        raise _too_large(source, f"{len(read.text)} characters of text", f"{MAX_TEXT}")
    return read


def check_size(size: int, source: str) -> None:
    """Check the size of a file; raises :class:`LimitExceeded` (``document_too_large``)."""
    if size > MAX_DOCUMENT:
        raise _too_large(source, f"{size} bytes", f"{MAX_DOCUMENT}")


def decode_text(data: bytes, source: str) -> ReadText:
    """Return the text of bytes that are text in some usual encoding.

    UTF-8, and UTF-16 or UTF-32 with a mark; a few wrong bytes are replaced.  Bytes that have no
    UTF-8 at all in them are read as Windows-1252.  Raises :class:`Unsupported` (``binary_file``).
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(encoding, "replace")
            return ReadText(_clean(text, source), _replaced(text.count("\ufffd"), encoding))
    if b"\0" in data:
        raise _binary(source)
    try:
        return ReadText(_clean(data.decode(), source), "")
    except UnicodeDecodeError:
        pass
    text = data.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    some = any(c > "\x7f" and c != "\ufffd" for c in text)
    if wrong > (BAD_SHARE if some else FOREIGN_SHARE) * len(text):
        raise _binary(source)
    if some:
        return ReadText(_clean(text, source), _replaced(wrong, "utf-8"))
    text = data.decode("cp1252", "replace")
    return ReadText(_clean(text, source), "not UTF-8: read as Windows-1252")


def _clean(text: str, source: str) -> str:
    """Return ``text`` without the control characters that could steer a terminal."""
    if _controls(text) > BAD_SHARE * len(text):
        raise _binary(source)
    return _CONTROLS.sub(" ", text.encode("utf-8", "replace").decode())


def _controls(text: str) -> int:
    return len(_CONTROLS.findall(text))


def _replaced(wrong: int, encoding: str) -> str:
    if not wrong:
        return ""
    return f"{wrong} places that are no {encoding.upper()} were replaced"


async def _extract(data: bytes, source: str, kind: str) -> ReadText:
    # -P: nothing is imported from the folder that the daemon was started in
    command = [sys.executable, "-P", "-m", "pyagent_node.node.context_extract"]
    command += [kind, str(MAX_TEXT)]
    done: subprocess.CompletedProcess[bytes] | None = None
    with trio.move_on_after(EXTRACT_SECONDS):
        done = await trio.run_process(
            command, stdin=data, capture_stdout=True, stderr=subprocess.DEVNULL, check=False
        )
    if done is None:
        raise DeadlineExceeded(
            f"Making text of {source[:200]!r} took more than {EXTRACT_SECONDS:.0f} s.",
            code="document_too_slow",
            remedy="Convert it to text, and add that.",
        )
    try:
        answer = msgspec.json.decode(done.stdout, type=Extracted)
    except msgspec.DecodeError:
        raise CorruptData(
            f"{source[:200]!r} cannot be read as {kind.upper()}: the reader ended with"
            f" {done.returncode}.",
            code="broken_document",
            remedy="The file is damaged, or needs too much memory; convert it to text.",
        ) from None
    if answer.error is not None:
        error = error_from_info(answer.error)
        error.message = f"{source[:200]!r} {error.message}"
        raise error
    return ReadText(await trio.to_thread.run_sync(_clean, answer.text, source), answer.note)


def _binary(source: str) -> Unsupported:
    return Unsupported(
        f"{source[:200]!r} is not text.",
        code="binary_file",
        remedy="Text of any sort, HTML and PDF can be added.",
    )


def _too_large(source: str, what: str, limit: str) -> LimitExceeded:
    return LimitExceeded(
        f"{source[:200]!r} has {what}; a document may have {limit}.",
        code="document_too_large",
        remedy="Cut it into parts, and add those.",
    )


def missing_extra() -> Unavailable:
    """Return the error for optional libraries that are not installed."""
    return Unavailable(
        "Contexts need optional libraries that are not installed.",
        code="context_extra_missing",
        remedy="Run: pip install 'pyagent-node[context]'",
    )
