"""The bytes of a segment of stored blocks: a header, then records with checksums.  Pure.

A segment holds blocks of one model.  Its header is ``magic | model | crc32``; a record is a
fixed :data:`RECORD_BYTES` of labels (key, place in the chain, cost, length and digest of the
payload, and a CRC-32 of all that) and the payload.  So a segment says by itself what it holds, the
index beside it can be lost, and a record is believed only where labels, digest and the name that
was asked for agree.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.limits import MAX_TAIL
from pyagent_node.base.types import Digest
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_keys import LINK_BYTES, BlockKey

MAX_PAYLOAD: Final = MAX_TAIL
"""Bytes of one block: what fits the tail of a frame."""

_MAGIC: Final = b"PYAKVS1\n"
_SEGMENT: Final = struct.Struct("<8s32sI")
_RECORD: Final = struct.Struct("<4sHIId64s32s32s16s")
_CRC: Final = struct.Struct("<I")
_RECORD_MAGIC: Final = b"KVB1"

SEGMENT_HEADER_BYTES: Final = _SEGMENT.size
RECORD_BYTES: Final = _RECORD.size + _CRC.size
"""Bytes of a record before its payload."""


class Label(msgspec.Struct, frozen=True):
    """What a record says of its payload.

    ``parent`` is the link before (empty: not known), ``number`` that of the block in its
    chain, ``cost`` the seconds to compute it, ``length`` and ``digest`` those of the payload.
    """

    key: BlockKey
    parent: bytes
    number: int
    cost: float
    length: int
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes of the whole record."""
        return RECORD_BYTES + self.length

    def fits(self, payload: bytes) -> bool:
        """Say whether ``payload`` is the one that was labelled."""
        return len(payload) == self.length and blake3(payload)[:16] == self.digest


def check_block(key: BlockKey, parent: bytes, number: int, payload: bytes, cost: float) -> None:
    """Raise :class:`InvalidRequest` (``bad_block_key``, ``bad_block``) for what is no block."""
    key.check()
    if len(parent) not in (0, LINK_BYTES) or not 0 <= number < 1 << 32:
        raise InvalidRequest("This is no place in a chain.", code="bad_block_key")
    if not payload or len(payload) > MAX_PAYLOAD:
        raise InvalidRequest(
            f"A block has 1 to {MAX_PAYLOAD} bytes, not {len(payload)}.",
            code="bad_block",
            limit=MAX_PAYLOAD,
        )
    if not math.isfinite(cost) or cost < 0:
        raise InvalidRequest("The cost of a block is in seconds, 0 or more.", code="bad_block")


def encode_segment_header(model: Digest) -> bytes:
    """Return the header of a segment of ``model``."""
    head = _MAGIC + bytes.fromhex(model)
    return head + _CRC.pack(zlib.crc32(head))


def decode_segment_header(data: bytes) -> Digest | None:
    """Return the model of a segment, ``None`` for bytes that are no header."""
    if len(data) < SEGMENT_HEADER_BYTES:
        return None
    magic, model, crc = _SEGMENT.unpack_from(data)
    if magic != _MAGIC or crc != zlib.crc32(data[: _SEGMENT.size - _CRC.size]):
        return None
    return Digest(model.hex())


def encode_record(
    key: BlockKey, parent: bytes, number: int, cost: float, payload: bytes
) -> tuple[Label, bytes]:
    """Return the label of a block and its record."""
    label = Label(key, parent, number, cost, len(payload), blake3(payload)[:16])
    head = _RECORD.pack(
        _RECORD_MAGIC,
        key.layer,
        label.length,
        number,
        cost,
        key.codec.encode("ascii"),
        key.chain,
        parent,
        label.digest,
    )
    return label, b"".join((head, _CRC.pack(zlib.crc32(head)), payload))


def decode_label(model: Digest, data: bytes) -> Label | None:
    """Return the label with which ``data`` begins; ``None`` for bytes that are none."""
    if len(data) < RECORD_BYTES:
        return None
    (crc,) = _CRC.unpack_from(data, _RECORD.size)
    if crc != zlib.crc32(data[: _RECORD.size]):
        return None
    magic, layer, length, number, cost, codec, chain, parent, digest = _RECORD.unpack_from(data)
    try:
        name = codec.rstrip(b"\0").decode("ascii")
        key = BlockKey(model, layer, chain, name)
        key.check()
    except (UnicodeDecodeError, InvalidRequest):
        return None
    if magic != _RECORD_MAGIC or not 0 < length <= MAX_PAYLOAD:
        return None
    if not math.isfinite(cost) or cost < 0:
        return None
    return Label(key, parent if any(parent) else b"", number, cost, length, digest)
