"""A child process that makes text of one PDF or HTML file: bytes on stdin, JSON on stdout.

``python -m pyagent_node.node.context_extract KIND MAX_CHARACTERS``; see ``node.context_readers``.
The memory that it may take is bounded where the system can do that.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Final

import msgspec

from pyagent_node.base.errors import CorruptData, LimitExceeded, PyAgentError, Refused, Unavailable
from pyagent_node.base.limits import MIB
from pyagent_node.node.context_readers import Extracted, missing_extra

MEMORY_BYTES: Final = 2048 * MIB
_LEFT_OUT: Final = ("script", "style", "noscript", "template", "svg", "head > :not(title)")
_BLOCKS: Final = (
    "address, article, aside, blockquote, br, dd, div, dl, dt, figcaption, figure, footer, form,"
    " h1, h2, h3, h4, h5, h6, header, hr, li, main, nav, ol, p, pre, section, table, title, tr, ul"
)


def html_text(data: bytes) -> str:
    """Return the text of an HTML file: a line for each block, nothing of scripts and styles."""
    try:
        from selectolax.lexbor import LexborHTMLParser  # noqa: PLC0415 - optional
    except ImportError:
        raise missing_extra() from None
    tree = LexborHTMLParser(data)
    for selector in _LEFT_OUT:
        for node in tree.css(selector):
            node.decompose()
    for node in tree.css(_BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    root = tree.root
    raw = root.text(deep=True) if root is not None else ""
    lines = (" ".join(line.split()) for line in raw.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def pdf_text(data: bytes, limit: int) -> tuple[str, str]:
    """Return the text of a PDF file, its pages marked, and a note about pages that are broken."""
    try:
        import pypdf  # noqa: PLC0415 - optional
        from pypdf.errors import PyPdfError  # noqa: PLC0415
    except ImportError:
        raise missing_extra() from None
    try:
        reader = pypdf.PdfReader(io.BytesIO(data), strict=False)
        if reader.is_encrypted and not reader.decrypt(""):
            raise Refused(
                "is encrypted.", code="encrypted_document", remedy="Remove its password first."
            )
        pages = len(reader.pages)
        texts = list(_pages(reader, limit))
    except PyAgentError:
        raise
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError):
        raise _broken() from None
    broken = sum(text is None for text in texts)
    if broken == pages:
        raise _broken()
    text = "\n".join(
        f"[page {number}]\n{text}" for number, text in enumerate(texts, 1) if text and text.strip()
    )
    return text, f"{broken} of {pages} pages cannot be read" if broken else ""


def _pages(reader: object, limit: int) -> Iterator[str | None]:
    size = 0
    for page in reader.pages:  # type: ignore[attr-defined]
        try:
            text = str(page.extract_text())
        except Exception:  # whatever a broken page makes the parser raise: the others may be good
            yield None
            continue
        size += len(text)
        if size > limit:
            raise LimitExceeded(
                f"has more than {limit} characters of text.",
                code="document_too_large",
                remedy="Cut it into parts, and add those.",
            )
        yield text


def _broken() -> CorruptData:
    return CorruptData(
        "is broken: it cannot be read as PDF.",
        code="broken_document",
        remedy="Open and save it anew, or convert it to text.",
    )


def _bound_memory() -> None:
    if sys.platform != "win32":
        import resource  # noqa: PLC0415

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(hard, MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def main(kind: str, limit: int) -> None:
    """Read stdin, write the answer."""
    logging.disable()
    warnings.simplefilter("ignore")
    _bound_memory()
    data = sys.stdin.buffer.read()
    try:
        text, note = pdf_text(data, limit) if kind == "pdf" else (html_text(data), "")
        answer = Extracted(text.encode("utf-8", "replace").decode(), note)
    except PyAgentError as error:
        answer = Extracted(error=error.to_info())
    except (MemoryError, RecursionError):
        failure = Unavailable(
            "needs too much memory to be read.",
            code="broken_document",
            remedy="Convert it to text, and add that.",
        )
        answer = Extracted(error=failure.to_info())
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
