"""A session's journal as it is copied: its bytes, its hash chain, its signature, its messages.

A copy is a *header* (the encoded :class:`SessionJournal` without tokens), the encoded tokens, and
the head's signature over the hash chain of both.  The chain starts from the header and takes one
token after the other, so a holder can append without reading, and whoever gets a copy sees whether
anything was changed, added or left out before the signed end.  The newest signature covers all.

The replicated log and the messages name a session by :func:`public_id`, a digest of its id, so that
reading the log does not give what resuming takes.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import CorruptData, ErrorInfo
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Codec
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.sampling import Sampled
from pyagent_node.native import blake3

PROTOCOL: Final = "/pyagent/journal/1"
"""Head to holder: :class:`Begin`, :class:`Append`, :class:`End`; back: the rest."""

MAX_TOKEN_BYTES: Final = 4096
"""Bytes of one encoded token; 20 alternatives with their probabilities take about 300."""

Verify = Callable[[PeerId, bytes, bytes], bool]

_ID: Final = b"pyagent session 1\0"
_CHAIN: Final = b"pyagent journal 1\0"
_SIGNED: Final = b"pyagent journal signature 1\0"

_encoder: Final = msgspec.msgpack.Encoder()
_decode_header: Final = msgspec.msgpack.Decoder(SessionJournal)
_decode_token: Final = msgspec.msgpack.Decoder(Sampled)
_decode_pieces: Final = msgspec.msgpack.Decoder(list[bytes])


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Keep a copy of a session, instead of any earlier one of it.

    ``claim`` counts the session's heads, from 1.  The tail holds the header, then the tokens there
    are (see :func:`pack`); ``signature`` is the head's over all of it.
    """

    session: SessionId
    claim: int
    signature: bytes


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Add the tokens in the tail, the first of them at index ``start``.

    ``ack`` asks for a :class:`Held`.
    """

    session: SessionId
    start: int
    signature: bytes
    ack: bool = False


class End(msgspec.Struct, frozen=True, tag="end"):
    """The session is over: forget it."""

    session: SessionId


class Held(msgspec.Struct, frozen=True, tag="held"):
    """``tokens`` of the session are kept here."""

    session: SessionId
    tokens: int


class Declined(msgspec.Struct, frozen=True, tag="declined"):
    """The session is not kept here (any more)."""

    session: SessionId
    error: ErrorInfo


ToHolder = Begin | Append | End
ToHead = Held | Declined

TO_HOLDER: Final[Codec[ToHolder]] = Codec("journal", Begin, Append, End)
TO_HEAD: Final[Codec[ToHead]] = Codec("journal", Held, Declined)


class FetchJournal(msgspec.Struct, frozen=True, tag="fetch_journal"):
    """Ask a holder for its copy; the asker must be the session's head in the replicated log.

    ``session`` is the id itself, which shows that its client sent us.
    """

    session: SessionId


class JournalCopy(msgspec.Struct, frozen=True, tag="journal_copy"):
    """A holder's copy; the tail is that of :class:`Begin`.

    ``signer`` was the head that made it, as the one of that ``claim``.
    """

    claim: int
    signer: PeerId
    signature: bytes


def public_id(session: SessionId) -> SessionId:
    """Return the name under which the log and other nodes know ``session``."""
    return SessionId(blake3(_ID + session.encode())[:16].hex())


def encode_header(journal: SessionJournal) -> bytes:
    """Return a journal without its tokens."""
    return _encoder.encode(msgspec.structs.replace(journal, tokens=()))


def encode_token(token: Sampled) -> bytes:
    """Return one token of a journal."""
    return _encoder.encode(token)


def pack(pieces: Sequence[bytes]) -> bytes:
    """Return encoded pieces as one tail."""
    return _encoder.encode(pieces)


def unpack(tail: bytes | bytearray | memoryview) -> list[bytes]:
    """Return the pieces of a tail.

    Raises :class:`CorruptData` (``bad_journal``).
    """
    try:
        return _decode_pieces.decode(tail)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise bad_journal("a message without whole pieces") from None


def chain_of(header: bytes) -> bytes:
    """Return the hash chain of a journal without tokens."""
    return blake3(_CHAIN + header)


def extend(chain: bytes, token: bytes) -> bytes:
    """Return the hash chain after one more encoded token."""
    return blake3(chain + token)


def signed_bytes(session: SessionId, claim: int, tokens: int, chain: bytes) -> bytes:
    """Return what a head signs: the session's public id, its claim, the length and the chain."""
    numbers = claim.to_bytes(8, "big") + tokens.to_bytes(8, "big")
    return _SIGNED + session.encode() + numbers + chain


def read_header(data: bytes) -> SessionJournal:
    """Return the journal in a header.  Raises :class:`CorruptData` (``bad_journal``)."""
    try:
        journal = _decode_header.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise bad_journal("a malformed header") from None
    if journal.tokens:
        raise bad_journal("tokens in its header")
    return journal


def read_copy(
    session: SessionId,
    copy: JournalCopy,
    tail: bytes,
    signers: frozenset[PeerId],
    verify: Verify,
) -> SessionJournal:
    """Check a holder's copy of ``session`` and return the journal in it.

    ``signers`` are the heads whose word counts; ``verify(signer, signature, data)`` says whether a
    signature is theirs.  Raises :class:`CorruptData` (``bad_journal``).
    """
    header, *tokens = unpack(tail) or [b""]
    journal = read_header(header)
    chain = chain_of(header)
    for token in tokens:
        chain = extend(chain, token)
    public = public_id(session)
    if not 0 < copy.claim < 1 << 63 or copy.signer not in signers:
        raise bad_journal("a signer who was not its head")
    if not verify(
        copy.signer, copy.signature, signed_bytes(public, copy.claim, len(tokens), chain)
    ):
        raise bad_journal("a wrong signature")
    if journal.session != session:
        raise bad_journal("another session in it")
    try:
        sampled = tuple(_decode_token.decode(token) for token in tokens)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise bad_journal("a malformed token") from None
    return msgspec.structs.replace(journal, tokens=sampled)


def bad_journal(what: str) -> CorruptData:
    """Return the error for a journal that is not what its head made."""
    return CorruptData(f"A copy of a session's journal has {what}.", code="bad_journal")
