"""Parts of a prompt whose KV was computed before, for each of them alone.  Pure.

A *piece* is a part of a prompt that other prompts hold too, at other places: a chunk of a context.
Its KV is computed once, as that of a prompt of its own that is padded to whole blocks, with names
of blocks of its own (:func:`chunk_root`).  A session whose prompt holds the piece takes over these
cells: keys are rotated on to their new place, and the first ``skip`` tokens of the piece are
computed by the session itself, with all before them in sight.  (Attention rests on the first tokens
of a text; those of a piece would go on to be rested on in the midst of the prompt.)

What such a session says is *not* what it would say if it had computed everything: the tokens of a
piece have not seen the other pieces.  How much that matters is measured in ``docs/context.md``.
The idea is that of PromptCache (arXiv:2311.04934) and EPIC (arXiv:2410.15332).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, cast

import numpy as np

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.base.types import Digest
from pyagent_node.inference.backend import KvRange, LayerKv, Tokens
from pyagent_node.inference.kv.pieces import MAX_PIECE, MAX_PIECES, MAX_SKIP, Piece
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_codec import KvShape, moved
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, cache_root

_DOMAIN: Final = b"pyagent-node chunk root 1\0"


def blocks_of(piece: Piece) -> int:
    """Return how many blocks the KV of a piece has, with the padding."""
    return -(-piece.tokens // BLOCK_TOKENS)


def check_pieces(pieces: tuple[Piece, ...], skip: int, prompt_tokens: int) -> None:
    """Raise :class:`InvalidRequest` (``bad_join``) unless a prompt can hold such pieces.

    They are in order and do not overlap, each has more tokens than are skipped of it, and the last
    token of the prompt is in none, for its logits are wanted.
    """
    if not 1 <= len(pieces) <= MAX_PIECES:
        raise _bad(f"there are {len(pieces)} pieces; 1 to {MAX_PIECES} can be joined")
    if not 1 <= skip <= MAX_SKIP:
        raise _bad(f"{skip} tokens are skipped; it must be 1 to {MAX_SKIP}")
    for piece in pieces:
        if not skip < piece.tokens <= MAX_PIECE:
            raise _bad(f"a piece has {piece.tokens} tokens, of which {skip} are skipped")
    if pieces[0].start < 0 or pieces[-1].stop >= prompt_tokens:
        raise _bad(f"a piece is not in a prompt of {prompt_tokens} tokens")
    if any(before.stop > after.start for before, after in pairwise(pieces)):
        raise _bad("two pieces overlap")


def chunk_root(model: Digest, salt: str) -> bytes:
    """Return what the names of blocks of pieces begin with: never those of a whole prompt."""
    return blake3(_DOMAIN + cache_root(model, salt))


def alone(prompt: Tokens, piece: Piece) -> Tokens:
    """Return the tokens by which the KV of a piece is computed: its own and padding.

    The padding comes last, so what is computed of the piece knows nothing of it.
    """
    own = prompt[piece.start : piece.stop]
    rest = np.full(blocks_of(piece) * BLOCK_TOKENS - len(own), own[-1], np.int32)
    return cast("Tokens", np.concatenate([own, rest]))


def split_alone(tokens: Tokens, pieces: tuple[Piece, ...]) -> Iterator[Tokens]:
    """Yield the tokens of each piece out of those of all, as :func:`alone` made them.

    Raises :class:`CorruptData` (``malformed_join``) where there are more or fewer.
    """
    sizes = [blocks_of(piece) * BLOCK_TOKENS for piece in pieces]
    if sum(sizes) != len(tokens):
        raise CorruptData(
            f"{len(tokens)} tokens came for pieces of {sum(sizes)}.", code="malformed_join"
        )
    at = 0
    for size in sizes:
        yield tokens[at : at + size]
        at += size


def movable(shape: KvShape | None, cells: str) -> bool:
    """Whether rows of this shape and format can stand at another place."""
    known = shape is not None and shape.rope_base > 0 and shape.width % 2 == 0
    return known and cells.endswith("/f16")


def moved_to(kv: KvRange, start: int, shape: KvShape) -> Iterator[LayerKv]:
    """Yield the layers of ``kv`` as they are at position ``start``, one after the other.

    With gaps (``KvRange.kept``) these stay as they are.

    Raises :class:`CorruptData` (``kv_malformed``) for rows of another shape, and
    :class:`Unsupported` (``no_shift``) where it is not known how keys are rotated.
    """
    if not movable(shape, kv.codec):
        raise Unsupported("Positions in this model cannot be moved.", code="no_shift")
    spans = kv.kept or ((kv.start, kv.stop),)
    size = sum(last - first for first, last in spans) * shape.row_bytes
    for layer in kv.layers:
        if not len(layer.keys) == len(layer.values) == size:
            raise CorruptData(
                f"Layer {layer.layer} has {len(layer.keys)} bytes of keys instead of {size}.",
                code="kv_malformed",
            )
        yield LayerKv(layer.layer, moved(layer.keys, start - kv.start, shape=shape), layer.values)


def _bad(what: str) -> InvalidRequest:
    return InvalidRequest(f"KV of pieces cannot be joined: {what}.", code="bad_join")
