"""A digest of the blocks that a node holds, small enough to be told to every peer.  Pure.

For each model, codec and set of layers there is a Bloom filter of the names of links (B. Bloom,
*Space/time trade-offs in hash coding with allowable errors*, CACM 13(7), 1970).  Names are BLAKE3
digests already, so the positions in a filter are two of their words, combined as by A. Kirsch and
M. Mitzenmacher, *Less hashing, same performance* (ESA 2006).

A summary never denies a block that was held when it was made, and claims one that was not with a
probability of :attr:`Summary.false_positives`: at :data:`BITS` bits a link 0.0031.  It gives no
prompt away: only who knows the tokens (and the salt) can form a name to look up.

Bytes from a peer are checked for size, form, checksum, and for filters that claim too much.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_stats import Held
from pyagent_node.sharding.kv_keys import LINK_BYTES, BlockKey

BITS: Final = 12
"""Bits of a filter for each link, while that fits."""
DEFAULT_BYTES: Final = 256 * KIB
MAX_BYTES: Final = MIB
"""Bytes of a summary; a longer one is refused."""
MAX_GROUPS: Final = 256
"""Sets of (model, codec, layers) in a summary."""
MAX_LAYERS: Final = 1024

_LEAST_BITS: Final = 6
_LEAST_BYTES: Final = 8
_FULLEST: Final = 0.8
"""Share of bits set beyond which a filter says nothing; an honest one sets about a half."""
_MAGIC: Final = b"KVSUM1\n\0"
_CRC_BYTES: Final = 4
_GROUP_BYTES: Final = 320
"""What a group takes at most beside its filter."""


class _Group(msgspec.Struct, frozen=True, array_like=True):
    """``links`` names of ``model`` in ``codec`` that are held with the layers in ``mask``."""

    model: Digest
    codec: str
    mask: bytes
    links: int
    hashes: int
    bits: bytes


def build_summary(held: Iterable[Held], *, max_bytes: int = DEFAULT_BYTES) -> bytes:
    """Return a summary of what is held, of at most ``max_bytes``.

    When there is too much, filters are made less sharp, down to 6 bits a link (0.056 of lookups
    then claim a block wrongly), and then the links farthest from the beginning of their chains
    are left out, and groups beyond :data:`MAX_GROUPS` with the fewest links.
    """
    groups: dict[tuple[Digest, str, int], list[Held]] = {}
    for link in held:
        if 0 < link.layers < 1 << MAX_LAYERS:
            groups.setdefault((link.model, link.codec, link.layers), []).append(link)
    room = min(max_bytes, MAX_BYTES) - len(_MAGIC) - _CRC_BYTES - 8
    most = min(MAX_GROUPS, max(0, room // (2 * _GROUP_BYTES)))
    chosen = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))[:most]
    links = sum(len(members) for _, members in chosen)
    room = (room - _GROUP_BYTES * len(chosen)) * 8
    sharpness = min(float(BITS), room / links) if links else float(BITS)
    share = min(1.0, sharpness / _LEAST_BITS)
    made: list[_Group] = []
    for (model, codec, layers), members in chosen:
        count = math.floor(len(members) * share)
        if not count:
            continue
        members.sort(key=lambda link: link.number)
        made.append(_filter(model, codec, layers, [m.chain for m in members[:count]], sharpness))
    body = _MAGIC + msgspec.msgpack.encode(made)
    return body + zlib.crc32(body).to_bytes(_CRC_BYTES, "little")


def _filter(
    model: Digest, codec: str, layers: int, links: Sequence[bytes], sharpness: float
) -> _Group:
    per_link = max(sharpness, _LEAST_BITS)
    size = max(_LEAST_BYTES, math.floor(len(links) * per_link) // 8)
    hashes = max(1, round(per_link * math.log(2)))
    bits = np.zeros(size * 8, np.uint8)
    bits[_positions(links, hashes, size * 8).ravel()] = 1
    mask = layers.to_bytes((layers.bit_length() + 7) // 8, "little")
    packed = np.packbits(bits, bitorder="little").tobytes()
    return _Group(model, codec, mask, len(links), hashes, packed)


def _positions(links: Sequence[bytes], hashes: int, size: int) -> NDArray[np.uint64]:
    """Return for each link the positions of its bits in a filter of ``size`` bits."""
    words = np.frombuffer(b"".join(links), "<u8").reshape(len(links), LINK_BYTES // 8)
    first, second = words[:, 0] >> np.uint64(16), words[:, 1] >> np.uint64(16)
    steps = np.arange(hashes, dtype=np.uint64)
    spread = first[:, None] + steps[None, :] * (second | np.uint64(1))[:, None]
    return spread % np.uint64(size)


class Summary:
    """A summary that a peer made."""

    def __init__(self, data: bytes) -> None:
        """Check and read ``data``; raises :class:`CorruptData` (``bad_summary``)."""
        if len(data) > MAX_BYTES or len(data) < len(_MAGIC) + _CRC_BYTES:
            raise _bad("its size is wrong")
        body, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if not body.startswith(_MAGIC):
            raise _bad("it is of another version")
        if zlib.crc32(body).to_bytes(_CRC_BYTES, "little") != crc:
            raise _bad("its checksum does not match")
        try:
            groups = msgspec.msgpack.decode(body[len(_MAGIC) :], type=list[_Group])
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise _bad("its form is wrong") from None
        if len(groups) > MAX_GROUPS:
            raise _bad("it has too many parts")
        self._groups = [(_check(group), group) for group in groups]

    @property
    def links(self) -> int:
        """How many links it says are held."""
        return sum(group.links for _, group in self._groups)

    @property
    def false_positives(self) -> float:
        """The chance that a link that is not held is claimed, at worst."""
        return max(
            (
                (1 - math.exp(-g.hashes * g.links / (8 * len(g.bits)))) ** g.hashes
                for _, g in self._groups
            ),
            default=0.0,
        )

    def codecs(self, model: Digest) -> frozenset[str]:
        """Return the codecs in which blocks of a model are held."""
        return frozenset(group.codec for _, group in self._groups if group.model == model)

    def counts(
        self, model: Digest, chain: Sequence[bytes], layers: range, codec: str
    ) -> dict[int, int]:
        """Return for each of ``layers`` how many leading links of ``chain`` are likely held."""
        held = np.zeros((len(chain), len(layers)), np.bool_)
        for mask, group in self._groups:
            mine = [i for i, layer in enumerate(layers) if mask >> layer & 1]
            if mine and chain and (group.model, group.codec) == (model, codec):
                held[:, mine] |= _contains(group, chain)[:, None]
        leading = np.logical_and.accumulate(held, axis=0).sum(axis=0)
        return {layer: int(count) for layer, count in zip(layers, leading, strict=True)}

    def leading(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> int:
        """Return how many leading links are likely held with all of ``layers``."""
        return min(self.counts(model, chain, layers, codec).values(), default=0)


def _contains(group: _Group, chain: Sequence[bytes]) -> NDArray[np.bool_]:
    at = _positions(chain, group.hashes, len(group.bits) * 8)
    bits = np.frombuffer(group.bits, np.uint8)
    hit = bits[at >> np.uint64(3)] >> (at & np.uint64(7)).astype(np.uint8) & 1
    return np.asarray(hit.all(axis=1), dtype=np.bool_)


def _check(group: _Group) -> int:
    """Return the layers of a group as bits; refuse what no honest node sends."""
    try:
        BlockKey(group.model, 0, bytes(LINK_BYTES), group.codec).check()
    except InvalidRequest:
        raise _bad("a name in it is wrong") from None
    if not 0 < len(group.mask) <= MAX_LAYERS // 8 or not any(group.mask):
        raise _bad("a set of layers is wrong")
    if not 1 <= group.hashes <= 16 or not group.bits or group.links < 1:
        raise _bad("a filter is wrong")
    ones = int.from_bytes(group.bits, "little").bit_count()
    if ones > min(group.links * group.hashes, 8 * len(group.bits) * _FULLEST):
        raise _bad("a filter claims too much")
    return int.from_bytes(group.mask, "little")


def _bad(why: str) -> CorruptData:
    return CorruptData(f"A summary of KV blocks cannot be read: {why}.", code="bad_summary")
