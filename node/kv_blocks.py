"""From the cells of a runner to the sealed blocks that are kept and sent, and back.  Pure.

Blocks are exact unless the node was told otherwise (``kv_level``): what is loaded has every bit of
what was computed.  Cells in f16 go through the block codec; those of any other format are kept as
they are.  A block's codec names the level and the format of the cells, so that runners of another
version, and nodes that keep blocks at another level, never find it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

import numpy as np

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.types import Digest
from pyagent_node.inference.backend import LayerKv
from pyagent_node.inference.kv.port import SettledBlock
from pyagent_node.native import blake3
from pyagent_node.node.kv_messages import Bytes, Sealed, seal, unseal
from pyagent_node.sharding.kv_codec import EXACT, MAX_ROW, KvShape, Level, decode_rows, encode
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, BlockKey
from pyagent_node.sharding.kv_landmarks import check as check_landmarks
from pyagent_node.sharding.kv_landmarks import is_landmarks

_CODED: Final = b"\1"
_PLAIN: Final = b"\0"
_PREFIX: Final = struct.Struct("<cI")
"""How the rows are packed, and the bytes of the keys."""
_F16_BYTES: Final = 2


class RowSizes:
    """How many bytes of keys and values a block of a layer has; learnt from what is made here."""

    def __init__(self) -> None:
        self._known: dict[tuple[Digest, str, int], tuple[int, int]] = {}

    def learn(self, model: Digest, cells: str, layers: Iterable[LayerKv]) -> None:
        """Take note of blocks that were computed here; those of landmarks have no one size."""
        if is_landmarks(cells):
            return
        for kv in layers:
            self._known[model, cells, kv.layer] = (len(kv.keys), len(kv.values))

    def check(self, model: Digest, cells: str, kv: LayerKv) -> None:
        """Raise :class:`CorruptData` (``bad_kv_block``) for rows of another size."""
        known = self._known.get((model, cells, kv.layer))
        if known is not None and known != (len(kv.keys), len(kv.values)):
            raise _bad(f"{len(kv.keys)} and {len(kv.values)} bytes instead of {known}", kv.layer)

    def mean(self, model: Digest, cells: str) -> float:
        """Return the mean bytes of a layer's block, 0 when none was made here yet."""
        sizes = [sum(size) for key, size in self._known.items() if key[:2] == (model, cells)]
        return sum(sizes) / len(sizes) if sizes else 0.0


def codec_name(cells: str, level: Level = EXACT) -> str:
    """Return the codec of blocks at a level whose cells have the format ``cells``."""
    return f"{level}-{blake3(cells.encode())[:4].hex()}"


def is_f16(cells: str) -> bool:
    """Whether cells are rows of 16-bit floats."""
    return cells.endswith("/f16")


def make_blocks(
    block: SettledBlock,
    parent: bytes,
    layers: Iterable[LayerKv],
    seconds: float,
    level: Level = EXACT,
) -> list[Sealed]:
    """Return the sealed layers of a block; ``seconds`` is what each of them took to compute.

    Raises :class:`InvalidRequest` (``kv_shape``) for numbers that are not finite, at lossy levels.
    """
    made = []
    for kv in layers:
        key = BlockKey(block.model, kv.layer, block.chain, codec_name(block.cells, level))
        data = seal(key, _pack(kv, block, level))
        made.append(Sealed(key, parent, block.index, data, seconds))
    return made


def read_block(
    key: BlockKey,
    sealed: Bytes,
    cells: str,
    sizes: RowSizes | None = None,
    level: Level = EXACT,
) -> LayerKv:
    """Return the cells of a sealed block.

    With ``sizes`` it is a peer's, and checked in every respect: its rows must have the right sizes
    and hold finite numbers.  Raises :class:`CorruptData` (``bad_kv_block``, ``bad_landmarks``, or
    the codec's).
    """
    if key.codec != codec_name(cells, level):
        raise _bad("another format of cells", key.layer)
    kv = _unpack(key.layer, unseal(key, sealed), cells, level)
    if sizes is not None:
        sizes.check(key.model, cells, kv)
        if is_f16(cells):
            for data in (kv.keys, kv.values):
                if not np.isfinite(np.frombuffer(data, np.float16)).all():
                    raise _bad("numbers that are not finite", key.layer)
        elif is_landmarks(cells):
            check_landmarks(kv.keys + kv.values)
    return kv


def _pack(kv: LayerKv, block: SettledBlock, level: Level) -> bytes:
    row = len(kv.keys) // (BLOCK_TOKENS * _F16_BYTES)
    whole = row * BLOCK_TOKENS * _F16_BYTES == len(kv.keys) == len(kv.values)
    if is_f16(block.cells) and whole and 0 < row <= MAX_ROW:
        known = block.shape
        fits = known is not None and known.row_bytes == row * _F16_BYTES
        data = encode(
            level,
            kv.keys,
            kv.values,
            tokens=BLOCK_TOKENS,
            shape=known if known is not None and fits else KvShape(1, row),
            begins_text=block.index == 0,
        )
        return _PREFIX.pack(_CODED, len(kv.keys)) + data
    return b"".join((_PREFIX.pack(_PLAIN, len(kv.keys)), kv.keys, kv.values))


def _unpack(layer: int, payload: bytes, cells: str, level: Level) -> LayerKv:
    if len(payload) < _PREFIX.size:
        raise _bad("no rows", layer)
    how, size = _PREFIX.unpack_from(payload)
    data = payload[_PREFIX.size :]
    row = size // (BLOCK_TOKENS * _F16_BYTES)
    if how == _CODED and is_f16(cells) and 0 < row <= MAX_ROW:
        rows = decode_rows(level, data, tokens=BLOCK_TOKENS, row_bytes=row * _F16_BYTES)
        return LayerKv(layer, rows.keys, rows.values)
    if how != _PLAIN or not 0 < size < len(data):
        raise _bad("rows in no known form", layer)
    return LayerKv(layer, data[:size], data[size:])


def _bad(what: str, layer: int) -> CorruptData:
    return CorruptData(
        f"A KV block has {what}.",
        code="bad_kv_block",
        remedy="It is computed again.",
        layer=layer,
    )
