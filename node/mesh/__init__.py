"""The ``Mesh`` port over py-libp2p.

What comes from libp2p: keys and peer ids, the Noise handshake.  What is ours, and
speaks libp2p's wire formats: connection management, the yamux muxer, protocol negotiation
(``docs/adr/0010-connections-of-our-own.md`` says why).

Modules, from the wire up: ``psk`` and ``wire`` (sockets), ``negotiation`` (protocol ids),
``handshake`` (Noise), ``yamux`` (pure) and ``channels`` (streams of bytes), ``streams`` (frames),
``auth`` and ``connection``, ``book`` (addresses, pure) and ``dialling``, ``ping``, ``gossip``,
``mdns``, and ``service``, which puts them together.

``open_mesh``, ``MeshConfig``, ``MeshLimits``, ``MeshMetrics`` and ``Libp2pMesh`` can be imported
from here; libp2p is loaded when the first of ``open_mesh`` and ``Libp2pMesh`` is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyagent_node.node.mesh.settings import MeshConfig, MeshLimits, MeshMetrics

if TYPE_CHECKING:
    from pyagent_node.node.mesh.service import Libp2pMesh, open_mesh

__all__ = ["Libp2pMesh", "MeshConfig", "MeshLimits", "MeshMetrics", "open_mesh"]


def __getattr__(name: str) -> object:
    if name in ("Libp2pMesh", "open_mesh"):
        from pyagent_node.node.mesh import service  # noqa: PLC0415 - loads libp2p

        return getattr(service, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
