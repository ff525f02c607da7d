"""Frames and typed messages: the one wire format of the mesh, of runner pipes and of the log.

A frame is ``u32 header_length | u32 tail_length | header | tail``, lengths big-endian.  The header
is a MessagePack map with a ``type`` tag and decodes to one of a closed set of ``msgspec`` structs;
the tail is raw bytes (a tensor, a chunk of a file) that are never copied into a message.  Unknown
fields are ignored so that peers of different versions can talk; unknown types are refused by name.

This module does no I/O: :class:`FrameDecoder` is fed bytes and yields frames.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar, cast

import msgspec

from pyagent_node.base.errors import CorruptData, LimitExceeded, Unsupported
from pyagent_node.base.limits import MAX_HEADER, MAX_TAIL

PREFIX = struct.Struct(">II")
"""The eight bytes before every frame: header length, tail length."""

M = TypeVar("M")


class Frame(NamedTuple):
    """One frame: an encoded header and a raw tail (empty when there is none)."""

    header: bytes
    tail: bytes | bytearray | memoryview = b""


def check_lengths(
    header: int, tail: int, *, max_header: int = MAX_HEADER, max_tail: int = MAX_TAIL
) -> None:
    """Refuse a frame over its limits.

    Raises :class:`LimitExceeded` (``frame_too_large``) naming the part, its size and the limit.
    """
    for part, size, limit in (("header", header, max_header), ("tail", tail, max_tail)):
        if size > limit:
            raise LimitExceeded(
                f"A frame's {part} of {size} bytes is over the limit of {limit}.",
                code="frame_too_large",
                part=part,
                size=size,
                limit=limit,
            )


def frame_prefix(frame: Frame, *, max_header: int = MAX_HEADER, max_tail: int = MAX_TAIL) -> bytes:
    """Return the eight-byte prefix of ``frame``; send it, the header, then the tail.

    Raises :class:`LimitExceeded` when the frame is over the given limits.
    """
    tail_length = memoryview(frame.tail).nbytes
    check_lengths(len(frame.header), tail_length, max_header=max_header, max_tail=max_tail)
    return PREFIX.pack(len(frame.header), tail_length)


class FrameDecoder:
    """Cuts a byte stream into frames; holds at most one incomplete frame.

    The limits are checked as soon as the prefix is there, before anything is buffered for it.
    """

    def __init__(self, *, max_header: int = MAX_HEADER, max_tail: int = MAX_TAIL) -> None:
        self._buffer = bytearray()
        self._max_header = max_header
        self._max_tail = max_tail

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Add ``data`` and yield every frame that is now complete.

        Raises :class:`LimitExceeded` at an oversized frame; the stream is then unusable.
        """
        self._buffer += data
        while len(self._buffer) >= PREFIX.size:
            header_length, tail_length = PREFIX.unpack_from(self._buffer)
            check_lengths(
                header_length, tail_length, max_header=self._max_header, max_tail=self._max_tail
            )
            end = PREFIX.size + header_length + tail_length
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view:  # one copy, not two
                header = bytes(view[PREFIX.size : PREFIX.size + header_length])
                tail = bytes(view[PREFIX.size + header_length : end])
            del self._buffer[:end]
            yield Frame(header, tail)

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame; not zero at end of stream means it was torn."""
        return len(self._buffer)


class _TagOnly(msgspec.Struct):
    type: str


@functools.cache
def tag_of(kind: type[msgspec.Struct]) -> str | None:
    """Return a message type's string tag, ``None`` without one; to look takes a millisecond."""
    info = msgspec.inspect.type_info(kind)
    tag = info.tag if isinstance(info, msgspec.inspect.StructType) else None
    return tag if isinstance(tag, str) else None


class Codec(Generic[M]):
    """Encodes and decodes one closed set of tagged messages.

    ``types`` are ``msgspec.Struct`` classes with distinct string tags in the field ``type``
    (declare them with ``tag="name"``).
    """

    def __init__(self, name: str, *types: type[M]) -> None:
        self.name = name
        union = types[0]
        for t in types[1:]:
            union = cast("type[M]", union | t)
        self._decoder = msgspec.msgpack.Decoder(union)
        self._encoder = msgspec.msgpack.Encoder()
        tags = (tag_of(cast("type[msgspec.Struct]", t)) for t in types)
        self._tags = frozenset(tag for tag in tags if tag is not None)
        self._tag_decoder = msgspec.msgpack.Decoder(_TagOnly)

    def encode(self, message: M) -> bytes:
        """Return the MessagePack header of ``message``."""
        return self._encoder.encode(message)

    def decode(self, header: bytes | memoryview) -> M:
        """Return the message in ``header``.

        Raises :class:`Unsupported` (``unknown_message``) for a type outside the set and
        :class:`CorruptData` (``malformed_message``) for anything that does not fit its schema.
        """
        try:
            return self._decoder.decode(header)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            tag = self._tag(header)
            if tag is not None and tag not in self._tags:
                raise Unsupported(
                    f"Message type {tag[:64]!r} is not part of {self.name}.",
                    code="unknown_message",
                    remedy="The peer may run a newer version.",
                ) from None
            raise CorruptData(
                f"A malformed {self.name} message was refused: {str(error)[:200]}",
                code="malformed_message",
            ) from None

    def _tag(self, header: bytes | memoryview) -> str | None:
        try:
            return self._tag_decoder.decode(header).type
        except (msgspec.DecodeError, RecursionError, ValueError):
            return None
