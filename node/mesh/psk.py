"""The cipher of a private network: everything on the wire goes through XSalsa20 under one key.

Source: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md.  Each side
sends a random nonce of 24 bytes first and enciphers all that follows with the key and that
nonce.  Nothing is authenticated here: a peer with another key sends what looks like noise, and the
handshake inside fails (``node.mesh.handshake`` names it ``wrong_psk``).  The cipher isolates a
network and hides that libp2p is spoken; who may take part is decided by Noise and certificates.

py-libp2p's own version (0.8.1) uses Salsa20 with a nonce of 8 bytes and reaches no other libp2p.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from pyagent_node.base.errors import ConfigError
from pyagent_node.native import XSalsa20

PSK_BYTES: Final = 32
NONCE_BYTES: Final = 24


class PskCipher:
    """Both directions of one connection; see :class:`~pyagent_node.node.mesh.wire.StreamCipher`.

    ``random_bytes`` makes the nonce: it must be unpredictable and never repeat under one key.
    Raises :class:`ConfigError` (``bad_psk``) when the key has another length.
    """

    __slots__ = ("_head", "_incoming", "_outgoing", "_psk", "_start")

    def __init__(self, psk: bytes, *, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        if len(psk) != PSK_BYTES:
            raise ConfigError(
                f"The pre-shared key has {len(psk)} bytes; it must have {PSK_BYTES}.",
                code="bad_psk",
                remedy="Copy the swarm.key file again from a node of the private network.",
            )
        nonce = random_bytes(NONCE_BYTES)
        self._psk = psk
        self._head = nonce
        self._outgoing = XSalsa20(psk, nonce)
        self._start = b""
        self._incoming: XSalsa20 | None = None

    def outgoing(self, data: bytes) -> bytes:
        """Return what to send for ``data``; the nonce stands in front of the first bytes."""
        sealed = self._outgoing.apply(data)
        if self._head:
            sealed, self._head = self._head + sealed, b""
        return sealed

    def incoming(self, data: bytes) -> bytes:
        """Return the plain bytes in ``data``; empty while the peer's nonce is not complete."""
        if self._incoming is None:
            start = self._start + data
            if len(start) < NONCE_BYTES:
                self._start = start
                return b""
            self._incoming = XSalsa20(self._psk, start[:NONCE_BYTES])
            self._start, data = b"", start[NONCE_BYTES:]
        return self._incoming.apply(data)
