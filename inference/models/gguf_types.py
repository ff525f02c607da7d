"""What a GGUF header says: metadata fields, tensors, and where each lies in the file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from gguf.constants import GGMLQuantizationType, GGUFValueType

from pyagent_node.base.errors import CorruptData

Scalar = int | float | bool | bytes


class ByteRange(NamedTuple):
    """The bytes ``[start, stop)`` of a file."""

    start: int
    stop: int


class GgufField(NamedTuple):
    """One metadata field and where it lies in the file.

    ``type`` is a ``GGUFValueType``; ``item_type`` and ``items`` describe an array (``None`` and 1
    otherwise).  ``span`` covers the whole key-value pair, ``payload`` the value without its type.
    ``value`` is decoded for scalars and strings (as bytes) and for short arrays of numbers (as a
    tuple); it is ``None`` for other arrays, see :func:`read_strings`.
    """

    key: str
    type: GGUFValueType
    item_type: GGUFValueType | None
    items: int
    span: ByteRange
    payload: ByteRange
    value: Scalar | tuple[int | float | bool, ...] | None


class GgufTensor(NamedTuple):
    """One tensor: ``shape`` is in ggml order (the row length first), ``data`` its bytes' place."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: ByteRange

    @property
    def nbytes(self) -> int:
        """Bytes of data, without padding."""
        return self.data.stop - self.data.start


class GgufHeader:
    """The parsed header of one file.

    ``length`` counts the bytes from the start of the file to the end of the tensor list;
    ``data_start`` is where the first tensor lies (``length`` padded to ``alignment``).
    """

    def __init__(
        self,
        *,
        version: int,
        alignment: int,
        fields: dict[str, GgufField],
        tensors: dict[str, GgufTensor],
        length: int,
        data_start: int,
        file_size: int,
    ) -> None:
        self.version = version
        self.alignment = alignment
        self.fields: Mapping[str, GgufField] = MappingProxyType(fields)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(tensors)
        self.length = length
        self.data_start = data_start
        self.file_size = file_size

    def __repr__(self) -> str:
        return (
            f"GgufHeader(version={self.version}, fields={len(self.fields)},"
            f" tensors={len(self.tensors)}, length={self.length})"
        )

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``."""
        return self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string field.

        Raises :class:`CorruptData` (``gguf_malformed``) when it is missing without a default, is
        not a string, or is not UTF-8.
        """
        field = self.fields.get(key)
        if field is None:
            if default is None:
                raise malformed(f"the field {key!r} is missing")
            return default
        if not isinstance(field.value, bytes):
            raise malformed(f"the field {key!r} is not a string")
        try:
            return field.value.decode()
        except UnicodeDecodeError:
            raise malformed(f"the field {key!r} is not UTF-8") from None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole-number field; errors as for :meth:`text`."""
        field = self.fields.get(key)
        if field is None:
            if default is None:
                raise malformed(f"the field {key!r} is missing")
            return default
        if isinstance(field.value, bool) or not isinstance(field.value, int):
            raise malformed(f"the field {key!r} is not a whole number")
        return field.value

    def tensor(self, name: str) -> GgufTensor:
        """Return a tensor; raises :class:`CorruptData` (``gguf_malformed``) when it is missing."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise malformed(f"the tensor {name!r} is missing")
        return tensor


def malformed(what: str) -> CorruptData:
    """Return the error for a file that breaks the format."""
    return CorruptData(
        f"The GGUF file is malformed: {what}.",
        code="gguf_malformed",
        remedy="Get the model file again, or convert it again.",
    )


def truncated(what: str, *, size: int, needed: int) -> CorruptData:
    """Return the error for a file of ``size`` bytes in which ``what`` ends at ``needed``."""
    return CorruptData(
        f"The GGUF file is truncated: {what} ends at byte {needed}, but there are {size}.",
        code="gguf_truncated",
        remedy="Get the model file again.",
        size=min(size, 2**63 - 1),
        needed=min(needed, 2**63 - 1),
    )


def pad_to(size: int, alignment: int) -> int:
    """Return ``size`` rounded up to a multiple of ``alignment``, a power of two."""
    return (size + alignment - 1) & ~(alignment - 1)
