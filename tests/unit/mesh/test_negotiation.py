"""multistream-select: agreement, refusal, and lines that are no lines."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pyagent_node.node.mesh.negotiation import (
    BANNER,
    MAX_LINE,
    MAX_PROPOSALS,
    EndOfBytes,
    NotMultistream,
    NotSpoken,
    encode_line,
    propose,
    respond,
)


class Pipe:
    """One end of a stream in memory."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def read_exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = await self.stream.receive_some(64)
            if not data:
                raise EndOfBytes("closed")
            self.buffer += data
        result, self.buffer = self.buffer[:size], self.buffer[size:]
        return result

    async def write(self, data: bytes) -> None:
        await self.stream.send_all(data)


def pair() -> tuple[Pipe, Pipe]:
    a, b = trio.testing.memory_stream_pair()
    return Pipe(a), Pipe(b)


async def only_noise(protocol: str) -> bool:
    return protocol == "/noise"


def test_lines_are_encoded_as_the_specification_shows() -> None:
    assert encode_line(BANNER) == b"\x13/multistream/1.0.0\n"
    assert encode_line("na") == b"\x03na\n"
    long = "/" + "x" * 300
    assert encode_line(long)[:2] == bytes([(302 & 0x7F) | 0x80, 302 >> 7])
    with pytest.raises(ValueError, match="longer"):
        encode_line("x" * MAX_LINE)


@pytest.mark.parametrize("protocol", ["/noise", "/" + "x" * 300])
async def test_two_sides_agree(protocol: str) -> None:
    a, b = pair()

    async def anything(proposal: str) -> bool:
        return proposal == protocol

    async with trio.open_nursery() as nursery:
        nursery.start_soon(propose, a, protocol)
        assert await respond(b, anything) == protocol


async def test_a_refusal_is_named() -> None:
    a, b = pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            with pytest.raises(EndOfBytes):
                await respond(b, only_noise)

        nursery.start_soon(serve)
        with pytest.raises(NotSpoken):
            await propose(a, "/plaintext/2.0.0")
        await a.stream.aclose()


async def test_proposals_are_bounded() -> None:
    a, b = pair()
    await a.write(encode_line(BANNER) + encode_line("/tls/1.0.0") * (MAX_PROPOSALS + 1))
    with pytest.raises(NotSpoken):
        await respond(b, only_noise)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",
        b"HTTP/1.1 200 OK\r\n",
        b"\x13/multistream/2.0.0\n",
        encode_line(BANNER) + b"\x00",
        encode_line(BANNER) + b"\xff\xff\x01",
        encode_line(BANNER) + b"\xff\x7f",
        encode_line(BANNER) + b"\x03abc",
        encode_line(BANNER) + b"\x03\xff\xfe\n",
    ],
)
async def test_what_is_no_line_is_refused(data: bytes) -> None:
    a, b = pair()
    await a.write(data)
    with pytest.raises(NotMultistream):
        await respond(b, only_noise)
    await a.write(data)
    c, d = pair()
    await c.write(data)
    with pytest.raises(NotMultistream):
        await propose(d, "/noise")


async def test_an_end_in_a_line_is_told_apart() -> None:
    a, b = pair()
    await a.write(encode_line(BANNER)[:7])
    await a.stream.send_eof()
    with pytest.raises(EndOfBytes):
        await propose(b, "/noise")
    a, b = pair()
    await a.write(encode_line(BANNER) + encode_line("/other"))
    with pytest.raises(NotMultistream) as caught:
        await propose(b, "/noise")
    assert caught.value.start == b"/other"
