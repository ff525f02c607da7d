"""Encodes GGUF headers from parts that are copied as they are.

The ``gguf`` package's writer wants every value decoded; a slice keeps most fields of its source
byte for byte, however large they are, so here a field is simply its encoded bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from gguf.constants import GGMLQuantizationType, GGUFValueType

from pyagent_node.inference.models.gguf_format import MAGIC, SCALARS
from pyagent_node.inference.models.gguf_types import pad_to

VERSION: Final = 3


class TensorEntry(NamedTuple):
    """A tensor to be listed; ``shape`` in ggml order."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    nbytes: int


def text_field(key: str, value: str) -> bytes:
    """Return an encoded string field."""
    return _string(key) + struct.pack("<I", GGUFValueType.STRING) + _string(value)


def u32_field(key: str, value: int) -> bytes:
    """Return an encoded field of an unsigned 32-bit number."""
    return _string(key) + struct.pack("<II", GGUFValueType.UINT32, value)


def array_field(key: str, item_type: GGUFValueType, values: Sequence[int | float | bool]) -> bytes:
    """Return an encoded array of numbers."""
    item = SCALARS[item_type]
    return b"".join(
        (
            _string(key),
            struct.pack("<IIQ", GGUFValueType.ARRAY, item_type, len(values)),
            *(item.pack(value) for value in values),
        )
    )


def tensor_list(tensors: Sequence[TensorEntry], alignment: int) -> bytes:
    """Return the encoded tensor list; data lies in the same order, each padded to ``alignment``."""
    parts = []
    offset = 0
    for tensor in tensors:
        dims = len(tensor.shape)
        parts.append(
            _string(tensor.name)
            + struct.pack(f"<I{dims}QIQ", dims, *tensor.shape, tensor.type, offset)
        )
        offset = pad_to(offset + tensor.nbytes, alignment)
    return b"".join(parts)


def preamble(tensors: int, fields: int) -> bytes:
    """Return the first 24 bytes of a file."""
    return MAGIC + struct.pack("<IQQ", VERSION, tensors, fields)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
