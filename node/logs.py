"""The daemon's log: lines of text or JSON on standard error, without secrets.

Whatever is logged passes :class:`Redactor` last, after formatting, so that a secret inside an
exception's text or a library's message is covered as well.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import Final, TextIO

import msgspec

HIDDEN: Final = "<hidden>"
_PATTERNS: Final = (
    re.compile(r"(?P<keep>pyagent1)[0-9A-Za-z]{8,}"),  # invitation tickets
    re.compile(r"(?P<keep>[Bb]earer\s+)[^\s'\"]+"),
    re.compile(r"(?P<keep>/key/swarm/psk/1\.0\.0/\s*/base(?:16|64)/\s*)\S+"),
    re.compile(r"(?P<keep>-----BEGIN [A-Z ]*PRIVATE KEY-----)[^-]*"),
)
_QUIET: Final = {
    # Libraries that narrate at INFO what is a detail here.
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "hypercorn": logging.WARNING,
    "libp2p": logging.WARNING,
    "zeroconf": logging.WARNING,
    "pyagent_node.http": logging.WARNING,
}


class Redactor:
    """Hides secrets in texts: by their shape, and those it was told of."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def hide(self, secret: str) -> None:
        """Hide ``secret`` wherever it appears; shorter than 8 characters it would hide too much."""
        if len(secret) >= 8:
            self._known.add(secret)

    def clean(self, text: str) -> str:
        """Return ``text`` without secrets."""
        for secret in self._known:
            text = text.replace(secret, HIDDEN)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<keep>{HIDDEN}", text)
        return text


def _encodable(text: str) -> str:
    """Return ``text`` with lone surrogates (of odd file names) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class TextFormatter(logging.Formatter):
    """One line a record: UTC time, level, area, message."""

    converter = staticmethod(time.gmtime)

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s")
        self.datefmt = "%Y-%m-%dT%H:%M:%S"
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text; a traceback follows on lines of its own."""
        return _encodable(self._redactor.clean(super().format(record)))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: ``time`` (Unix seconds), ``level``, ``area``, ``message``.

    ``traceback`` is there when an exception was logged.
    """

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "area": record.name,
            "message": _encodable(self._redactor.clean(record.getMessage())),
        }
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line["traceback"] = _encodable(self._redactor.clean(trace))
        return msgspec.json.encode(line).decode()


def set_up_logging(
    level: str,
    form: str,
    redactor: Redactor,
    stream: TextIO | None = None,
) -> logging.Handler:
    """Send everything at ``level`` and above to ``stream`` (standard error when ``None``).

    Handlers that libraries put on the root logger are removed.  Returns the handler, so that the
    caller can remove it.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(redactor) if form == "json" else TextFormatter(redactor))
    root = logging.getLogger()
    for old in list(root.handlers):
        if type(old) is logging.StreamHandler:
            root.removeHandler(old)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(number)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(quiet, number))
    return handler
