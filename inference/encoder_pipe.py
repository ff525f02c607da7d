"""The messages between a node and the process of its GGUF encoder: a length, then MessagePack."""

from __future__ import annotations

from typing import IO, Final

import msgspec

from pyagent_node.base.errors import ErrorInfo
from pyagent_node.base.limits import MIB

MAX_FRAME: Final = 64 * MIB
_SIZE: Final = 4


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """``numbers`` are vectors of ``width`` float32, one after the other; ``count`` is of tokens."""

    width: int = 0
    numbers: bytes = b""
    count: int = 0
    error: ErrorInfo | None = None


def write_frame(stream: IO[bytes], content: bytes) -> None:
    """Write one message."""
    stream.write(len(content).to_bytes(_SIZE, "little") + content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """Return one message, or ``None`` where the stream ends or makes no sense."""
    head = stream.read(_SIZE)
    size = int.from_bytes(head, "little")
    if len(head) != _SIZE or size > MAX_FRAME:
        return None
    content = stream.read(size)
    return content if len(content) == size else None
