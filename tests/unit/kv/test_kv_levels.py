"""Blocks at levels that are not exact: what is kept, who finds it, and what cannot be kept."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import LayerKv
from pyagent_node.inference.kv.port import SettledBlock
from pyagent_node.node.kv_blocks import RowSizes, codec_name, make_blocks, read_block
from pyagent_node.sharding.kv_codec import EXACT, LEVELS, KvShape, Level
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

from .kv_kit import LINKS, MODEL

CELLS = "test/1/f16"
SHAPE = KvShape(2, 12, 1e4)
BLOCK = SettledBlock(
    SessionId("5" * 32), PeerId("12D3KooWTest"), MODEL, 4, 0, LINKS[0], 0, 1, CELLS, SHAPE
)


def rows(seed: int = 1) -> LayerKv:
    made = np.random.default_rng(seed).standard_normal((2, BLOCK_TOKENS, 24)).astype("<f2")
    return LayerKv(0, made[0].tobytes(), made[1].tobytes())


@pytest.mark.parametrize("level", LEVELS)
def test_a_block_comes_back_as_exactly_as_its_level_says(level: Level) -> None:
    kv = rows()
    (made,) = make_blocks(BLOCK, b"", [kv], 0.5, level)
    assert made.key.codec == codec_name(CELLS, level)
    sizes = RowSizes()
    sizes.learn(MODEL, CELLS, [kv])
    found = read_block(made.key, made.data, CELLS, sizes, level)
    assert (found == kv) == (level == EXACT)
    for raw, exact in ((found.keys, kv.keys), (found.values, kv.values)):
        off = np.frombuffer(raw, "<f2").astype(float) - np.frombuffer(exact, "<f2")
        assert np.abs(off).max() < 1.0
    if level != EXACT:
        assert len(made.data) < len(kv.keys) * 1.2


def test_whoever_keeps_another_level_refuses_it() -> None:
    (made,) = make_blocks(BLOCK, b"", [rows()], 0.5, "int4")
    for other in (EXACT, "int3"):
        with pytest.raises(CorruptData, match="another format"):
            read_block(made.key, made.data, CELLS, level=other)  # type: ignore[arg-type]


def test_rows_whose_make_up_is_not_known_are_kept_all_the_same() -> None:
    for shape in (None, KvShape(5, 7)):
        block = msgspec.structs.replace(BLOCK, shape=shape)
        (made,) = make_blocks(block, b"", [rows()], 0.5, "int4")
        assert len(read_block(made.key, made.data, CELLS, level="int4").keys) == len(rows().keys)


def test_what_is_not_finite_is_not_kept() -> None:
    wild = np.full((BLOCK_TOKENS, 24), np.nan, "<f2").tobytes()
    with pytest.raises(InvalidRequest) as caught:
        make_blocks(BLOCK, b"", [LayerKv(0, wild, wild)], 0.5, "int4")
    assert caught.value.code == "kv_shape"
