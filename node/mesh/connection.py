"""One authorised connection: which streams it takes, and who serves them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import PyAgentError, Refused, Unavailable
from pyagent_node.base.limits import KIB
from pyagent_node.base.mesh import StreamHandler
from pyagent_node.base.types import PeerId
from pyagent_node.node.mesh import auth
from pyagent_node.node.mesh.authoriser import Authoriser, PeerAdmission
from pyagent_node.node.mesh.channels import Channel, Link
from pyagent_node.node.mesh.faults import stream_closed
from pyagent_node.node.mesh.handshake import Secured
from pyagent_node.node.mesh.negotiation import (
    EndOfBytes,
    NotMultistream,
    NotSpoken,
    propose,
    respond,
)
from pyagent_node.node.mesh.settings import MeshLimits, MeshMetrics
from pyagent_node.node.mesh.streams import ChannelStream
from pyagent_node.node.mesh.wire import Wire

log = logging.getLogger("pyagent_node.mesh")

JOIN: Final = "/pyagent/join/1"
"""The one protocol besides ``auth`` that a peer may speak before it is authorised."""
MAX_JOIN_HEADER: Final = 16 * KIB
MAX_STREAMS_BEFORE: Final = 8
"""Streams that a peer may hold open before it is authorised."""
GRACE_SECONDS: Final = 0.5
"""Time that handlers get to take in what arrived before their connection ended."""


class Host(Protocol):
    """What a connection needs of the mesh it belongs to."""

    limits: MeshLimits
    metrics: MeshMetrics
    authoriser: Authoriser

    @property
    def handlers(self) -> Mapping[str, StreamHandler]:
        """Handlers of the application."""
        ...

    @property
    def system(self) -> Mapping[str, Callable[[ChannelStream], Awaitable[None]]]:
        """Handlers of the mesh itself (pings, peer exchange)."""
        ...


class Connection:
    """A secured connection and the state of its authorisation.

    Its streams are served in ``nursery``, which must be cancelled when :attr:`link` has ended.
    """

    def __init__(
        self, host: Host, wire: Wire, secured: Secured, *, outbound: bool, nursery: trio.Nursery
    ) -> None:
        self.peer: PeerId = secured.peer
        self.outbound = outbound
        self.remote = wire.remote()
        self.admission: PeerAdmission | None = None
        self.credentials = b""
        """What the peer showed, so that it can be judged again."""
        self.rtt_ms: float | None = None
        self.users = 0
        """Streams of the application, as opposed to the mesh's own."""
        self.idle = trio.Event()
        """Set, and made anew, when the last of them ends; also when the connection does."""
        self._host = host
        self._nursery = nursery
        self._serving = 0
        self._served = trio.Event()
        self._auth_begun = outbound
        self._exchanging = outbound
        self._decided = trio.Event()
        self._refusal: PyAgentError | None = None
        self.joining = 0
        """Join streams being served."""
        self.link = Link(
            wire,
            secured,
            initiator=outbound,
            max_inbound=MAX_STREAMS_BEFORE,
            on_accept=self._accept,
            on_refuse=self._refuse,
        )
        nursery.start_soon(self._run_link)

    @property
    def name(self) -> str:
        """The name that the peer goes by, empty before it is authorised."""
        return self.admission.name if self.admission else ""

    async def _run_link(self) -> None:
        try:
            await self.link.run()
        except Exception:
            log.exception("the connection to %s failed", self.peer)
        finally:
            if not self._exchanging:  # it may still hold the peer's verdict, unread
                self._decide(None)
            self._fell_idle()

    # Authorisation -----------------------------------------------------------------------------

    async def authorise(self) -> None:
        """Run ``/pyagent/auth/1`` (as dialler) or wait for it; the caller sets the deadline.

        Raises what :func:`pyagent_node.node.mesh.auth.exchange` raises.
        """
        if self.outbound:
            stream = await self.open(auth.PROTOCOL, max_header=auth.MAX_HEADER)
            await self._exchange(stream)
        await self._decided.wait()
        if self._refusal is not None:
            raise self._refusal
        if self.admission is None:
            raise Unavailable(
                f"The connection ended before it was authorised: {self.link.reason}.",
                code="handshake_failed",
            )

    async def _exchange(self, stream: ChannelStream) -> None:
        self._exchanging = True
        try:
            admission, credentials = await auth.exchange(stream, self._host.authoriser)
        except PyAgentError as error:
            self._decide(error)
        except Exception:
            log.exception("judging %s failed", self.peer)
            self._decide(Unavailable("The peer could not be judged.", code="internal"))
        else:
            self.admission, self.credentials = admission, credentials
            self.link.mux.max_inbound = self._host.limits.max_streams_per_peer
            self._decide(None)
        finally:
            await stream.aclose()

    def _decide(self, refusal: PyAgentError | None) -> None:
        if not self._decided.is_set():
            self._refusal = refusal
            self._decided.set()

    async def part(self, reason: str = "this side ends the connection") -> None:
        """End the connection after what was sent has arrived, within :data:`GRACE_SECONDS`."""
        with trio.move_on_after(GRACE_SECONDS):
            await self.link.goodbye()
            await self.link.ended.wait()
        self.link.close(reason)

    # Streams that we open ----------------------------------------------------------------------

    async def open(
        self, protocol: str, *, system: bool = True, max_header: int | None = None
    ) -> ChannelStream:
        """Open a stream; ``system`` ones do not keep a surplus connection alive.

        Raises :class:`LimitExceeded` (``too_many_streams``) and :class:`Unavailable`
        (``protocol_unsupported``, ``stream_refused``, ``stream_closed``).
        """
        channel = self.link.open()
        try:
            await propose(channel, protocol)
        except NotSpoken:
            channel.close()
            raise Unavailable(
                f"{self.peer} does not serve {protocol}.",
                code="protocol_unsupported",
                remedy="It may still be starting, or run another version.",
            ) from None
        except (EndOfBytes, NotMultistream):
            channel.reset()
            if self.link.ended.is_set():
                raise stream_closed(self.link.reason) from None
            raise Unavailable(
                f"{self.peer} refused a stream: it may hold too many.", code="stream_refused"
            ) from None
        except BaseException:
            channel.reset()
            raise
        return self._frames(channel, system=system, max_header=max_header)

    def _frames(
        self, channel: Channel, *, system: bool, max_header: int | None = None
    ) -> ChannelStream:
        limits = self._host.limits
        if not system:
            self.users += 1
        return ChannelStream(
            channel,
            self._host.metrics,
            max_header=max_header or limits.max_header,
            max_tail=limits.max_tail if max_header is None else 0,
            on_close=None if system else self._user_left,
        )

    def _user_left(self) -> None:
        self.users -= 1
        if not self.users:
            self._fell_idle()

    def _fell_idle(self) -> None:
        self.idle.set()
        self.idle = trio.Event()

    # Streams that the peer opens ---------------------------------------------------------------

    def _accept(self, channel: Channel) -> None:
        self._serving += 1
        self._nursery.start_soon(self._serve, channel)

    async def served(self) -> None:
        """Wait until every handler is done."""
        while self._serving:
            await self._served.wait()

    def _refuse(self, streams: int) -> None:
        self._host.metrics.refused["too_many_streams"] += streams

    async def _serve(self, channel: Channel) -> None:
        try:
            protocol = await self._negotiate(channel)
            if protocol is None:
                channel.reset()
            elif protocol == auth.PROTOCOL:
                with trio.move_on_after(self._host.limits.handshake_seconds):
                    await self._exchange(
                        self._frames(channel, system=True, max_header=auth.MAX_HEADER)
                    )
            else:
                await self._handle(channel, protocol)
        finally:
            self._serving -= 1
            if not self._serving:
                self._served.set()
                self._served = trio.Event()

    async def _negotiate(self, channel: Channel) -> str | None:
        protocol: str | None = None
        with trio.move_on_after(self._host.limits.handshake_seconds):
            try:
                protocol = await respond(channel, self._choose)
            except (EndOfBytes, NotMultistream, NotSpoken):
                protocol = None
        return protocol

    async def _choose(self, protocol: str) -> bool:
        """Say whether the peer may speak ``protocol``, once it is known who it is."""
        if protocol == auth.PROTOCOL:
            first, self._auth_begun = not self._auth_begun, True
            return first
        if protocol == JOIN:
            return JOIN in self._host.handlers
        if self._auth_begun:  # a peer that is sure of us may be quicker than our own verdict
            await self._decided.wait()
        if self.admission is None:
            self._host.metrics.refused["unauthorised"] += 1
            return False
        return protocol in self._host.system or protocol in self._host.handlers

    async def _handle(self, channel: Channel, protocol: str) -> None:
        system = protocol in self._host.system
        joining = self.admission is None
        stream = self._frames(
            channel, system=system, max_header=MAX_JOIN_HEADER if joining else None
        )
        self.joining += joining
        try:
            if system:
                await self._host.system[protocol](stream)
            else:
                await self._host.handlers[protocol](stream)
        except Refused as error:
            self._failed(stream, protocol, error.code, str(error))
        except PyAgentError as error:
            level = logging.DEBUG if error.code == "stream_closed" else logging.WARNING
            self._failed(stream, protocol, error.code, str(error), level)
        except Exception:
            log.exception("the handler of %s failed for %s", protocol, self.peer)
            self._failed(stream, protocol, "internal", "a defect", logging.DEBUG)
        finally:
            self.joining -= joining
            await stream.aclose()

    def _failed(
        self, stream: ChannelStream, protocol: str, code: str, why: str, level: int = logging.INFO
    ) -> None:
        metrics = self._host.metrics
        metrics.handler_errors += 1
        metrics.streams_failed[protocol, code] += 1
        log.log(level, "a %s stream of %s ended with %s: %s", protocol, self.peer, code, why)
        stream.abort()
