"""Streams of a node to itself: served in memory, with the limits of the real ones."""

from __future__ import annotations

import logging

import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.mesh import StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh.memory import MemoryStream, memory_pair
from pyagent_node.node.mesh.settings import MeshLimits, MeshMetrics

log = logging.getLogger("pyagent_node.mesh")


class Loopback:
    """Opens streams to the node itself; handlers run in ``nursery``."""

    def __init__(
        self, me: PeerId, limits: MeshLimits, metrics: MeshMetrics, nursery: trio.Nursery
    ) -> None:
        self._me = me
        self._limits = limits
        self._metrics = metrics
        self._nursery = nursery

    def open(self, protocol: str, handler: StreamHandler | None) -> MemoryStream:
        """Return our end of a new stream; raises :class:`Unavailable` without a handler."""
        if handler is None:
            raise Unavailable(f"This node does not serve {protocol}.", code="protocol_unsupported")
        limits = self._limits
        ours, theirs = memory_pair(
            self._me, self._me, max_header=limits.max_header, max_tail=limits.max_tail
        )
        self._nursery.start_soon(self._serve, protocol, handler, theirs)
        return ours

    async def _serve(self, protocol: str, handler: StreamHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        except Exception:
            self._metrics.handler_errors += 1
            log.exception("the handler of %s failed for this node itself", protocol)
            stream.abort()
        finally:
            await stream.aclose()
