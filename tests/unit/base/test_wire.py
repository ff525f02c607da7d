"""Frames and messages: what goes in comes out, however it was cut; nothing else gets through."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, LimitExceeded, PyAgentError, Unsupported
from pyagent_node.base.wire import PREFIX, Codec, Frame, FrameDecoder, frame_prefix


class Ping(msgspec.Struct, tag="ping", frozen=True):
    number: int
    note: str = ""


class Pong(msgspec.Struct, tag="pong", frozen=True):
    number: int


CODEC: Codec[Ping | Pong] = Codec("test", Ping, Pong)


def encode(frame: Frame) -> bytes:
    return frame_prefix(frame) + frame.header + bytes(frame.tail)


frames = st.builds(Frame, st.binary(max_size=200), st.binary(max_size=2000))


@given(st.lists(frames, max_size=8), st.lists(st.integers(1, 500), min_size=1))
def test_frames_survive_any_cut_of_the_stream(sent: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(frame) for frame in sent)
    decoder = FrameDecoder()
    received: list[Frame] = []
    at = 0
    turn = 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        received += decoder.feed(data[at : at + size])
        at += size
        turn += 1
    assert received == sent
    assert decoder.pending == 0


@given(frames)
def test_a_torn_frame_is_visible_as_pending_bytes(frame: Frame) -> None:
    data = encode(frame)
    decoder = FrameDecoder()
    assert list(decoder.feed(data[:-1])) == []
    assert decoder.pending == len(data) - 1


@pytest.mark.parametrize(("header", "tail", "part"), [(11, 0, "header"), (0, 21, "tail")])
def test_an_oversized_frame_is_refused_from_its_prefix_alone(
    header: int, tail: int, part: str
) -> None:
    decoder = FrameDecoder(max_header=10, max_tail=20)
    with pytest.raises(LimitExceeded) as caught:
        list(decoder.feed(PREFIX.pack(header, tail)))
    assert caught.value.code == "frame_too_large"
    assert caught.value.facts["part"] == part
    with pytest.raises(LimitExceeded):
        frame_prefix(Frame(b"h" * header, b"t" * tail), max_header=10, max_tail=20)


def test_a_tail_is_measured_in_bytes_not_items() -> None:
    tail = memoryview(bytearray(8)).cast("d")
    assert frame_prefix(Frame(b"", tail)) == PREFIX.pack(0, 8)


@given(st.builds(Ping, st.integers(-(2**63), 2**63 - 1), st.text()))
def test_messages_round_trip(message: Ping) -> None:
    assert CODEC.decode(CODEC.encode(message)) == message


def test_an_unknown_field_is_ignored() -> None:
    header = msgspec.msgpack.encode({"type": "pong", "number": 1, "added_in_v2": [1, 2]})
    assert CODEC.decode(header) == Pong(1)


def test_an_unknown_type_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="'pang'") as caught:
        CODEC.decode(msgspec.msgpack.encode({"type": "pang"}))
    assert caught.value.code == "unknown_message"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(None),
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"type": 5}),
        msgspec.msgpack.encode({"type": "ping"}),
        msgspec.msgpack.encode({"type": "ping", "number": "one"}),
        msgspec.msgpack.encode({"type": "ping", "number": 1})[:-1],
        b"\x91" * 60_000,
    ],
    ids=repr,
)
def test_a_malformed_message_is_refused(header: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        CODEC.decode(header)
    assert caught.value.code == "malformed_message"


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_our_errors(header: bytes) -> None:
    with contextlib.suppress(PyAgentError):
        CODEC.decode(header)
