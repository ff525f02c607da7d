"""The copies of journals that a node keeps for others: bounded, and forgotten in time.  Pure.

Sessions are named by their public ids.  While a head's stream is there its copies do not expire;
after it is gone they are kept for a time, in which the session can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

from pyagent_node.base.errors import Conflict, LimitExceeded, NotFound
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.node.journal_messages import (
    MAX_TOKEN_BYTES,
    Append,
    Begin,
    JournalCopy,
    bad_journal,
    pack,
    public_id,
    read_header,
)

OVERHEAD: Final = 64
"""Bytes that a token costs beyond its encoding."""


class BookLimits(msgspec.Struct, frozen=True):
    """What a holder keeps at most, for all heads and for each of them."""

    sessions: int = 1024
    sessions_per_head: int = 128
    bytes: int = 256 * MIB
    bytes_per_head: int = 64 * MIB
    bytes_per_session: int = 32 * MIB


class Writer:
    """One stream of the head ``peer``, which writes the copies that it began."""

    __slots__ = ("peer",)

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer


class Copy:
    """One session's copy; ``expires`` is on the caller's clock, infinite while its head writes."""

    __slots__ = ("claim", "expires", "head", "pieces", "signature", "size", "writer")

    def __init__(self, writer: Writer, message: Begin, pieces: list[bytes]) -> None:
        self.writer = writer
        self.head = writer.peer
        self.claim = message.claim
        self.pieces = pieces
        self.signature = message.signature
        self.size = _size(pieces)
        self.expires = math.inf

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return len(self.pieces) - 1

    def export(self) -> tuple[JournalCopy, bytes]:
        """Return the copy as a reply and its tail."""
        return JournalCopy(self.claim, self.head, self.signature), pack(self.pieces)


class _Load:
    """What one head's copies take."""

    __slots__ = ("sessions", "size")

    def __init__(self) -> None:
        self.sessions = 0
        self.size = 0


class JournalBook:
    """All copies of one node; the caller tells the time."""

    def __init__(self, limits: BookLimits | None = None) -> None:
        self.limits = limits or BookLimits()
        self.size = 0
        self._copies: dict[SessionId, Copy] = {}
        self._loads: dict[PeerId, _Load] = {}

    def __len__(self) -> int:
        return len(self._copies)

    def get(self, session: SessionId, now: float) -> Copy | None:
        """Return the copy of a session that has not expired."""
        copy = self._copies.get(session)
        return copy if copy is not None and copy.expires > now else None

    def begin(self, writer: Writer, message: Begin, pieces: list[bytes], now: float) -> Copy:
        """Keep a session's copy in place of an earlier one.

        Raises :class:`CorruptData` (``bad_journal``), :class:`Conflict` (``session_claimed``) when
        a later head's copy is here, :class:`LimitExceeded` (``journals_full``).
        """
        session = message.session
        if not pieces or public_id(read_header(pieces[0]).session) != session:
            raise bad_journal("another session in it")
        _check_tokens(pieces[1:])
        known = self._copies.get(session)
        again = known is not None and (known.claim, known.head) == (message.claim, writer.peer)
        if known is not None and known.claim >= message.claim and not again:
            raise claimed(known.head)
        self.expire(now)
        copy = Copy(writer, message, pieces)
        self._make_room(copy.head, session, copy.size)
        self.drop(session)
        self._copies[session] = copy
        self._count(copy.head, 1, copy.size)
        return copy

    def append(self, writer: Writer, message: Append, tokens: list[bytes]) -> Copy:
        """Add tokens to a copy.

        Raises :class:`NotFound` (``journal_not_held``) when ``writer`` began none, or when the
        tokens do not follow on it, and as :meth:`begin` does; the copy is then unchanged.
        """
        copy = self._copies.get(message.session)
        if copy is None or copy.writer is not writer or copy.tokens != message.start:
            raise NotFound("No such journal is kept here.", code="journal_not_held")
        _check_tokens(tokens)
        added = _size(tokens)
        self._make_room(copy.head, message.session, copy.size + added)
        copy.pieces.extend(tokens)
        copy.signature = message.signature
        copy.size += added
        self._count(copy.head, 0, added)
        return copy

    def end(self, writer: Writer, session: SessionId) -> None:
        """Forget a session at its head's word."""
        copy = self._copies.get(session)
        if copy is not None and copy.head == writer.peer:
            self.drop(session)

    def drop(self, session: SessionId) -> None:
        """Forget a session."""
        copy = self._copies.pop(session, None)
        if copy is not None:
            self._count(copy.head, -1, -copy.size)

    def leave(self, writer: Writer, at: float) -> None:
        """Let the copies of a stream that is gone expire ``at`` a time."""
        for copy in self._copies.values():
            if copy.writer is writer:
                copy.expires = at

    def left(self) -> list[tuple[SessionId, Copy]]:
        """Return the copies whose stream is gone, with their sessions."""
        return [each for each in self._copies.items() if each[1].expires != math.inf]

    def expire(self, now: float) -> None:
        """Forget what has expired."""
        for session in [s for s, copy in self._copies.items() if copy.expires <= now]:
            self.drop(session)

    def _make_room(self, head: PeerId, session: SessionId, size: int) -> None:
        """Check that ``session`` of ``head`` may take ``size`` bytes."""
        limits, known = self.limits, self._copies.get(session)
        held = 0 if known is None else known.size
        load = self._loads.get(head, _Load())
        own = known is not None and known.head == head
        bounds = (
            ("sessions", len(self._copies) + (known is None), limits.sessions),
            ("sessions of one head", load.sessions + (not own), limits.sessions_per_head),
            ("bytes", self.size - held + size, limits.bytes),
            ("bytes of one head", load.size - held * own + size, limits.bytes_per_head),
            ("bytes of one session", size, limits.bytes_per_session),
        )
        for what, wanted, limit in bounds:
            if wanted > limit:
                raise LimitExceeded(
                    f"This node keeps journals of at most {limit} {what}.",
                    code="journals_full",
                    limit=limit,
                )

    def _count(self, head: PeerId, sessions: int, size: int) -> None:
        load = self._loads.setdefault(head, _Load())
        load.sessions += sessions
        load.size += size
        self.size += size
        if not load.sessions:
            del self._loads[head]


def claimed(head: PeerId) -> Conflict:
    """Return the error for a session that another head resumed."""
    return Conflict(
        "Another node resumed this session and serves it now.",
        code="session_claimed",
        remedy=f"Ask {head} for it.",
        head=head,
    )


def _check_tokens(tokens: Sequence[bytes]) -> None:
    if any(not 0 < len(token) <= MAX_TOKEN_BYTES for token in tokens):
        raise bad_journal("a token of a wrong size")


def _size(pieces: Sequence[bytes]) -> int:
    return sum(len(piece) + OVERHEAD for piece in pieces)
