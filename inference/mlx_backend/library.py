"""The one module that knows MLX's version, device and errors.

Errors of MLX reach us as ``RuntimeError`` and ``ValueError``; see :func:`mapped_errors`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Final

import mlx.core as mx

from pyagent_node.base.errors import LimitExceeded, Unavailable

VERSION: Final = importlib.metadata.version("mlx")

_SHOWN: Final = 300
_MEMORY: Final = ("alloc", "memory", "maximum allowed buffer size", "resource limit")
"""Words in MLX's complaints about memory, on processors and on Metal."""


def device() -> str:
    """Return what MLX computes on: ``metal``, ``cuda`` or ``cpu``."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


@contextlib.contextmanager
def mapped_errors(doing: str) -> Iterator[None]:
    """Map MLX's errors.

    Raises :class:`LimitExceeded` (``not_enough_memory``) and :class:`Unavailable`
    (``decode_failed``).
    """
    try:
        yield
    except MemoryError as error:
        raise _memory(doing, str(error)) from None
    except (RuntimeError, ValueError) as error:
        text = str(error)[:_SHOWN]
        if any(word in text.lower() for word in _MEMORY):
            raise _memory(doing, text) from None
        raise Unavailable(f"MLX failed {doing}: {text}", code="decode_failed") from None


def _memory(doing: str, text: str) -> LimitExceeded:
    return LimitExceeded(
        f"MLX ran out of memory {doing}: {text or 'no reason given'}",
        code="not_enough_memory",
        remedy="Load with a shorter context or fewer sequences, or spread the model over more"
        " nodes.",
    )
