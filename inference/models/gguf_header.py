"""Reads the GGUF header of a file on disk; the parser itself is in :mod:`gguf_format`."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from pyagent_node.base.files import mapped
from pyagent_node.inference.models.gguf_format import Buffer, parse_header, read_strings
from pyagent_node.inference.models.gguf_types import (
    ByteRange,
    GgufField,
    GgufHeader,
    GgufTensor,
    truncated,
)

__all__ = [
    "Buffer",
    "ByteRange",
    "GgufField",
    "GgufHeader",
    "GgufTensor",
    "parse_header",
    "read_header",
    "read_strings",
]


def read_header(path: Path) -> GgufHeader:
    """Parse the header of the whole file at ``path``; errors of the disk as in ``base.files``."""
    with mapped(path, "reading"), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise truncated("the magic", size=0, needed=4)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return parse_header(data)
