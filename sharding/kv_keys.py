"""The names of KV blocks, and how many of them a session may begin from.  Pure.

A block is the keys and values of :data:`BLOCK_TOKENS` consecutive tokens of one layer.  Its bits
are a function of the model and of all tokens up to its end, and of how these were computed: rows
of a prompt go through another kernel than rows of decoding, and a short last piece of a prompt
through a third.  So there are two sorts of names:

* Blocks wholly inside the prompt, which every request with the same tokens computes with the same
  bits: the name says model, salt and tokens, nothing else.
* Blocks that reach further (or into a piece that depends on where the prompt ends): the name also
  says how long the prompt was.  Only the same session, continued elsewhere, finds them again.

Names are chained (each is the digest of the one before and its own tokens), so a name stands for
everything before it, and the longest common prefix of two token sequences is that of their names.
Nobody reads tokens out of a name without guessing a whole prefix, and with a salt not even then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Digest
from pyagent_node.native import Blake3, blake3, hash_chain

BLOCK_TOKENS: Final = 64
"""Tokens in a block."""
PREFILL_PIECE: Final = 512
"""A prompt is computed in pieces that end at multiples of so many tokens."""
LINK_BYTES: Final = 32
"""Bytes of a name in a chain: a BLAKE3 digest."""
MAX_LAYER: Final = 0xFFFF
"""The highest layer that a key can name."""
MAX_CODEC: Final = 64
"""Characters in the name of a codec, ASCII without blanks."""
MAX_SALT: Final = 1024
"""Bytes of a salt in UTF-8."""

_ROOT_DOMAIN: Final = b"pyagent-node kv root 1\0"
_REST_DOMAIN: Final = b"pyagent-node kv rest 1\0"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CODEC: Final = re.compile(rf"[!-~]{{1,{MAX_CODEC}}}")


class BlockKey(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The name of one stored block.

    ``layer`` counts from 0 in the whole model, not in a slice; ``chain`` is a link of
    :func:`block_chain`; ``codec`` names the format and level of the payload, such as
    ``"rows/1/f16"``.
    """

    model: Digest
    layer: int
    chain: bytes
    codec: str

    def check(self) -> None:
        """Raise :class:`InvalidRequest` (``bad_block_key``) for what no block can be called."""
        if (
            not _DIGEST.fullmatch(self.model)
            or not 0 <= self.layer <= MAX_LAYER
            or len(self.chain) != LINK_BYTES
            or not _CODEC.fullmatch(self.codec)
        ):
            raise InvalidRequest(
                "This is not the name of a KV block (64 hexadecimal digits of a model, a layer,"
                f" {LINK_BYTES} bytes of a chain, a codec).",
                code="bad_block_key",
            )


def cache_root(model: Digest, salt: str) -> bytes:
    """Return what the chains of a model begin with, for those who know ``salt``.

    Two salts have no name in common, so nobody can find, or time, blocks of another salt's
    prompts.  Raises :class:`InvalidRequest` (``bad_block_key``, ``bad_cache_salt``).
    """
    if not _DIGEST.fullmatch(model):
        raise InvalidRequest("A model is named by 64 hexadecimal digits.", code="bad_block_key")
    try:
        secret = salt.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("A cache salt is valid Unicode text.", code="bad_cache_salt") from None
    if len(secret) > MAX_SALT:
        raise InvalidRequest(
            f"A cache salt of {len(secret)} bytes is over the limit of {MAX_SALT}.",
            code="bad_cache_salt",
            limit=MAX_SALT,
        )
    return blake3(_ROOT_DOMAIN + bytes.fromhex(model) + secret)


