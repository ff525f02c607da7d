"""A strict, bounded parser of GGUF headers.

It reads metadata and tensor descriptions and stays safe on hostile input: every count and length
is checked against a limit and against the bytes that are there before anything is allocated, and
large arrays (vocabulary, merges) are walked but not materialised - only their place is kept.  It is
as strict as llama.cpp's own reader (which aborts or logs instead of explaining): tensors must lie
one after the other, padded to the alignment, inside the file.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.limits import MIB
from pyagent_node.inference.models.gguf_types import (
    ByteRange,
    GgufField,
    GgufHeader,
    GgufTensor,
    Scalar,
    malformed,
    pad_to,
    truncated,
)

Buffer = bytes | bytearray | memoryview | mmap.mmap
"""Bytes that hold at least the header of a file."""

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

MAX_HEADER_BYTES: Final = 64 * MIB
"""Longest header (metadata and tensor list) that is read; the largest known are below 20 MiB."""
MAX_FIELDS: Final = 4096
"""Most metadata fields."""
MAX_TENSORS: Final = 65536
"""Most tensors."""
MAX_KEY_BYTES: Final = 65535
"""Longest metadata key (the format's own limit)."""
MAX_TENSOR_NAME_BYTES: Final = 63
"""Longest tensor name (ggml's own limit)."""
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 * MIB
MAX_SMALL_ARRAY: Final = 1024
"""Arrays of numbers up to this many items (per-layer settings) are decoded at once."""

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

SCALARS: Final[Mapping[int, struct.Struct]] = MappingProxyType(
    {
        GGUFValueType.UINT8: struct.Struct("<B"),
        GGUFValueType.INT8: struct.Struct("<b"),
        GGUFValueType.UINT16: struct.Struct("<H"),
        GGUFValueType.INT16: struct.Struct("<h"),
        GGUFValueType.UINT32: struct.Struct("<I"),
        GGUFValueType.INT32: struct.Struct("<i"),
        GGUFValueType.FLOAT32: struct.Struct("<f"),
        GGUFValueType.BOOL: struct.Struct("<?"),
        GGUFValueType.UINT64: struct.Struct("<Q"),
        GGUFValueType.INT64: struct.Struct("<q"),
        GGUFValueType.FLOAT64: struct.Struct("<d"),
    }
)


class _Cursor:
    """Reads numbers and strings from a buffer, refusing to pass its end."""

    def __init__(self, data: Buffer, end: int) -> None:
        self.data = data
        self.at = 0
        self.end = end

    def take(self, size: int, what: str) -> int:
        """Step over ``size`` bytes and return where they begin."""
        start = self.at
        if size > self.end - start:
            if start + size > MAX_HEADER_BYTES:
                raise malformed(f"{what} reaches beyond {MAX_HEADER_BYTES} bytes of header")
            raise truncated(what, size=self.end, needed=start + size)
        self.at = start + size
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def string(self, what: str, limit: int) -> bytes:
        length = self.u64(what)
        if length > limit:
            raise malformed(f"{what} has {length} bytes, more than {limit}")
        start = self.take(length, what)
        return bytes(self.data[start : start + length])

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings; the hot loop of a large vocabulary."""
        if count > (self.end - self.at) // 8:
            self.take(8 * count, what)
        at, end, data, unpack = self.at, self.end, self.data, _U64.unpack_from
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + unpack(data, at)[0]
        else:
            self.take(at - self.at, what)
            return
        self.take(at + 8 - self.at, what)


def parse_header(data: Buffer, file_size: int | None = None) -> GgufHeader:
    """Parse the header at the start of ``data``.

    ``data`` may be a prefix of the file; ``file_size`` is then the size of the whole.  Raises
    :class:`CorruptData` (``gguf_truncated``, ``gguf_malformed``) and :class:`Unsupported`
    (``gguf_version``, ``gguf_big_endian``, ``gguf_nested_array``, ``gguf_tensor_type``).
    """
    size = len(data)
    file_size = size if file_size is None else file_size
    cursor = _Cursor(data, min(size, MAX_HEADER_BYTES))
    version = _read_version(cursor)
    tensor_count = cursor.u64("the tensor count")
    field_count = cursor.u64("the field count")
    for count, limit, what in (
        (tensor_count, MAX_TENSORS, "tensors"),
        (field_count, MAX_FIELDS, "metadata fields"),
    ):
        if count > limit:
            raise malformed(f"it claims {count} {what}, more than {limit}")
    fields: dict[str, GgufField] = {}
    for index in range(field_count):
        field = _read_field(cursor, index)
        if field.key in fields:
            raise malformed(f"the field {field.key[:64]!r} appears twice")
        fields[field.key] = field
    alignment = _alignment(fields)
    infos = [_read_tensor(cursor, index) for index in range(tensor_count)]
    length = cursor.at
    data_start = pad_to(length, alignment)
    tensors = _place_tensors(infos, data_start, alignment, file_size)
    return GgufHeader(
        version=version,
        alignment=alignment,
        fields=fields,
        tensors=tensors,
        length=length,
        data_start=data_start,
        file_size=file_size,
    )


def read_strings(data: Buffer, field: GgufField) -> list[bytes]:
    """Materialise an array of strings whose header was parsed from the same ``data``."""
    if field.item_type is not GGUFValueType.STRING:
        raise malformed(f"the field {field.key!r} is not an array of strings")
    cursor = _Cursor(data, field.payload.stop)
    cursor.at = field.payload.start
    return [cursor.string(field.key, MAX_HEADER_BYTES) for _ in range(field.items)]


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.data[cursor.take(4, "the magic") : 4])
    if magic != MAGIC:
        raise malformed("it does not begin with 'GGUF'")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version != 0:
        raise Unsupported(
            "The GGUF file is big-endian.",
            code="gguf_big_endian",
            remedy="Convert it to little-endian.",
        )
    if version not in VERSIONS:
        raise Unsupported(
            f"The GGUF file has format version {version}; versions 2 and 3 are read.",
            code="gguf_version",
            remedy="Convert the model with a current converter.",
            version=version,
        )
    return version


def _read_field(cursor: _Cursor, index: int) -> GgufField:
    start = cursor.at
    raw_key = cursor.string(f"the key of field {index}", MAX_KEY_BYTES)
    try:
        key = raw_key.decode()
    except UnicodeDecodeError:
        raise malformed(f"the key of field {index} is not UTF-8") from None
    if not key:
        raise malformed(f"the key of field {index} is empty")
    name = f"the field {key[:64]!r}"
    kind = _value_type(cursor.u32(name), name)
    item_type: GGUFValueType | None = None
    count = 1
    value: Scalar | tuple[int | float | bool, ...] | None = None
    if kind is GGUFValueType.ARRAY:
        item_type = _value_type(cursor.u32(name), name)
        count = cursor.u64(name)
        payload = cursor.at
        if item_type is GGUFValueType.ARRAY:
            raise Unsupported(
                f"In the GGUF file {name} is an array of arrays.", code="gguf_nested_array"
            )
        if item_type is GGUFValueType.STRING:
            cursor.skip_strings(count, name)
        else:
            item = SCALARS[item_type]
            at = cursor.take(item.size * count, name)
            if count <= MAX_SMALL_ARRAY:
                raw = bytes(cursor.data[at : cursor.at])
                value = tuple(single[0] for single in item.iter_unpack(raw))
    else:
        payload = cursor.at
        if kind is GGUFValueType.STRING:
            value = cursor.string(name, MAX_HEADER_BYTES)
        else:
            scalar = SCALARS[kind]
            value = scalar.unpack_from(cursor.data, cursor.take(scalar.size, name))[0]
    end = cursor.at
    return GgufField(
        key, kind, item_type, count, ByteRange(start, end), ByteRange(payload, end), value
    )


def _value_type(number: int, name: str) -> GGUFValueType:
    try:
        return GGUFValueType(number)
    except ValueError:
        raise malformed(f"{name} has the unknown type {number}") from None


def _alignment(fields: Mapping[str, GgufField]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    value = field.value
    if field.type is not GGUFValueType.UINT32 or not isinstance(value, int):
        raise malformed("general.alignment is not a 32-bit number")
    if value == 0 or value & (value - 1) or value > MAX_ALIGNMENT:
        raise malformed(f"general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
    return value


class _TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


def _read_tensor(cursor: _Cursor, index: int) -> _TensorInfo:
    raw_name = cursor.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise malformed(f"the name of tensor {index} is not UTF-8") from None
    what = f"the tensor {name!r}"
    dims = cursor.u32(what)
    if not 1 <= dims <= MAX_DIMS:
        raise malformed(f"{what} has {dims} dimensions, not 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64(what) for _ in range(dims))
    number = cursor.u32(what)
    offset = cursor.u64(what)
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise Unsupported(
            f"In the GGUF file {what} has the unknown type {number}.",
            code="gguf_tensor_type",
            tensor=name,
            type=number,
        ) from None
    elements = 1
    for side in shape:
        elements *= side
    if elements == 0 or elements >= 2**63:
        raise malformed(f"{what} has an impossible shape {shape}")
    if shape[0] % block:
        raise malformed(f"{what} has rows of {shape[0]}, not a multiple of {block}")
    return _TensorInfo(name, shape, kind, offset, elements // block * block_bytes)


def _place_tensors(
    infos: list[_TensorInfo], data_start: int, alignment: int, file_size: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for info in infos:
        if info.name in tensors:
            raise malformed(f"the tensor {info.name!r} appears twice")
        if info.offset != expected:
            raise malformed(
                f"the tensor {info.name!r} lies at offset {info.offset}, not at {expected}"
            )
        start = data_start + info.offset
        place = ByteRange(start, start + info.nbytes)
        if place.stop > file_size:
            raise truncated(f"the tensor {info.name!r}", size=file_size, needed=place.stop)
        tensors[info.name] = GgufTensor(info.name, info.shape, info.type, place)
        expected = pad_to(info.offset + info.nbytes, alignment)
    return tensors
