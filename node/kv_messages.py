"""The messages of ``/pyagent/kv/1``: KV blocks asked for, sent to be kept, and told of.

One asks on a stream, the other answers in order; the asker may send the next request at once.  A
*sealed* block is its payload behind a digest of its key and itself, made once by whoever computed
it: a payload that was stored or sent under another key, or changed, is seen for what it is.

Chain hashes, not tokens, name blocks; who knows a hash knew the tokens.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import CorruptData, ErrorInfo, InvalidRequest
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.base.wire import Codec
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_keys import BlockKey

PROTOCOL: Final = "/pyagent/kv/1"

MAX_CHAIN: Final = 1024
"""Blocks that one request may name; more take several requests."""
MAX_INDEX: Final = 1 << 20
"""Blocks of one chain."""
MAX_LAYERS: Final = 1024
"""Layers that one request may name."""
MAX_BLOCK_BYTES: Final = 16 * MIB
"""Bytes of one layer's block, sealed."""
MAX_FRAME_BYTES: Final = 32 * MIB
"""Bytes of blocks in one frame; a frame holds one layer at least."""
MAX_SUMMARY_BYTES: Final = 1 * MIB
"""Bytes of one node's summary."""
MAX_HOLDERS: Final = 16
"""Peers that one report may name."""
MAX_REST: Final = 64
"""Tokens of one rest."""
MAX_CODEC: Final = 64
"""Characters of the name of a codec."""

HASH_BYTES: Final = 32
SEAL_BYTES: Final = 16
_SEAL: Final = b"pyagent kv block 1\0"


class Have(msgspec.Struct, frozen=True, tag="have"):
    """Ask how many leading blocks of ``chain`` are held, for each of the layers.

    ``epoch`` is that of the placement as the asker knows it: who is behind catches up first.
    """

    model: Digest
    codec: str
    chain: tuple[bytes, ...]
    first_layer: int
    last_layer: int
    epoch: int = 0


class Had(msgspec.Struct, frozen=True, tag="had"):
    """``counts`` has an entry for each layer asked for."""

    counts: tuple[int, ...]


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Ask for blocks; answered by :class:`Piece` messages in the order of ``chain``, then Done.

    What is not held is left out.
    """

    model: Digest
    codec: str
    chain: tuple[bytes, ...]
    first_layer: int
    last_layer: int
    epoch: int = 0


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """Layers from ``first_layer`` on of block number ``index`` of the chain that was asked for.

    The tail holds the sealed blocks one after the other; ``sizes`` are their lengths.
    """

    index: int
    first_layer: int
    sizes: tuple[int, ...]


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The request that is next in order was served; ``bytes`` of blocks were taken or sent."""

    bytes: int = 0


class Put(msgspec.Struct, frozen=True, tag="put"):
    """Keep some layers of a block; the tail is that of :class:`Piece`.

    It is block number ``index`` of its chain, behind ``parent`` (empty for the first).
    ``seconds`` is what each of the layers took to compute.
    """

    model: Digest
    codec: str
    chain: bytes
    parent: bytes
    index: int
    first_layer: int
    sizes: tuple[int, ...]
    seconds: float
    epoch: int = 0


class AskRest(msgspec.Struct, frozen=True, tag="ask_rest"):
    """Ask for what was handed over of a session, behind the block ``parent``, as an epoch ended.

    ``links`` names every number of tokens wanted.  Answered by :class:`RestPiece` messages, then
    Done; whoever still has the ranks of an epoch before ``epoch`` ends them first.
    """

    model: Digest
    codec: str
    parent: bytes
    links: tuple[bytes, ...]
    first_layer: int
    last_layer: int
    epoch: int


class RestPiece(msgspec.Struct, frozen=True, tag="rest_piece"):
    """The first ``tokens`` of a rest, layers from ``first_layer`` on; the tail as in Piece."""

    tokens: int
    first_layer: int
    sizes: tuple[int, ...]


class Advert(msgspec.Struct, frozen=True, tag="advert"):
    """What the sender holds, in the tail (see ``sharding.block_summary``); replaces the last."""


class SessionHolders(msgspec.Struct, frozen=True):
    """Who holds how many leading blocks of a session, ``session`` on the wire, of these layers."""

    session: SessionId
    model: Digest
    first_layer: int
    last_layer: int
    holders: tuple[tuple[PeerId, int], ...]


