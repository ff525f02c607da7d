"""Invitation tickets: one pasteable string that holds all a stranger needs to join a mesh.

``pyagent1`` and base58 of a signed statement and a checksum.  The statement holds the genesis,
the pre-shared key, addresses of the node that admits, an id, a secret, a role and an expiry.  The
secret is derived from the authority's key, so the authority keeps no list of tickets; the joiner
proves that it knows the secret without sending it (see ``join_messages``).  Whoever sees a ticket
of a private mesh can use it: it is a secret itself, so ``repr`` and ``str`` show no part of it.

In a public mesh any node can make an *open* ticket: no secret, no signature, used any number of
times, because nobody needs a permission there.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import base58
import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError, Refused, Unsupported
from pyagent_node.base.types import PeerId
from pyagent_node.native import blake3
from pyagent_node.node.addresses import check_address, peer_of
from pyagent_node.node.genesis import ROLES, Genesis, Role, decode_genesis
from pyagent_node.node.identity import NodeKey, seal, sealed_payload, unseal
from pyagent_node.node.profiles import MeshProfile
from pyagent_node.node.swarm_key import PSK_BYTES

PREFIX = "pyagent1"
MAX_TICKET = 4096
"""Characters of a ticket; longer ones are refused unread."""
MAX_ADDRESSES = 8
MIN_SECONDS = 60
MAX_SECONDS = 365 * 86_400
SECRET_BYTES = 16
ID_BYTES = 16
_CHECKSUM = 5
_KIND = b"pyagent-node ticket v1\0"
_PROOF = b"pyagent-node join proof v1\0"
_VERSIONED = re.compile(r"pyagent(\d{1,4})[1-9A-HJ-NP-Za-km-z]")


class _Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    genesis: bytes
    psk: bytes | None
    addresses: list[str]
    id: bytes
    secret: bytes
    role: Role
    expires: int


@dataclass(frozen=True, repr=False)
class Ticket:
    """A checked ticket.  ``expires`` is in Unix seconds; an open one has no ``secret``.

    ``addresses`` are those of the node that admits (``genesis.writer``), or of any member when the
    ticket is open.
    """

    genesis: Genesis
    psk: bytes | None
    addresses: tuple[str, ...]
    id: str
    secret: bytes
    role: Role
    expires: int
    text: str
    """The string to paste: a secret."""

    @property
    def open(self) -> bool:
        """Whether it needs no redeeming."""
        return not self.secret

    def __repr__(self) -> str:
        kind = "open" if self.open else self.id[:8]
        return f"Ticket({self.genesis.name}, {self.role}, {kind}, expires={self.expires})"

    __str__ = __repr__

    def check_expiry(self, now: float) -> None:
        """Raise :class:`Refused` (``ticket_expired``) when its time is over."""
        if now >= self.expires:
            raise expired(self.expires, now)


def expired(expires: int, now: float) -> Refused:
    """Return the error for a ticket whose time is over."""
    return Refused(
        "The ticket has expired.",
        code="ticket_expired",
        remedy="Ask for a new one; if it is fresh, check the clocks of both machines.",
        expires=expires,
        now=int(now),
    )


def secret_of(authority: NodeKey, ticket_id: bytes, role: str, expires: int) -> bytes:
    """Return the secret of a ticket, which only the authority can make, from the ticket's facts."""
    key = hashlib.blake2b(authority.seed, person=b"pyagent tickets", digest_size=32).digest()
    facts = msgspec.msgpack.encode((ticket_id, role, expires))
    return hashlib.blake2b(facts, key=key, digest_size=SECRET_BYTES).digest()


def prove(
    secret: bytes, *, genesis: Genesis, ticket_id: str, joiner: PeerId, server: PeerId, nonce: bytes
) -> bytes:
    """Return the proof that ``joiner`` knows the ticket's secret, of use only with ``server``."""
    facts = msgspec.msgpack.encode((genesis.mesh_id, ticket_id, joiner, server, nonce))
    return hashlib.blake2b(_PROOF + facts, key=secret, digest_size=32).digest()


def check_proof(proof: bytes, expected: bytes) -> None:
    """Raise :class:`Refused` (``ticket_forged``) unless the two are equal; in constant time."""
    if not hmac.compare_digest(proof, expected):
        raise Refused(
            "The ticket was not issued by this mesh's authority.",
            code="ticket_forged",
            remedy="Paste it again as a whole, or ask for a new one.",
        )


def issue_ticket(
    profile: MeshProfile,
    *,
    role: Role,
    seconds: float,
    addresses: Sequence[str],
    now: float,
    ticket_id: bytes | None = None,
) -> Ticket:
    """Make a single-use ticket; only on the node that holds the authority key.

    ``addresses`` must end in ``/p2p/`` and this node's id.  Raises :class:`Refused`
    (``not_authority``) and :class:`InvalidRequest` (``bad_ttl``, ``bad_role``,
    ``no_address``).
    """
    authority = profile.authority()
    _check_terms(role, seconds)
    chosen = _addresses(addresses, profile.genesis.writer)
    raw_id = os.urandom(ID_BYTES) if ticket_id is None else ticket_id
    expires = int(now + seconds)
    body = _Body(
        genesis=profile.genesis.encode(),
        psk=profile.psk,
        addresses=list(chosen),
        id=raw_id,
        secret=secret_of(authority, raw_id, role, expires),
        role=role,
        expires=expires,
    )
    return parse_ticket(_to_text(seal(authority, _KIND, msgspec.msgpack.encode(body))))


