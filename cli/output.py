"""What the command line prints: text or JSON on stdout, notes and errors on stderr.

``--json`` puts one JSON object on each line of stdout and ``{"error": ...}`` on stderr; without it
stdout holds what the user asked for and stderr the rest, so that piping works.  Colour follows the
terminal and ``NO_COLOR``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, TextIO

import msgspec

from pyagent_node.base.errors import PyAgentError

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200
"""Columns of a table that is not shown on a terminal, unless ``COLUMNS`` says otherwise."""


class Output:
    """Where a verb prints.  ``json`` is set by the ``--json`` flag wherever it stands."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json

    @cached_property
    def console(self) -> Console:
        """A rich console on stdout, for tables."""
        return _console(stderr=False)

    @cached_property
    def notes(self) -> Console:
        """A rich console on stderr, for progress."""
        return _console(stderr=True)

    def text(self, line: str) -> None:
        """Print one line of the answer; nothing with ``--json``."""
        if not self.json:
            _write(sys.stdout, line + "\n")

    def piece(self, text: str) -> None:
        """Print a piece of streamed text at once; nothing with ``--json``."""
        if not self.json and text:
            _write(sys.stdout, text)

    def note(self, line: str) -> None:
        """Print a line about what goes on, on stderr; nothing with ``--json``."""
        if not self.json:
            _write(sys.stderr, line + "\n")

    def line(self, value: object) -> None:
        """Print one JSON object; nothing without ``--json``."""
        if self.json:
            _write(sys.stdout, encode(value) + "\n")

    def result(self, value: object, show: Callable[[], None]) -> None:
        """Print ``value`` as JSON with ``--json``; call ``show`` without."""
        if self.json:
            self.line(value)
        else:
            show()

    def error(self, error: PyAgentError) -> None:
        """Print an error as one line with its remedy, or as JSON, on stderr."""
        if self.json:
            _write(sys.stderr, encode({"error": error.to_info()}) + "\n")
            return
        line = " ".join(str(error).split())
        head = "\033[1;31merror:\033[0m" if coloured(sys.stderr) else "error:"
        _write(sys.stderr, f"{head} {line}\n")


def encode(value: object) -> str:
    """Return ``value`` (structs, dicts, lists) as one line of JSON."""
    return msgspec.json.encode(value).decode()


def coloured(stream: object) -> bool:
    """Whether ``stream`` is a terminal that wants colour."""
    isatty = getattr(stream, "isatty", None)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(isatty and isatty() and not plain)


def size(count: float) -> str:
    """Return a number of bytes in words: ``98.4 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Return a time span in words: ``3 h 05 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def short(text: str) -> str:
    """Return the end of a peer id or the beginning of a digest, enough to tell them apart."""
    return f"…{text[-8:]}" if text.startswith("12D3KooW") else text[:12]


def _console(*, stderr: bool) -> Console:
    from rich.console import Console  # noqa: PLC0415  (kept out of the start-up path)

    class PipeConsole(Console):
        """Lets a broken pipe reach the top of the program, which knows its exit code."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = PipeConsole(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def _write(stream: TextIO, text: str) -> None:
    """Write ``text``, replacing what the terminal's encoding cannot show."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()
