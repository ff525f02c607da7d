"""Summaries of held blocks: never a false no, few false yeses, and nothing from hostile bytes."""

from __future__ import annotations

import random
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_stats import Held
from pyagent_node.sharding.block_summary import BITS, MAX_BYTES, Summary, build_summary
from pyagent_node.sharding.block_tree import mask_of

MODEL, OTHER = Digest("ab" * 32), Digest("cd" * 32)


def links(rng: random.Random, count: int) -> list[bytes]:
    return [rng.randbytes(32) for _ in range(count)]


def held(
    chain: list[bytes], layers: range, model: Digest = MODEL, codec: str = "f16"
) -> list[Held]:
    return [Held(model, codec, link, i, mask_of(layers)) for i, link in enumerate(chain)]


def test_what_is_held_is_found_and_the_rest_rarely() -> None:
    rng = random.Random(1)
    chain = links(rng, 3000)
    data = build_summary(held(chain, range(4, 12)))
    assert len(data) < 3000 * BITS / 8 + 200
    summary = Summary(data)
    assert summary.links == 3000
    assert summary.leading(MODEL, chain[:500], range(4, 12), "f16") == 500
    assert summary.leading(MODEL, chain[:500], range(5, 7), "f16") == 500
    assert summary.leading(MODEL, chain[:500], range(4, 13), "f16") == 0
    assert summary.leading(OTHER, chain[:500], range(4, 12), "f16") == 0
    assert summary.leading(MODEL, chain[:500], range(4, 12), "int8") == 0
    assert summary.leading(MODEL, [], range(4, 12), "f16") == 0
    assert summary.leading(MODEL, chain, range(0), "f16") == 0
    assert summary.counts(MODEL, chain[:9], range(3, 5), "f16") == {3: 0, 4: 9}
    tries = 20_000
    wrong = sum(summary.leading(MODEL, [link], range(4, 12), "f16") for link in links(rng, tries))
    # 62 are expected; 4 standard deviations are 31.
    assert summary.false_positives == pytest.approx(0.0031, rel=0.05)
    assert abs(wrong - tries * summary.false_positives) < 31


@given(st.integers(0, 2**32), st.integers(1, 300), st.integers(0, 20))
def test_there_is_never_a_false_no(seed: int, count: int, split: int) -> None:
    rng = random.Random(seed)
    chain = links(rng, count)
    low = held(chain, range(0, 8))
    high = held(chain[: count * split // 20], range(8, 16))
    summary = Summary(build_summary([*low, *high, *held(links(rng, 9), range(2), OTHER)]))
    assert summary.leading(MODEL, chain, range(0, 8), "f16") == count
    assert summary.leading(MODEL, chain[: len(high)], range(0, 16), "f16") == len(high)


def test_too_much_makes_it_less_sharp_and_then_shallower() -> None:
    rng = random.Random(2)
    chain = links(rng, 10_000)
    for limit in (12_000, 9_000, 4_000, 800):
        data = build_summary(held(chain, range(30)), max_bytes=limit)
        assert len(data) <= limit
        summary = Summary(data)
        found = summary.leading(MODEL, chain, range(30), "f16")
        assert found >= summary.links
        if limit >= 9_000:
            assert found == 10_000
        else:
            assert 0 < summary.links < 10_000
        assert summary.false_positives < 0.06
    assert Summary(build_summary(held(chain, range(30)), max_bytes=0)).links == 0


def test_many_kinds_of_links_fit_too() -> None:
    rng = random.Random(3)
    everything = [
        Held(Digest(rng.randbytes(32).hex()), "f16", rng.randbytes(32), 0, 1 << rng.randrange(1000))
        for _ in range(3000)
    ]
    data = build_summary(everything)
    assert len(data) <= MAX_BYTES
    assert Summary(data).links > 100


def test_nothing_held_is_a_summary_too() -> None:
    summary = Summary(build_summary([]))
    assert summary.links == 0
    assert summary.false_positives == 0.0
    assert summary.leading(MODEL, [bytes(32)], range(2), "f16") == 0


def seal(groups: object, magic: bytes = b"KVSUM1\n\0") -> bytes:
    body = magic + msgspec.msgpack.encode(groups)
    return body + zlib.crc32(body).to_bytes(4, "little")


GOOD: list[object] = [MODEL, "f16", b"\x01", 10, 4, b"\x11" * 8]


def changed(place: int, value: object) -> list[object]:
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"KVSUM1\n\0",
        bytes(200),
        bytes(MAX_BYTES + 1),
        seal([GOOD], b"KVSUM9\n\0"),
        seal([GOOD])[:-1],
        seal([GOOD])[:-1] + b"x",
        seal({"a": 1}),
        seal([GOOD] * 257),
        seal([GOOD[:3]]),
        seal([changed(0, "not a model")]),
        seal([changed(1, "")]),
        seal([changed(1, "f" * 65)]),
        seal([changed(2, b"")]),
        seal([changed(2, b"\0")]),
        seal([changed(2, b"\x01" * 129)]),
        seal([changed(3, 0)]),
        seal([changed(3, -1)]),
        seal([changed(4, 0)]),
        seal([changed(4, 17)]),
        seal([changed(5, b"")]),
        seal([changed(5, b"\xff" * 8)]),  # claims everything
        seal([changed(5, b"\x11" * 100)]),  # more bits than links could have set
        seal([[*changed(3, 10**6)[:5], b"\xff" * 1000]]),
    ],
)
def test_hostile_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptData) as caught:
        Summary(data)
    assert caught.value.code == "bad_summary"


def test_a_good_one_passes_the_same_way() -> None:
    assert Summary(seal([GOOD])).links == 10


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    body = b"KVSUM1\n\0" + data
    with pytest.raises(CorruptData):
        Summary(data)
    try:
        summary = Summary(body + zlib.crc32(body).to_bytes(4, "little"))
    except CorruptData:
        return
    assert summary.leading(MODEL, [bytes(32)], range(2), "f16") in (0, 1)
