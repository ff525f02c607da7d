"""The ``Mesh`` port: what the rest of the node may ask of the network.

The real adapter is ``pyagent_node.node.mesh`` (libp2p); the simulated one is
``pyagent_node.simulations.mesh``.  Both authorise a peer before any handler sees its streams, so a
handler can trust ``stream.peer``.  All methods raise only errors of ``pyagent_node.base.errors``:
:class:`Unavailable` (``peer_unreachable``, ``stream_closed``), :class:`Refused`,
:class:`LimitExceeded` and :class:`DeadlineExceeded`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame


class PeerInfo(msgspec.Struct, frozen=True):
    """What this node knows of one connected, authorised peer.

    ``rtt_ms`` is our own smoothed measurement (``None`` before the first); ``role`` comes from the
    membership certificate, or is ``"client"`` in a public mesh.
    """

    peer_id: PeerId
    name: str
    role: str
    addresses: tuple[str, ...]
    rtt_ms: float | None
    outbound: bool


class PeerEvent(msgspec.Struct, frozen=True):
    """A peer became usable (``up``) or its last connection is gone (``down``)."""

    peer_id: PeerId
    change: Literal["up", "down"]


class FrameStream(Protocol):
    """One ordered, bidirectional stream of frames with back-pressure.

    One task may send while another receives; ``send`` calls of several tasks do not interleave.
    """

    @property
    def peer(self) -> PeerId:
        """The authorised peer at the other end."""
        ...

    async def send(self, frame: Frame) -> None:
        """Send one frame, waiting while the peer's window is full.

        Raises :class:`LimitExceeded` for an oversized frame and :class:`Unavailable`
        (``stream_closed``) when the stream or its connection is gone.
        """
        ...

    def try_send(self, frame: Frame) -> bool:
        """Send one frame if that is possible without waiting; ``False`` when nothing was sent.

        For what must not cost a turn of the scheduler.  Raises as :meth:`send` does.
        """
        ...

    async def receive(self) -> Frame | None:
        """Return the next frame, or ``None`` at an orderly end of the stream.

        Raises :class:`Unavailable` (``stream_closed``) when it ended inside a frame or was reset,
        and :class:`LimitExceeded` at an oversized frame (the stream is then reset).
        """
        ...

    async def aclose(self) -> None:
        """Close both directions; idempotent; never raises for a stream that is gone already."""
        ...


StreamHandler = Callable[[FrameStream], Awaitable[None]]


class Mesh(Protocol):
    """The network as seen by a node: authorised peers, framed streams, peer events."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own id."""
        ...

    def peers(self) -> Sequence[PeerInfo]:
        """Return the connected, authorised peers."""
        ...

    def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Serve inbound streams of ``protocol`` (``"/pyagent/pipe/1"``) with ``handler``.

        Each stream runs in its own task; an exception ends that stream only, is logged and
        counted.  The stream is closed when the handler returns.
        """
        ...

    async def open(self, peer: PeerId, protocol: str) -> FrameStream:
        """Open a stream to ``peer``, dialling it first if its addresses are known.

        A node may open a stream to itself: it is served in memory, without a network.
        Raises :class:`Unavailable` (``peer_unreachable``), :class:`Refused` or
        :class:`DeadlineExceeded`.
        """
        ...

    async def connect(self, address: str) -> PeerId:
        """Dial a multiaddress ending in ``/p2p/<peer id>`` and authorise the peer."""
        ...

    def events(self) -> AbstractAsyncContextManager[PeerEvents]:
        """Subscribe to peer events: first an ``up`` for each present peer, then changes."""
        ...


class PeerEvents(Protocol):
    """An asynchronous iterator of :class:`PeerEvent`; bounded, coalesced for each peer."""

    def __aiter__(self) -> PeerEvents:
        """Return itself."""
        ...

    async def __anext__(self) -> PeerEvent:
        """Return the next event."""
        ...