def block_chain(
    root: bytes,
    tokens: Sequence[int] | NDArray[np.int32],
    prompt_tokens: int,
    *,
    prefill_cut: int = BLOCK_TOKENS,
    known: Sequence[bytes] = (),
) -> tuple[bytes, ...]:
    """Return the name of every full block of ``tokens``, in order.

    ``tokens`` is a session's journal, or a part of it from its beginning; the first
    ``prompt_tokens`` of the journal are its prompt (more than ``len(tokens)`` is fine).
    ``prefill_cut`` is the largest of the backends that compute the session: blocks beyond the
    last multiple of it in the prompt depend on where the prompt ends, and their names say so.
    ``known`` are leading names of the same journal computed earlier, to be taken over as they are.
    An empty ``root`` stands for a session that neither reads nor writes blocks: no names.

    Raises :class:`InvalidRequest` (``bad_block_key``) for a root of another length, tokens beyond
    32 bits, or a cut that is no multiple of :data:`BLOCK_TOKENS`.
    """
    if not root:
        return ()
    if len(root) != LINK_BYTES:
        raise InvalidRequest(f"A cache root has {LINK_BYTES} bytes.", code="bad_block_key")
    _check_counts(prompt_tokens, prefill_cut)
    try:
        array = np.ascontiguousarray(tokens, dtype=np.int32)
    except (OverflowError, TypeError, ValueError):
        raise InvalidRequest("Tokens are 32-bit integers.", code="bad_block_key") from None
    full = len(array) // BLOCK_TOKENS
    links = list(known[:full])
    shared = prompt_tokens // prefill_cut * prefill_cut // BLOCK_TOKENS
    if len(links) < min(shared, full):
        at = len(links)
        part = array[at * BLOCK_TOKENS : min(shared, full) * BLOCK_TOKENS]
        digests = hash_chain(links[-1] if links else root, part, BLOCK_TOKENS)
        links += [digests[i : i + LINK_BYTES] for i in range(0, len(digests), LINK_BYTES)]
    own = prompt_tokens.to_bytes(8, "little")
    while len(links) < full:
        at = len(links) * BLOCK_TOKENS
        link = Blake3()
        link.update(links[-1] if links else root)
        link.update(array[at : at + BLOCK_TOKENS].astype("<i4").tobytes())
        link.update(own)  # 8 bytes more than the other sort: the two cannot be confused
        links.append(link.digest())
    return tuple(links)


def rest_links(
    parent: bytes, tokens: Sequence[int] | NDArray[np.int32], prompt_tokens: int
) -> tuple[bytes, ...]:
    """Return a name for each number of tokens behind the end of a block, from one token on.

    ``parent`` is the name of that block, or the root; ``tokens`` are what follows it, no more than
    :data:`BLOCK_TOKENS`.  Two journals agree in as many tokens as they have names in common.  Each
    name is one token away from the one before it, so whoever knows ``parent`` can find the tokens
    out: they are told only between ranks of a session, who know them anyway.
    """
    own = prompt_tokens.to_bytes(8, "little")
    link = blake3(b"".join((_REST_DOMAIN, parent, own)))
    links: list[bytes] = []
    for token in np.ascontiguousarray(tokens, dtype="<i4"):
        link = blake3(link + token.tobytes())
        links.append(link)
    return tuple(links)


def reusable(*, prompt_tokens: int, journal_tokens: int, blocks: int, prefill_cut: int) -> int:
    """Return how many of ``blocks`` leading blocks a session may begin from.

    ``journal_tokens`` counts the prompt and what has been generated so far (a new session:
    ``prompt_tokens``).  The rest is computed as a session without blocks would compute it:

    * The last token is always computed, for its logits are wanted.
    * Beyond the prompt any boundary will do: those rows are computed one by one, or as if.
    * Inside it, the piece that is computed first must have the shape class of the piece it is cut
      from: it begins at a multiple of :data:`PREFILL_PIECE`, or at one of ``prefill_cut`` with at
      least :data:`BLOCK_TOKENS` rows of the prompt ahead of it.

    ``prefill_cut`` as in :func:`block_chain`.  Raises :class:`InvalidRequest`
    (``bad_block_key``) for numbers that cannot be.
    """
    _check_counts(prompt_tokens, prefill_cut)
    if journal_tokens < prompt_tokens or blocks < 0:
        raise InvalidRequest("A journal begins with its prompt.", code="bad_block_key")
    count = min(blocks, max(0, journal_tokens - 1) // BLOCK_TOKENS)
    while count and not _may_begin(count * BLOCK_TOKENS, prompt_tokens, prefill_cut):
        count -= 1
    return count


def _may_begin(at: int, prompt_tokens: int, prefill_cut: int) -> bool:
    if at >= prompt_tokens or at % PREFILL_PIECE == 0:
        return True
    return at % prefill_cut == 0 and prompt_tokens - at >= BLOCK_TOKENS


def _check_counts(prompt_tokens: int, prefill_cut: int) -> None:
    if prompt_tokens < 0 or prefill_cut < BLOCK_TOKENS or prefill_cut % BLOCK_TOKENS:
        raise InvalidRequest(
            f"A prompt has no fewer than 0 tokens, and is cut at a multiple of {BLOCK_TOKENS}.",
            code="bad_block_key",
        )
