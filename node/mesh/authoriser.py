"""The port through which the mesh asks who may take part.

The mesh adapter knows nothing of certificates: it carries opaque credentials from one side to the
other and asks this port what they are worth.  The real implementation is
``pyagent_node.node.membership``.
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from pyagent_node.base.limits import KIB
from pyagent_node.base.types import PeerId

MAX_CREDENTIALS: Final = 16 * KIB
"""Bytes of credentials that are taken from a peer before it is authorised."""


class PeerAdmission(msgspec.Struct, frozen=True):
    """A peer may take part: the name it goes by here, and its role."""

    name: str
    role: str


class Authoriser(Protocol):
    """Gives this node's credentials and judges those of others."""

    def credentials(self) -> bytes:
        """Return what this node shows to a peer, at most :data:`MAX_CREDENTIALS` bytes.

        Called for each connection, so a renewed certificate is used at once.  Empty when there is
        none.
        """
        ...

    def judge(self, peer: PeerId, credentials: bytes) -> PeerAdmission:
        """Say who ``peer`` is; Noise has proven that it holds the key of that id.

        Raises :class:`~pyagent_node.base.errors.Refused` (``no_certificate``,
        ``certificate_expired``, ``certificate_forged``, ``wrong_mesh``, ``revoked``); its message
        is shown to the peer, so it must not hold a secret.
        """
        ...
