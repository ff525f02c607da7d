"""The Ed25519 key of a node or of a mesh's authority, its peer id, and signed statements.

A peer id is libp2p's: the base58 form of the identity multihash of the key in libp2p's protobuf
form.  It is computed here without importing libp2p, which costs 0.7 s at start-up.

A statement is signed as ``kind || payload`` (``kind`` ends in a zero byte and names the sort of
statement and its version), so that no signature can be passed off as one over something else, and
is checked over the very bytes received, so that no re-encoding can slip in between.
"""

from __future__ import annotations

import os
from pathlib import Path

import base58
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError
from pyagent_node.base.files import check_private, create_exclusive, read_limited
from pyagent_node.base.types import PeerId

_PEER_ID_PREFIX = bytes.fromhex("0024") + bytes.fromhex("08011220")
"""Identity multihash of 36 bytes, then the protobuf of a 32-byte Ed25519 public key."""
_PEER_ID_LENGTH = 52
_MAX_KEY_FILE = 4096


def peer_id_of(public_key: bytes) -> PeerId:
    """Return the peer id of a raw 32-byte Ed25519 public key."""
    if len(public_key) != 32:
        raise InvalidRequest("An Ed25519 public key has 32 bytes.", code="bad_public_key")
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


def public_key_of(peer_id: str) -> bytes:
    """Return the raw public key inside a peer id.

    Raises :class:`InvalidRequest` (``bad_peer_id``) for anything but an Ed25519 peer id in its
    one canonical base58 form.
    """
    try:
        if len(peer_id) != _PEER_ID_LENGTH:
            raise ValueError
        data = base58.b58decode(peer_id)
        if len(data) != 38 or not data.startswith(_PEER_ID_PREFIX):
            raise ValueError
    except ValueError:
        raise InvalidRequest(
            f"{peer_id[:64]!r} is not the peer id of an Ed25519 key (12D3KooW...).",
            code="bad_peer_id",
        ) from None
    return data[len(_PEER_ID_PREFIX) :]


def verify(peer_id: PeerId, signature: bytes, data: bytes) -> bool:
    """Say whether ``signature`` is ``peer_id``'s over ``data``; never raises."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key_of(peer_id)).verify(signature, data)
    except (InvalidSignature, InvalidRequest, ValueError):
        return False
    return True


class NodeKey:
    """An Ed25519 private key; its ``repr`` shows the peer id only."""

    __slots__ = ("_private", "peer_id", "public_key")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != 32:
            raise InvalidRequest("An Ed25519 seed has 32 bytes.", code="bad_seed")
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key: bytes = self._private.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> NodeKey:
        """Return a new key from the system's random generator."""
        return cls(os.urandom(32))

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Read a key that :meth:`save` wrote (PKCS#8 in PEM).

        Raises :class:`NotFound`, :class:`Refused` (``file_readable_by_others``) or
        :class:`CorruptData` (``bad_key_file``).
        """
        data = read_limited(path, _MAX_KEY_FILE)
        check_private(path)
        try:
            key = load_pem_private_key(data, password=None)
        except (ValueError, TypeError, PyAgentError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise CorruptData(
                f"{path} does not hold an Ed25519 key in PEM form.",
                code="bad_key_file",
                remedy="Restore it from a backup; without it this node gets a new peer id.",
                path=str(path),
            )
        return cls(key.private_bytes_raw())

    @classmethod
    def load_or_create(cls, path: Path) -> NodeKey:
        """Read the key at ``path``, or create it; two callers at once get the same key."""
        if not path.exists():
            cls.generate().save(path)
        return cls.load(path)

    def save(self, path: Path) -> bool:
        """Write the key to ``path`` (mode 0600) unless a file is there; say whether it did."""
        pem = self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return create_exclusive(path, pem)

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for the mesh adapter."""
        return self._private.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte signature over ``data``."""
        return self._private.sign(data)

    def __repr__(self) -> str:
        return f"NodeKey({self.peer_id})"


class _Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    payload: bytes
    signature: bytes


def seal(key: NodeKey, kind: bytes, payload: bytes) -> bytes:
    """Return ``payload`` with ``key``'s signature over ``kind || payload``."""
    return msgspec.msgpack.encode(_Sealed(payload, key.sign(kind + payload)))


def sealed_payload(data: bytes) -> bytes:
    """Return the payload of a sealed statement without checking its signature.

    Raises :class:`CorruptData` (``malformed_statement``).
    """
    return _unpack(data).payload


def unseal(data: bytes, kind: bytes, signer: PeerId) -> bytes | None:
    """Return the payload if ``signer`` signed it as a statement of ``kind``, else ``None``.

    Raises :class:`CorruptData` (``malformed_statement``) for bytes that are no statement at all.
    """
    sealed = _unpack(data)
    good = verify(signer, sealed.signature, kind + sealed.payload)
    return sealed.payload if good else None


def _unpack(data: bytes) -> _Sealed:
    try:
        return msgspec.msgpack.decode(data, type=_Sealed)
    except (msgspec.DecodeError, RecursionError):
        raise CorruptData(
            "The bytes are not a signed statement.", code="malformed_statement"
        ) from None
