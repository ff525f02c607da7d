"""multistream-select 1.0: agreeing on what to speak next, on a connection or a stream.

https://github.com/multiformats/multistream-select.  The proposer sends its banner and its one
proposal together, which saves a round trip against py-libp2p's own.  Lines are bounded to
:data:`MAX_LINE`; a first byte that is not the banner's ends it at once, which is how a private
network's other key, or a server that is no libp2p node at all, shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

BANNER: Final = "/multistream/1.0.0"
NOT_SPOKEN: Final = "na"
MAX_LINE: Final = 1024
"""Bytes in one line; the specification asks for no more."""
MAX_PROPOSALS: Final = 8
"""Proposals that a proposer may make before it is sent away."""


class ByteIO(Protocol):
    """A stream of bytes to negotiate on."""

    async def read_exactly(self, size: int) -> bytes:
        """Return ``size`` bytes; raises :class:`EndOfBytes` when the stream ends before."""
        ...

    async def write(self, data: bytes) -> None:
        """Send ``data``."""
        ...


class EndOfBytes(Exception):
    """The stream ended where more was due; the text says how."""


class NotMultistream(Exception):
    """The other side does not speak multistream-select."""

    def __init__(self, start: bytes) -> None:
        super().__init__("The other side does not speak multistream-select.")
        self.start = start


class NotSpoken(Exception):
    """The other side refuses the protocol."""


def encode_line(text: str) -> bytes:
    """Return ``text`` as a line: varint length, text, newline."""
    data = text.encode() + b"\n"
    size = len(data)
    if size > MAX_LINE:
        raise ValueError("a protocol id is longer than a line may be")
    return (bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])) + data


async def _read_line(io: ByteIO) -> str:
    size = (await io.read_exactly(1))[0]
    if size & 0x80:
        high = (await io.read_exactly(1))[0]
        size = (size & 0x7F) | (high << 7)
        if high & 0x80:
            raise NotMultistream(b"")
    if not 0 < size <= MAX_LINE:
        raise NotMultistream(b"")
    data = await io.read_exactly(size)
    if data[-1:] != b"\n":
        raise NotMultistream(data)
    try:
        return data[:-1].decode()
    except UnicodeDecodeError:
        raise NotMultistream(data) from None


async def _read_banner(io: ByteIO) -> None:
    expected = encode_line(BANNER)
    data = await io.read_exactly(1)
    if data == expected[:1]:
        data += await io.read_exactly(len(expected) - 1)
    if data != expected:
        raise NotMultistream(data)


async def propose(io: ByteIO, protocol: str) -> None:
    """Ask the other side to speak ``protocol``.

    Raises :class:`NotSpoken`, :class:`NotMultistream` or :class:`EndOfBytes`.
    """
    await io.write(encode_line(BANNER) + encode_line(protocol))
    await _read_banner(io)
    answer = await _read_line(io)
    if answer == NOT_SPOKEN:
        raise NotSpoken(protocol)
    if answer != protocol:
        raise NotMultistream(answer.encode())


async def respond(io: ByteIO, choose: Callable[[str], Awaitable[bool]]) -> str:
    """Answer proposals until ``choose`` takes one; return it.

    Raises :class:`NotSpoken` after :data:`MAX_PROPOSALS`, :class:`NotMultistream` or
    :class:`EndOfBytes`.
    """
    await io.write(encode_line(BANNER))
    await _read_banner(io)
    for _ in range(MAX_PROPOSALS):
        proposal = await _read_line(io)
        if await choose(proposal):
            await io.write(encode_line(proposal))
            return proposal
        await io.write(encode_line(NOT_SPOKEN))
    raise NotSpoken("every proposal")
