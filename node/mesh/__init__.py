"""The ``Mesh`` port over py-libp2p."""
