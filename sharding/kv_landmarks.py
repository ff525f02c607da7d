"""Landmark blocks: a few rows of a longer stretch of tokens, with the places they are from.  Pure.

A *landmark block* has :data:`BLOCK_TOKENS` rows of one layer, like any block, but they are not
those of consecutive tokens.  So that it is never taken for one:

* its name is a digest of the name of the whole stretch, of the version of the form and of the
  layers that chose the rows together (another slice chooses others, and rows of one choice go into
  one sequence): :func:`landmark_chain`;
* its codec has a name of its own: :func:`landmark_codec`;
* its bytes begin with other ones than those of a block, with the places and a digest of them and
  of the rows.  In the store and between nodes they are sealed like any block on top of that.

Layout: magic (4), rows (u16), tokens of the stretch (u32), places (u32 each), digest (16), and the
rows as ``kv_codec`` packs them at a level.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_codec import KvShape, Level, Rows, decode, encode
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, LINK_BYTES, MAX_LAYER

VERSION: Final = 1
"""Of the policy that chooses the rows: what another one chose has other names."""
MAX_STRETCH: Final = 1 << 20
"""The most tokens that landmarks may stand for."""
_DOMAIN: Final = b"pyagent-node landmarks\0"
_HEAD: Final = struct.Struct("<4sHI")
_MAGIC: Final = b"pLM\1"
_SUM: Final = 16

Places = NDArray[np.int32]


class Landmarks(NamedTuple):
    """Rows of one layer and where they are from: ``places`` in a stretch of ``tokens``."""

    tokens: int
    places: Places
    rows: Rows


def landmark_chain(link: bytes, first_layer: int, last_layer: int, count: int) -> tuple[bytes, ...]:
    """Return the names of ``count`` landmark blocks.

    ``link`` is the name of the last block of the whole stretch, so it stands for all its tokens;
    the rows were chosen by the attention of the layers ``[first_layer, last_layer)`` together.
    Raises :class:`InvalidRequest` (``bad_block_key``).
    """
    if len(link) != LINK_BYTES or not 0 <= first_layer < last_layer <= MAX_LAYER + 1 or count < 1:
        raise InvalidRequest("There can be no landmarks of this.", code="bad_block_key")
    form = struct.pack("<HIII", VERSION, first_layer, last_layer, count)
    last = blake3(_DOMAIN + form + link)
    names = [last]
    for _ in range(count - 1):
        last = blake3(_DOMAIN + last)
        names.append(last)
    return tuple(names)


def landmark_codec(codec: str) -> str:
    """Return the name of the codec of landmark blocks whose rows are packed as ``codec`` says."""
    return f"{codec}+lm{VERSION}"


def is_landmarks(codec: str) -> bool:
    """Whether ``codec`` is one that :func:`landmark_codec` names."""
    return codec.endswith(landmark_codec(""))


def split(block: bytes) -> tuple[bytes, bytes]:
    """Return a landmark block in two parts, neither empty: what it says of itself, and the rest."""
    return block[: _HEAD.size], block[_HEAD.size :]


def pack(
    level: Level, keys: bytes, values: bytes, *, places: Places, tokens: int, shape: KvShape
) -> bytes:
    """Return a landmark block.  Errors are those of ``kv_codec.encode``, and ``kv_shape`` for
    places that do not rise within the stretch.
    """
    if not _fit(places, tokens) or len(places) > BLOCK_TOKENS:
        raise InvalidRequest("Landmarks have places that rise.", code="kv_shape")
    plain = KvShape(shape.heads, shape.width)  # places have gaps: no rotation by row to undo
    data = encode(level, keys, values, tokens=len(places), shape=plain)
    head = _HEAD.pack(_MAGIC, len(places), tokens) + places.astype("<u4").tobytes()
    return b"".join((head, blake3(head + data)[:_SUM], data))


def unpack(level: Level, block: bytes, *, shape: KvShape) -> Landmarks:
    """Return what :func:`pack` was given.

    Raises :class:`CorruptData` (``bad_landmarks``) for other bytes, and what ``kv_codec.decode``
    raises for its part of them.
    """
    tokens, places, data = _opened(block)
    return Landmarks(tokens, places, decode(level, data, tokens=len(places), shape=shape))


def check(block: bytes) -> None:
    """Raise :class:`CorruptData` (``bad_landmarks``) for what :func:`pack` did not make.

    The rows are not looked into.
    """
    _opened(block)


def _opened(block: bytes) -> tuple[int, Places, bytes]:
    if len(block) < _HEAD.size or not block.startswith(_MAGIC):
        raise _bad("it is none")
    _, count, tokens = _HEAD.unpack_from(block)
    end = _HEAD.size + 4 * count
    if not 1 <= count <= BLOCK_TOKENS or len(block) < end + _SUM:
        raise _bad("it was cut")
    head, data = block[:end], block[end + _SUM :]
    if blake3(head + data)[:_SUM] != block[end : end + _SUM]:
        raise _bad("its digest is another one")
    wide = np.frombuffer(head, "<u4", offset=_HEAD.size).astype(np.int64)
    if not _fit(wide, tokens):
        raise _bad("its places do not rise")
    return tokens, wide.astype(np.int32), data


def _fit(places: NDArray[np.int32] | NDArray[np.int64], tokens: int) -> bool:
    if not len(places) or not len(places) <= tokens <= MAX_STRETCH:
        return False
    rising = bool((np.diff(places) > 0).all())
    return rising and int(places[0]) >= 0 and int(places[-1]) < tokens


def _bad(what: str) -> CorruptData:
    return CorruptData(
        f"A landmark block cannot be read: {what}.",
        code="bad_landmarks",
        remedy="The whole piece is fetched or computed.",
    )
