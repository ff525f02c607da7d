"""Serves ``/pyagent/kv/1``: gives blocks to those who may have them, and keeps what ranks send.

The mesh has authorised every peer; who may read or write what is the log's word (``kv_rights``).  A
peer that knows a later placement than this node waits a moment for our log.  Every peer has a byte
budget for what it sends here to be kept, and a number of streams; requests of a stream are served
one after the other, so a peer's own haste is all that it can fill a queue with.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.limits import MAX_PEERS, MIB
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.serving import StreamCounts, serve_stream
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.kv_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    Advert,
    AskRest,
    Bytes,
    Done,
    Failed,
    Fetch,
    Had,
    Have,
    KvReply,
    KvRequest,
    Piece,
    Put,
    Report,
    Sealed,
    check_request,
    frames_of,
    split,
    unseal,
)
from pyagent_node.node.kv_rests import Rests
from pyagent_node.node.kv_rights import check_reader, check_writer, epoch_of
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.kv")

STREAMS_PER_PEER: Final = 8
"""Streams of this protocol that one peer may hold open."""
IDLE_SECONDS: Final = 120.0
"""A stream without a request for so long is closed."""
SEND_SECONDS: Final = 60.0
"""Longest time for a peer to take one frame."""
CATCH_UP_SECONDS: Final = 2.0
"""How long a request that names a later placement waits for this node's log."""
PUT_BURST: Final = 512 * MIB
"""Bytes of blocks that a peer may send here to be kept at once ..."""
PUT_RATE: Final = 64 * MIB
"""... and how many more each second."""


