"""The KV of this node: a ``KvShelf`` over its block store and its peers.

Blocks come in from the stages (:meth:`KvService.keep`), are encoded in a worker thread and put into
the store; from there they go to standbys (``kv_stream``), to peers that ask (``kv_server``), and
back into sessions (``kv_loading``).  Peers tell each other what they hold (``kv_adverts``).  What
is lost on the way is computed again: nothing here fails a request.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.backend import KvRange
from pyagent_node.inference.kv.port import Rest, SettledBlock, Wanted
from pyagent_node.node.api.kv_schema import ClearedReply, KvView
from pyagent_node.node.kv_adverts import AdvertBook, Advertiser
from pyagent_node.node.kv_blocks import RowSizes, codec_name, make_blocks
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_forgetting import forget_models
from pyagent_node.node.kv_loading import BlockLoader
from pyagent_node.node.kv_messages import Report
from pyagent_node.node.kv_rests import Rests
from pyagent_node.node.kv_server import KvServer
from pyagent_node.node.kv_stream import CheckpointStream
from pyagent_node.node.kv_vault import KvVault, Offload, in_thread
from pyagent_node.node.kv_views import make_view
from pyagent_node.node.nurseries import background
from pyagent_node.sharding.kv_codec import EXACT, Level

log = logging.getLogger("pyagent_node.kv")

MAX_QUEUED_BYTES: Final = 256 * MIB
"""Bytes of cells that may wait to be encoded; blocks beyond that are dropped."""
SETTLE_SECONDS: Final = 2.0
"""How long a load waits for blocks that are still being encoded."""
BATCH: Final = 8
"""Blocks that are encoded in one turn of a worker thread."""


class KvService:
    """Implements ``KvShelf``; get one from :func:`open_kv`."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        vault: KvVault,
        *,
        stream_bytes_per_second: int,
        offload: Offload,
        level: Level = EXACT,
    ) -> None:
        self._level: Level = level
        self.dropped = 0
        """Blocks that came faster than they could be encoded."""
        self.kept = 0
        """Blocks of the stages of this node that were put into the store."""
        self.on_report: Callable[[PeerId, Report], None] = lambda _peer, _report: None
        """Told of the holders of sessions that this node heads."""
        self.vault = vault
        self._consensus = consensus
        self.adverts = AdvertBook()
        self.client = KvClient(mesh)
        self.rests = Rests(mesh, self.client)
        self.server = KvServer(
            mesh,
            consensus,
            vault,
            self.rests,
            on_advert=self.adverts.learned,
            on_report=self._report,
        )
        self.stream = CheckpointStream(
            mesh,
            consensus,
            self.client,
            vault,
            rate=stream_bytes_per_second,
            on_report=self._report,
        )
        sizes = self._sizes = RowSizes()
        self.loader = BlockLoader(
            mesh,
            consensus,
            self.client,
            vault,
            adverts=self.adverts,
            sizes=sizes,
            offload=offload,
            level=level,
        )
        self._advertiser = Advertiser(mesh, self.client, vault, self.adverts)
        self._offload = offload
        self._codecs: dict[Digest, set[str]] = {}
        self._parents: dict[tuple[SessionId, int], list[bytes]] = {}
        """The chains of the sessions that run here, by their first layers."""
        self._queue: deque[tuple[SettledBlock, KvRange, float]] = deque()
        self._queued_bytes = 0
        self._encoding: tuple[tuple[SettledBlock, KvRange, float], ...] = ()
        self._encoded = trio.Event()
        self._wake = trio.Event()

    # ---- the stages' word ----------------------------------------------------------------------

    def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
        """See ``KvShelf``."""
        store, codecs = self.vault.store, self._codecs.get(model, ())
        here = max((store.leading(model, chain, layers, each) for each in codecs), default=0)
        if here == len(chain):
            return here
        own = () if self._advertiser.own is None else (self._advertiser.own,)
        return max(here, self.adverts.promises(model, chain, layers, own))

    async def load(self, wanted: Wanted) -> list[KvRange]:
        """See ``KvShelf``."""
        self._learn(wanted.model, wanted.cells)
        await self._settle(wanted)
        return await self.loader.load(wanted)

    async def cost(self, wanted: Wanted) -> float:
        """See ``KvShelf``."""
        self._learn(wanted.model, wanted.cells)
        await self._settle(wanted)
        return await self.loader.cost(wanted)

    def wants(self, block: SettledBlock) -> bool:
        """See ``KvShelf``."""
        codec = self._learn(block.model, block.cells)
        chain = self._parents.setdefault((block.session, block.first_layer), [])
        if len(chain) == block.index:
            chain.append(block.chain)
        self.stream.settled(block, codec)
        self.vault.store.pin(f"{block.session}/{block.first_layer}", block.model, codec, chain)
        if self.vault.holds(block.model, block.chain, block.layers, codec):
            self.stream.ready(block, 0.0)
            return False
        if self._queued_bytes > MAX_QUEUED_BYTES:
            self.dropped += 1
            return False
        return True

    def keep(self, block: SettledBlock, kv: KvRange, seconds: float) -> None:
        """See ``KvShelf``."""
        size = _size(kv)
        if self._queued_bytes + size > MAX_QUEUED_BYTES:
            self.dropped += 1
            return
        self._queue.append((block, kv, seconds))
        self._queued_bytes += size
        self._wake.set()

    def behind(self, model: Digest) -> int:
        """Return how many blocks of sessions here have not got to the prepared ranks yet."""
        prepared = self._consensus.state.prepared.get(model)
        if prepared is None or not self.stream.rate:
            return 0
        return self.stream.book.behind(model, {rank.peer_id for rank in prepared.ranks})

    def ended(self, session: SessionId) -> None:
        """See ``KvShelf``."""
        self.stream.ended(session)
        for key in [key for key in self._parents if key[0] == session]:
            del self._parents[key]
            self.vault.store.unpin(f"{session}/{key[1]}")

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """See ``KvShelf``."""
        self.rests.hand_over(rest, kv)

    async def load_rest(
        self, wanted: Rest, held: Mapping[PeerId, Sequence[range]]
    ) -> KvRange | None:
        """See ``KvShelf``."""
        return await self.rests.load(wanted, held)

    def _learn(self, model: Digest, cells: str) -> str:
        codec = codec_name(cells, self._level)
        self._codecs.setdefault(model, set()).add(codec)
        return codec

    def _report(self, peer: PeerId, report: Report) -> None:
        self.on_report(peer, report)

    # ---- tasks ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Encode what the stages give, and serve the other parts, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.vault.run)
            nursery.start_soon(self.stream.run)
            nursery.start_soon(self._advertiser.run)
            nursery.start_soon(self._encode)
            nursery.start_soon(forget_models, self._consensus, self.vault)

    async def _settle(self, wanted: Wanted) -> None:
        """Wait until blocks of a chain that the stages have given are in the store."""
        chain = frozenset(wanted.chain[wanted.skip :])

        def on_their_way() -> bool:
            jobs = (*self._encoding, *self._queue)
            return any(block.chain in chain and block.model == wanted.model for block, _, _ in jobs)

        with trio.move_on_after(SETTLE_SECONDS):
            while on_their_way():
                await self._encoded.wait()

    async def _encode(self) -> None:
        while True:
            if not self._queue:
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            count = min(BATCH, len(self._queue))
            batch = [self._queue.popleft() for _ in range(count)]
            self._encoding = tuple(batch)
            try:
                good = await self._offload(partial(self._make_all, batch))
            except PyAgentError as error:
                log.warning("KV blocks could not be encoded: %s", error)
                good = [False] * count
            self._encoding = ()
            self._encoded.set()
            self._encoded = trio.Event()
            self._queued_bytes -= sum(_size(kv) for _, kv, _ in batch)
            for (block, kv, seconds), kept in zip(batch, good, strict=True):
                if kept:
                    self.kept += 1
                    self._sizes.learn(block.model, block.cells, kv.layers)
                    self.stream.ready(block, seconds / len(block.layers))
            self.vault.wake()

    def _make_all(self, batch: list[tuple[SettledBlock, KvRange, float]]) -> list[bool]:
        return [self._make(*job) for job in batch]

    def _make(self, block: SettledBlock, kv: KvRange, seconds: float) -> bool:
        """Encode and keep one block; runs in a worker thread."""
        chain = self._parents.get((block.session, block.first_layer), ())
        parent = chain[block.index - 1] if 0 < block.index <= len(chain) else b""
        share = seconds / max(1, len(kv.layers))
        made = make_blocks(block, parent, kv.layers, share, self._level)
        kept = [self.vault.put(each) for each in made]
        return all(kept)

    @property
    def now(self) -> float:
        """The time, for what is only true for a while."""
        return trio.current_time()

    # ---- for operators -------------------------------------------------------------------------

    async def view(self) -> KvView:
        """Return what is kept, and what it was good for."""
        return make_view(self)

    async def clear(self) -> ClearedReply:
        """Give up every block; errors are the store's."""
        return ClearedReply(await self.vault.clear())


def _size(kv: KvRange) -> int:
    return sum(len(layer.keys) + len(layer.values) for layer in kv.layers)


@asynccontextmanager
async def open_kv(
    mesh: Mesh,
    consensus: Consensus,
    vault: KvVault,
    *,
    stream_bytes_per_second: int,
    offload: Offload = in_thread,
    level: Level = EXACT,
) -> AsyncIterator[KvService]:
    """Keep, send and get KV blocks, all of them at ``level``, while the context lasts."""
    async with background() as nursery:
        service = KvService(
            mesh,
            consensus,
            vault,
            stream_bytes_per_second=stream_bytes_per_second,
            offload=offload,
            level=level,
        )
        nursery.start_soon(service.run)
        yield service
