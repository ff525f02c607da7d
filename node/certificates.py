"""Membership certificates: the authority of a mesh states who is in it, as what, until when."""

from __future__ import annotations

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest, Refused
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.node.genesis import ROLES, Genesis, Role, check_name
from pyagent_node.node.identity import NodeKey, public_key_of, seal, sealed_payload, unseal

DAY = 86_400
DEFAULT_LIFETIME = 365 * DAY
"""Seconds a certificate is valid; a connected member's is renewed long before."""
MAX_LIFETIME = 3650 * DAY
CLOCK_SKEW = 300
"""Seconds by which two members' clocks may differ."""
MAX_CERTIFICATE = 1024
_KIND = b"pyagent-node certificate v1\0"


class Certificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``peer_id`` is a member of ``mesh_id`` under ``name`` with ``role``.

    Valid while ``issued <= now < expires`` (Unix seconds, with :data:`CLOCK_SKEW` at the start).
    """

    mesh_id: Digest
    peer_id: PeerId
    name: str
    role: Role
    issued: int
    expires: int

    def check(self) -> Certificate:
        """Return itself if every field is in range, else raise :class:`InvalidRequest`."""
        check_name(self.name, "a node")
        public_key_of(self.peer_id)
        if self.role not in ROLES:
            raise InvalidRequest(
                f"A role is one of {', '.join(ROLES)}, not {str(self.role)[:32]!r}.",
                code="bad_role",
            )
        if not 0 <= self.issued < self.expires <= self.issued + MAX_LIFETIME:
            raise InvalidRequest(
                "A certificate lives between a second and ten years.", code="bad_lifetime"
            )
        return self


def issue(authority: NodeKey, certificate: Certificate) -> bytes:
    """Return the signed encoding of ``certificate``."""
    return seal(authority, _KIND, msgspec.msgpack.encode(certificate.check()))


def read_certificate(data: bytes) -> Certificate:
    """Return what ``data`` claims, **unverified** (to show our own to the user).

    Raises :class:`Refused` (``certificate_forged``) when it is malformed.
    """
    try:
        if len(data) > MAX_CERTIFICATE:
            raise ValueError
        return msgspec.msgpack.decode(sealed_payload(data), type=Certificate).check()
    except (msgspec.DecodeError, CorruptData, InvalidRequest, ValueError, RecursionError):
        raise _forged("it is malformed") from None


def verify_certificate(data: bytes, genesis: Genesis, peer: PeerId, now: float) -> Certificate:
    """Return the certificate in ``data`` if it makes ``peer`` a member of the mesh now.

    Raises :class:`Refused`: ``no_certificate``, ``certificate_forged``, ``wrong_mesh``,
    ``certificate_not_yet_valid`` or ``certificate_expired``.
    """
    if not data:
        raise Refused(
            f"{peer} shows no membership certificate of the mesh {genesis.name}.",
            code="no_certificate",
            remedy="Ask a member for an invitation (pyagent-node invite) and join with it.",
        )
    claimed = read_certificate(data)
    if claimed.mesh_id != genesis.mesh_id:
        raise Refused(
            f"The certificate of {peer} is for another mesh than {genesis.name}.",
            code="wrong_mesh",
            remedy="Choose the same mesh on both nodes (setting `mesh`).",
            theirs=claimed.mesh_id[:16],
            ours=genesis.mesh_id[:16],
        )
    if unseal(data, _KIND, genesis.authority) is None:
        raise _forged("its signature is not the mesh authority's")
    if claimed.peer_id != peer:
        raise _forged("it was issued to another peer")
    if now < claimed.issued - CLOCK_SKEW:
        raise Refused(
            f"The certificate of {peer} is not valid yet.",
            code="certificate_not_yet_valid",
            remedy="Set the clock of this machine, or of the one that issued it.",
            issued=claimed.issued,
            now=int(now),
        )
    if now >= claimed.expires:
        raise Refused(
            f"The certificate of {peer} has expired.",
            code="certificate_expired",
            remedy="Join again with a new invitation; check the clock if it should be valid.",
            expires=claimed.expires,
            now=int(now),
        )
    return claimed


def _forged(why: str) -> Refused:
    return Refused(
        f"A membership certificate was refused: {why}.",
        code="certificate_forged",
        remedy="Join again with a new invitation.",
    )