class Vault(Protocol):
    """The blocks of this node."""

    def counts(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> list[int]:
        """Return how many leading blocks are held, for each layer."""
        ...

    async def read(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Return sealed blocks, ``None`` for what is not held; never raises."""
        ...

    async def write(self, blocks: Sequence[Sealed]) -> None:
        """Keep blocks; may drop them; never raises."""
        ...


class ByteBudget:
    """``burst`` bytes at once, then ``rate`` a second.  Pure; time is passed in.

    One that is larger than what is left is taken if anything is left at all: a budget may be
    overdrawn by one message.
    """

    def __init__(self, burst: float, rate: float, now: float) -> None:
        self._burst = burst
        self._rate = rate
        self._left = burst
        self._at = now

    def take(self, size: int, now: float) -> bool:
        """Take so many bytes; ``False`` when there are none left."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 0:
            return False
        self._left -= size
        return True

    def reserve(self, size: int, now: float) -> float:
        """Take so many bytes in any case; returns for how long to wait before they are used."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        wait = max(0.0, -self._left / self._rate)
        self._left -= size
        return wait

    def full(self, now: float) -> bool:
        """Whether nothing was taken lately."""
        return self._left + (now - self._at) * self._rate >= self._burst


class KvServer:
    """The serving side; ``on_advert`` and ``on_report`` hear what peers tell."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        vault: Vault,
        rests: Rests,
        *,
        on_advert: Callable[[PeerId, bytes], None],
        on_report: Callable[[PeerId, Report], None],
    ) -> None:
        self.refused: Counter[str] = Counter()
        """Requests of peers that were refused, by the error's code."""
        self.bytes_sent = 0
        self.bytes_kept = 0
        self._here = mesh.peer_id
        self._consensus = consensus
        self._vault = vault
        self._rests = rests
        self._on_advert = on_advert
        self._on_report = on_report
        self._streams = StreamCounts(STREAMS_PER_PEER, "streams about KV")
        self._budgets: dict[PeerId, ByteBudget] = {}
        mesh.handle(PROTOCOL, self._serve)

    async def _serve(self, stream: FrameStream) -> None:
        async def answer(frame: Frame) -> None:
            request = REQUESTS.decode(frame.header)
            await self._send(stream, await self._answer(stream, request, frame.tail))

        async def refuse(error: PyAgentError) -> None:
            if error.code == "too_many_streams":
                self.refused[error.code] += 1
            with trio.move_on_after(SEND_SECONDS):
                await stream.send(Frame(REPLIES.encode(Failed(error.to_info()))))

        await serve_stream(
            stream, self._streams, idle_seconds=IDLE_SECONDS, answer=answer, refuse=refuse
        )

    async def _send(self, stream: FrameStream, reply: KvReply, tail: Bytes = b"") -> None:
        with trio.move_on_after(SEND_SECONDS):
            await stream.send(Frame(REPLIES.encode(reply), tail))
            return
        raise Unavailable(
            f"{stream.peer} took no answer for {SEND_SECONDS:.0f} s.", code="stream_closed"
        )

    async def _answer(self, stream: FrameStream, request: KvRequest, tail: Bytes) -> KvReply:
        peer = stream.peer
        try:
            check_request(request, memoryview(tail).nbytes)
            match request:
                case Have():
                    layers = await self._readable(peer, request)
                    counts = self._vault.counts(request.model, request.chain, layers, request.codec)
                    return Had(tuple(counts))
                case Fetch():
                    layers = await self._readable(peer, request)
                    return await self._give(stream, request, layers)
                case AskRest():
                    await self._readable(peer, request)
                    return await self._give_rest(stream, request)
                case Put():
                    return await self._keep(peer, request, tail)
                case Advert():
                    self._on_advert(peer, bytes(tail))
                    return Done()
                case Report():
                    self._on_report(peer, request)
                    return Done()
        except Unavailable:
            raise
        except PyAgentError as error:
            log.debug("a request of %s about KV was refused: %s", peer, error)
            self.refused[error.code] += 1
            return Failed(error.to_info())

    # ---- reading -----------------------------------------------------------------------------

    async def _readable(self, peer: PeerId, request: Have | Fetch | AskRest) -> range:
        layers = range(request.first_layer, request.last_layer)
        await self._catch_up(request.model, request.epoch)
        check_reader(self._consensus.state, request.model, peer, layers)
        return layers

    async def _give(self, stream: FrameStream, request: Fetch, layers: range) -> Done:
        total = 0
        for index, link in enumerate(request.chain):
            keys = [BlockKey(request.model, layer, link, request.codec) for layer in layers]
            blocks = await self._vault.read(keys)
            for first, run in frames_of(layers.start, blocks):
                tail = b"".join(run)
                piece = Piece(index, first, tuple(len(block) for block in run))
                await self._send(stream, piece, tail)
                total += len(tail)
                self.bytes_sent += len(tail)
        return Done(total)

    async def _give_rest(self, stream: FrameStream, request: AskRest) -> Done:
        total = 0
        for piece, tail in await self._rests.answer(request):
            await self._send(stream, piece, tail)
            total += len(tail)
            self.bytes_sent += len(tail)
        return Done(total)

    # ---- writing -----------------------------------------------------------------------------

    async def _keep(self, peer: PeerId, request: Put, tail: Bytes) -> Done:
        layers = range(request.first_layer, request.first_layer + len(request.sizes))
        await self._catch_up(request.model, request.epoch)
        check_writer(self._consensus.state, request.model, peer, self._here, layers)
        size = memoryview(tail).nbytes
        if not self._budget(peer).take(size, trio.current_time()):
            raise LimitExceeded(
                "This node takes no more KV blocks of you for now.",
                code="kv_budget",
                remedy="Wait some seconds.",
            )
        blocks = []
        for layer, sealed in zip(layers, split(request, tail), strict=True):
            key = BlockKey(request.model, layer, request.chain, request.codec)
            key.check()
            unseal(key, sealed)
            blocks.append(Sealed(key, request.parent, request.index, sealed, request.seconds))
        await self._vault.write(blocks)
        self.bytes_kept += size
        return Done(size)

    def _budget(self, peer: PeerId) -> ByteBudget:
        now = trio.current_time()
        if peer not in self._budgets and len(self._budgets) >= MAX_PEERS:
            self._budgets = {p: b for p, b in self._budgets.items() if not b.full(now)}
        return self._budgets.setdefault(peer, ByteBudget(PUT_BURST, PUT_RATE, now))

    async def _catch_up(self, model: Digest, epoch: int) -> None:
        """Give this node's log a moment to get to the placement that the peer knows."""
        consensus = self._consensus
        if epoch <= epoch_of(consensus.state, model):
            return
        with trio.move_on_after(CATCH_UP_SECONDS):
            async with consensus.applied(consensus.state.index) as entries:
                if epoch <= epoch_of(consensus.state, model):
                    return
                async for _entry in entries:
                    if epoch <= epoch_of(consensus.state, model):
                        return
