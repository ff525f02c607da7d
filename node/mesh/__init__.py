"""The ``Mesh`` port over py-libp2p.

What comes from libp2p: keys and peer ids, multiaddresses, the Noise handshake.  What is ours, and
speaks libp2p's wire formats: connection management, the yamux muxer, protocol negotiation
(``docs/adr/0008-connections-of-our-own.md`` says why).

Modules, from the wire up: ``psk`` and ``raw`` (sockets), ``handshake`` (Noise), ``link``
(encrypted packets), ``yamux`` (pure) and ``channels`` (streams of bytes), ``negotiation``
(protocol ids), ``streams`` (frames), ``auth``, ``connection``, ``book`` (addresses, pure),
``dialling``, ``service`` (``open_mesh``).
"""
