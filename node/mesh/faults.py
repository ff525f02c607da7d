"""Errors that several layers of the mesh raise."""

from __future__ import annotations

from pyagent_node.base.errors import Unavailable


def stream_closed(reason: str) -> Unavailable:
    """Return the error for a stream that is gone."""
    return Unavailable(f"The stream to the peer is closed: {reason}.", code="stream_closed")