class Report(msgspec.Struct, frozen=True, tag="report"):
    """From a rank to a head: how far the checkpoints of its sessions are."""

    sessions: tuple[SessionHolders, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request that is next in order was refused, and why."""

    error: ErrorInfo


class Sealed(msgspec.Struct, frozen=True, gc=False):
    """A block to be kept: number ``index`` of its chain, behind ``parent`` (empty for the first).

    ``seconds`` is what it took to compute.
    """

    key: BlockKey
    parent: bytes
    index: int
    data: bytes
    seconds: float


KvRequest = Have | Fetch | Put | AskRest | Advert | Report
KvReply = Had | Piece | RestPiece | Done | Failed

REQUESTS: Final[Codec[KvRequest]] = Codec("kv request", Have, Fetch, Put, AskRest, Advert, Report)
REPLIES: Final[Codec[KvReply]] = Codec("kv reply", Had, Piece, RestPiece, Done, Failed)

Bytes = bytes | bytearray | memoryview


def check_request(request: KvRequest, tail: int) -> None:
    """Refuse a request out of bounds; ``tail`` is the length of its tail.

    Raises :class:`InvalidRequest` (``bad_kv_request``) naming what is wrong.
    """
    match request:
        case Have() | Fetch():
            _ensure(0 < len(request.chain) <= MAX_CHAIN, "the number of blocks")
            _ensure(all(len(each) == HASH_BYTES for each in request.chain), "a chain hash")
            _ensure(request.last_layer - request.first_layer <= MAX_LAYERS, "the layers")
            _ensure(0 <= request.first_layer < request.last_layer, "the layers")
            _ensure(len(request.codec) <= MAX_CODEC, "the codec")
            _ensure(tail == 0, "a tail")
        case AskRest():
            _ensure(0 < len(request.links) <= MAX_REST, "the number of tokens")
            _ensure(all(len(each) == HASH_BYTES for each in request.links), "a name")
            _ensure(len(request.parent) == HASH_BYTES, "a chain hash")
            _ensure(request.last_layer - request.first_layer <= MAX_LAYERS, "the layers")
            _ensure(0 <= request.first_layer < request.last_layer, "the layers")
            _ensure(len(request.codec) <= MAX_CODEC, "the codec")
            _ensure(tail == 0, "a tail")
        case Put():
            _ensure(len(request.chain) == HASH_BYTES, "a chain hash")
            _ensure(0 <= request.index < MAX_INDEX, "the number of a block")
            _ensure(len(request.parent) == (HASH_BYTES if request.index else 0), "its parent")
            _ensure(0 <= request.first_layer < MAX_LAYERS, "the layers")
            _ensure(0 < len(request.sizes) <= MAX_LAYERS, "the layers")
            _ensure(len(request.codec) <= MAX_CODEC, "the codec")
            _ensure(0.0 <= request.seconds < 3600.0, "the seconds")  # not for NaN either
            _ensure(_fits(request.sizes, tail), "the sizes of its blocks")
        case Advert():
            _ensure(tail <= MAX_SUMMARY_BYTES, "the size of the summary")
        case Report():
            _ensure(tail == 0, "a tail")
            for each in request.sessions:
                _ensure(len(each.holders) <= MAX_HOLDERS, "the number of holders")
                _ensure(all(blocks >= 0 for _, blocks in each.holders), "the number of blocks")
                _ensure(0 <= each.first_layer < each.last_layer <= MAX_LAYERS, "the layers")


def _fits(sizes: Sequence[int], tail: int) -> bool:
    return all(SEAL_BYTES < size <= MAX_BLOCK_BYTES for size in sizes) and sum(sizes) == tail


def _ensure(good: bool, what: str) -> None:
    if not good:
        raise InvalidRequest(
            f"A request about KV blocks is out of bounds: {what}.", code="bad_kv_request"
        )


def split(piece: Piece | RestPiece | Put, tail: Bytes) -> list[bytes]:
    """Return the sealed blocks in the tail of a message.

    Raises :class:`CorruptData` (``bad_kv_piece``) when the sizes are not those of the tail.
    """
    with memoryview(tail) as view:
        if not piece.sizes or not _fits(piece.sizes, view.nbytes):
            raise CorruptData(
                "A message with KV blocks does not have the size that it says.",
                code="bad_kv_piece",
            )
        blocks, at = [], 0
        for size in piece.sizes:
            blocks.append(bytes(view[at : at + size]))
            at += size
    return blocks


def seal(key: BlockKey, payload: bytes) -> bytes:
    """Return ``payload`` bound to its key."""
    return _digest(key, payload) + payload


def unseal(key: BlockKey, sealed: Bytes) -> bytes:
    """Return the payload of a sealed block.

    Raises :class:`CorruptData` (``bad_kv_block``) for one that is truncated, changed, or of
    another key.
    """
    with memoryview(sealed) as view:
        payload = bytes(view[SEAL_BYTES:])
        good = view.nbytes > SEAL_BYTES and bytes(view[:SEAL_BYTES]) == _digest(key, payload)
    if not good:
        raise CorruptData(
            "A KV block is not what its key says: it was truncated, changed or mislabelled.",
            code="bad_kv_block",
            remedy="It is computed again.",
            layer=key.layer,
        )
    return payload


def _digest(key: BlockKey, payload: bytes) -> bytes:
    name = blake3(f"{key.model}/{key.layer}/{key.codec}".encode())
    return blake3(b"".join((_SEAL, name, key.chain, payload)))[:SEAL_BYTES]


def frames_of(
    first_layer: int, blocks: Sequence[bytes | None], limit: int = MAX_FRAME_BYTES
) -> list[tuple[int, list[bytes]]]:
    """Cut the layers of one block into messages: runs without a gap, of ``limit`` bytes at most.

    (More only where one layer is larger than that.)

    ``blocks`` are the sealed layers from ``first_layer`` on, ``None`` where one is not held.
    Returns (first layer, sealed layers) for each message.
    """
    found: list[tuple[int, list[bytes]]] = []
    run: list[bytes] = []
    start = size = 0
    for offset, block in enumerate([*blocks, None]):
        if run and (block is None or size + len(block) > limit):
            found.append((first_layer + start, run))
            run, size = [], 0
        if block is not None:
            if not run:
                start = offset
            run.append(block)
            size += len(block)
    return found
