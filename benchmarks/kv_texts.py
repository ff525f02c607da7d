"""Real text that every machine with Python has: its language reference and its library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Final

_PROSE: Final = (
    "objects", "formatstrings", "import", "specialnames", "typesseq", "compound", "execmodel",
    "strings", "class", "calls", "operator-summary", "typesmapping",
)  # fmt: skip
_CODE: Final = (
    "argparse", "heapq", "shutil", "textwrap", "statistics", "tarfile", "difflib", "zipfile",
    "csv", "configparser", "fractions", "tempfile",
)  # fmt: skip
_SKIPPED: Final = 2000
"""Characters at the beginning of a module: licences, long lists of names."""


def texts() -> Iterator[tuple[str, str]]:
    """Yield names and texts, prose and code in turn."""
    for prose, code in zip(_PROSE, _CODE, strict=True):
        if prose in topics.topics:
            yield prose, topics.topics[prose]
        spec = importlib.util.find_spec(code)
        if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            yield f"{code}.py", Path(spec.origin).read_text(encoding="utf-8")[_SKIPPED:]
