"""The genesis of a mesh: the few facts that never change, whose hash is the mesh id."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Final, Literal

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.native import blake3
from pyagent_node.node.identity import public_key_of

Visibility = Literal["public", "private"]
Role = Literal["voter", "learner", "client"]
ROLES: tuple[Role, ...] = ("voter", "learner", "client")

ENGINES: Final = ("raft-rs", "pysyncobj", "single")
"""The engines that a mesh may be created with; a genesis may name one of a later version."""
DEFAULT_ENGINE: Final = "raft-rs"

MAX_NAME = 63
MAX_GENESIS = 1024
_KIND = b"pyagent-node genesis v1\0"
_FINGERPRINT = b"pyagent-node fingerprint v1\0"
_ENGINE = re.compile(r"[a-z][a-z0-9-]{0,31}")


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can be shown on one line and typed in a shell.

    Raises :class:`InvalidRequest` (``bad_name``): 1 to 63 letters, digits, ``-``, ``_`` or ``.``
    of any script, not beginning with ``-``.
    """
    good = (
        0 < len(name) <= MAX_NAME
        and len(name.encode("utf-8", "replace")) <= 2 * MAX_NAME
        and not name.startswith("-")
        and all(c in "-_." or unicodedata.category(c)[0] in "LNM" for c in name)
    )
    if not good:
        raise InvalidRequest(
            f"{name[:80]!r} cannot be the name of {what}.",
            code="bad_name",
            remedy=f"Use 1 to {MAX_NAME} letters, digits, '-', '_' or '.', beginning with no '-'.",
        )
    return name


class Genesis(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a mesh is; equal bytes, equal mesh.

    ``authority`` is the id of the key that signs certificates and tickets (a key of its own, so
    that it can be kept apart), ``writer`` the node that created the mesh: it keeps the authority
    key and begins the log (under the engine ``"single"`` nobody else writes it).  ``engine`` names
    the consensus engine.  ``created`` is in Unix seconds.
    """

    name: str
    visibility: Visibility
    authority: PeerId
    writer: PeerId
    engine: str
    created: int
    nonce: bytes

    def encode(self) -> bytes:
        """Return the canonical encoding."""
        return msgspec.msgpack.encode(self)

    @property
    def mesh_id(self) -> Digest:
        """BLAKE3 of the canonical encoding under its own domain."""
        return Digest(blake3(_KIND + self.encode()).hex())

    @property
    def fingerprint(self) -> str:
        """Names the mesh on a local network: a hash of the mesh id, which it does not give away."""
        return blake3(_FINGERPRINT + self.encode())[:16].hex()

    @property
    def private(self) -> bool:
        """Whether members need a key and a certificate."""
        return self.visibility == "private"

    def check(self) -> Genesis:
        """Return itself if every field is in range, else raise :class:`InvalidRequest`."""
        check_name(self.name, "a mesh")
        public_key_of(self.authority)
        public_key_of(self.writer)
        if not (_ENGINE.fullmatch(self.engine) and len(self.nonce) == 16 and self.created >= 0):
            raise InvalidRequest("The mesh description is out of range.", code="bad_genesis")
        return self


def new_genesis(
    name: str,
    visibility: Visibility,
    *,
    authority: PeerId,
    writer: PeerId,
    created: int,
    engine: str = "single",
    nonce: bytes | None = None,
) -> Genesis:
    """Return a checked genesis; ``nonce`` (16 random bytes) makes equal names differ."""
    return Genesis(
        name=name,
        visibility=visibility,
        authority=authority,
        writer=writer,
        engine=engine,
        created=created,
        nonce=os.urandom(16) if nonce is None else nonce,
    ).check()


def decode_genesis(data: bytes) -> Genesis:
    """Return the genesis in ``data``; raises :class:`CorruptData` (``bad_genesis``).

    Only the canonical encoding is taken, so that a mesh has one set of bytes and one id.
    """
    try:
        if len(data) > MAX_GENESIS:
            raise ValueError
        genesis = msgspec.msgpack.decode(data, type=Genesis).check()
        if genesis.encode() != data:
            raise ValueError
    except (msgspec.DecodeError, InvalidRequest, ValueError, RecursionError):
        raise CorruptData("The mesh description is malformed.", code="bad_genesis") from None
    return genesis