def open_ticket(
    profile: MeshProfile, *, role: Role, seconds: float, addresses: Sequence[str], now: float
) -> Ticket:
    """Make a reusable ticket to a public mesh; any node of it can."""
    if profile.genesis.private:
        raise InvalidRequest("A private mesh has no open tickets.", code="not_public")
    _check_terms(role, seconds)
    body = _Body(
        genesis=profile.genesis.encode(),
        psk=None,
        addresses=list(_addresses(addresses, None)),
        id=bytes(ID_BYTES),
        secret=b"",
        role=role,
        expires=int(now + seconds),
    )
    payload = msgspec.msgpack.encode(body)
    return parse_ticket(_to_text(msgspec.msgpack.encode((payload, b""))))


def make_ticket(
    profile: MeshProfile, *, role: Role, seconds: float, addresses: Sequence[str], now: float
) -> Ticket:
    """Make the ticket that suits the mesh: open to a public one (but for voters), else single-use.

    Raises what :func:`issue_ticket` raises.
    """
    make = issue_ticket if profile.genesis.private or role == "voter" else open_ticket
    return make(profile, role=role, seconds=seconds, addresses=addresses, now=now)


def _check_terms(role: Role, seconds: float) -> None:
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InvalidRequest(
            f"A ticket lives between a minute and a year, not {seconds:g} seconds.", code="bad_ttl"
        )
    if role not in ROLES:
        raise InvalidRequest(f"A role is one of {', '.join(ROLES)}.", code="bad_role")


def _addresses(addresses: Sequence[str], peer: PeerId | None) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(check_address(a, peer=True) for a in addresses))[:MAX_ADDRESSES]
    if not chosen or any(peer is not None and peer_of(a) != peer for a in chosen):
        raise InvalidRequest(
            "A ticket needs an address at which the joiner reaches the node that admits it.",
            code="no_address",
            remedy="Listen on an address that others can reach (settings `listen`, `announce`).",
        )
    return chosen


def _to_text(sealed: bytes) -> str:
    return PREFIX + base58.b58encode(sealed + blake3(_KIND + sealed)[:_CHECKSUM]).decode()


def parse_ticket(text: str) -> Ticket:
    """Return the ticket in ``text``; white space anywhere in it is ignored.

    Raises :class:`InvalidRequest` (``ticket_malformed``) for anything incomplete or mistyped,
    :class:`Unsupported` (``ticket_version``), and :class:`Refused` (``ticket_forged``) when it is
    whole but not signed by its mesh's authority.  The expiry is not looked at.
    """
    if len(text) > 2 * MAX_TICKET:
        raise _malformed("it is far too long")
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        version = _VERSIONED.match(text)
        if version and version[1] != "1":
            raise Unsupported(
                f"The ticket is of version {version[1]}, which this program does not know.",
                code="ticket_version",
                remedy="Upgrade pyagent-node on this machine.",
            )
        raise _malformed(f"it does not begin with {PREFIX}")
    if len(text) > MAX_TICKET:
        raise _malformed("it is too long")
    try:
        data = base58.b58decode(text[len(PREFIX) :])
    except ValueError:
        raise _malformed("it holds a character that no ticket has") from None
    sealed, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if blake3(_KIND + sealed)[:_CHECKSUM] != checksum:
        raise _malformed("a part of it is missing or changed")
    try:
        body = msgspec.msgpack.decode(sealed_payload(sealed), type=_Body)
        genesis = decode_genesis(body.genesis)
        addresses = _addresses(body.addresses, genesis.writer if body.secret else None)
    except (msgspec.DecodeError, ValueError, RecursionError, CorruptData, InvalidRequest):
        raise _malformed("its content makes no sense") from None
    ticket = Ticket(
        genesis=genesis,
        psk=body.psk,
        addresses=addresses,
        id=body.id.hex(),
        secret=body.secret,
        role=body.role,
        expires=body.expires,
        text=text,
    )
    _check_consistent(ticket, sealed, len(body.id))
    return ticket


def _check_consistent(ticket: Ticket, sealed: bytes, id_bytes: int) -> None:
    private = ticket.genesis.private
    if (
        id_bytes != ID_BYTES
        or (ticket.psk is None) is private
        or (ticket.psk is not None and len(ticket.psk) != PSK_BYTES)
        or len(ticket.secret) not in (0, SECRET_BYTES)
        or (ticket.open and (private or ticket.role == "voter"))
    ):
        raise _malformed("its content makes no sense")
    if not ticket.open and unseal(sealed, _KIND, ticket.genesis.authority) is None:
        raise Refused(
            "The ticket is not signed by the authority of the mesh that it names.",
            code="ticket_forged",
            remedy="Do not use it; ask for another one over a way that you trust.",
        )


def _malformed(why: str) -> PyAgentError:
    return InvalidRequest(
        f"That is not a whole ticket: {why}.",
        code="ticket_malformed",
        remedy="Copy it again from end to end.",
    )
