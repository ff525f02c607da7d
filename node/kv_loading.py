"""Gets blocks back: from this node's own store, and from peers that have what is missing.

What is asked of whom is decided in ``kv_plan``, and whether it is worth it by the cost model of
``sharding.block_costs``.  A load never takes much longer than computing the blocks would: what has
come by then is used.  Every block of a peer is checked before it is used or kept; a peer that sends
a wrong one is asked no more for a while, and the block is fetched from another, or computed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from pyagent_node.base.errors import CorruptData, PyAgentError
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.port import Wanted
from pyagent_node.node.kv_adverts import AdvertBook
from pyagent_node.node.kv_blocks import RowSizes, codec_name, is_f16, read_block
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import Fetch, Have, Sealed
from pyagent_node.node.kv_plan import Ask, Trust, Watch, leading, share_out, worth
from pyagent_node.node.kv_rights import epoch_of, likely_sources
from pyagent_node.node.kv_server import Vault
from pyagent_node.node.kv_vault import Offload
from pyagent_node.sharding.block_costs import Link
from pyagent_node.sharding.kv_codec import EXACT, EXPECTED_SIZE, Level
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, BlockKey

log = logging.getLogger("pyagent_node.kv")

ASK_SECONDS: Final = 2.0
"""How long peers have to say what they hold; less where little is missing."""
LEAST_ASK: Final = 0.1
GRACE_SECONDS: Final = 0.03
"""How long the others have once one peer has said that it holds everything."""
MAX_PEERS_ASKED: Final = 8
"""Peers that are asked about one load."""
ROUNDS: Final = 3
"""How often what is missing is shared out among the peers that are left."""
NEAR_MS: Final = 2.0
"""Round trip of a peer that is taken for one in the same network ..."""
NEAR_BANDWIDTH: Final = 100e6
"""... which is expected to send so many bytes a second, before anything was measured."""
FAR_BANDWIDTH: Final = 12.5e6
WATCH_SECONDS: Final = 0.1
"""How often a fetch is compared with computing."""
MAX_LINKS: Final = 1024
SHORTEST_LOAD: Final = 0.5
LONGEST_LOAD: Final = 12.0
UNKNOWN_LOAD: Final = 5.0
"""Seconds that a load may take where nobody knows what computing would."""


class LoadStats:
    """What loads came to; all of it counts since the start."""

    def __init__(self) -> None:
        self.loads = 0
        self.blocks_wanted = 0
        self.blocks_local = 0
        self.blocks_remote = 0
        """Blocks of which a layer at least came from a peer."""
        self.given_up = 0
        """Fetches that were ended because computing was faster."""
        self.seconds = 0.0
        self.bad: Counter[PeerId] = Counter()
        """Wrong blocks that peers sent."""
        self.failed: Counter[str] = Counter()
        """Peers that failed to answer, by the error's code."""


class _Load:
    """One load in progress: ``links`` are the hashes wanted, numbered from 0."""

    def __init__(self, wanted: Wanted, level: Level) -> None:
        self.wanted = wanted
        self.level: Level = level
        self.codec = codec_name(wanted.cells, level)
        self.links = wanted.chain[wanted.skip : wanted.skip + wanted.limit]
        self.layers = wanted.layers
        self.found: dict[tuple[int, int], LayerKv] = {}
        """By number and layer."""
        self.fresh: list[Sealed] = []
        """What peers sent, to be kept here too."""

    def key(self, number: int, layer: int) -> BlockKey:
        return BlockKey(self.wanted.model, layer, self.links[number], self.codec)

    def sealed(self, number: int, layer: int, data: bytes) -> Sealed:
        wanted = self.wanted
        index = wanted.skip + number
        parent = wanted.chain[index - 1] if index else b""
        seconds = wanted.prefill_seconds * BLOCK_TOKENS / len(self.layers)
        return Sealed(self.key(number, layer), parent, index, data, seconds)

    def counts(self) -> dict[int, int]:
        """Return how many leading blocks were found, by layer."""
        found: dict[int, int] = {}
        for layer in self.layers:
            count = 0
            while (count, layer) in self.found:
                count += 1
            found[layer] = count
        return found

    def result(self) -> list[KvRange]:
        """Return the leading blocks of which every layer was found."""
        count = min(self.counts().values(), default=0)
        ranges = []
        for number in range(count):
            start = (self.wanted.skip + number) * BLOCK_TOKENS
            layers = tuple(self.found[number, layer] for layer in self.layers)
            ranges.append(KvRange(self.wanted.cells, start, start + BLOCK_TOKENS, layers))
        return ranges


class BlockLoader:
    """Loads blocks for the ranks of this node."""

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        client: KvClient,
        vault: Vault,
        *,
        adverts: AdvertBook,
        sizes: RowSizes,
        offload: Offload,
        level: Level = EXACT,
    ) -> None:
        self._level: Level = level
        self.stats = LoadStats()
        self.trust = Trust()
        self._mesh = mesh
        self._consensus = consensus
        self._client = client
        self._vault = vault
        self._adverts = adverts
        self._sizes = sizes
        self._offload = offload
        self._links: dict[PeerId, Link] = {}

    async def load(self, wanted: Wanted) -> list[KvRange]:
        """See ``KvShelf``."""
        job = _Load(wanted, self._level)
        if not job.links or not job.layers:
            return []
        start, have = trio.current_time(), 0
        with trio.move_on_after(_patience(wanted, len(job.links))):
            await self._local(job)
            have = min(job.counts().values())
            self.stats.blocks_local += have
            if have < len(job.links) and wanted.fetch != "never":
                await self._remote(job)
        ranges = job.result()
        if job.fresh:
            await self._vault.write(job.fresh)
        self.stats.loads += 1
        self.stats.blocks_wanted += len(job.links)
        self.stats.blocks_remote += max(0, len(ranges) - have)
        self.stats.seconds += trio.current_time() - start
        return ranges

    async def cost(self, wanted: Wanted) -> float:
        """See ``KvShelf``."""
        job = _Load(wanted, self._level)
        if not job.links or not job.layers:
            return math.inf
        counts = self._vault.counts(wanted.model, job.links, job.layers, job.codec)
        local = dict(zip(job.layers, counts, strict=True))
        count = len(job.links)
        if min(counts) >= count:
            return 0.0
        if wanted.fetch == "never":
            return math.inf
        held = await self._ask(job, self._candidates(job))
        if leading(job.layers, [local, *held.values()]) < count:
            return math.inf
        links = [self._link(peer) for peer, counts in held.items() if count in counts.values()]
        missing = sum(count - each for each in counts)
        bandwidth = sum(link.bandwidth for link in links)
        if bandwidth <= 0:
            return math.inf
        late = max(link.round_trip for link in links)
        return late + missing * self._block_bytes(wanted) / bandwidth

    def _block_bytes(self, wanted: Wanted) -> float:
        """Return what a block of one layer has on the way, 0 where nobody knows."""
        plain = wanted.block_bytes or self._sizes.mean(wanted.model, wanted.cells)
        # what is no row of numbers is kept as it came, whatever the level
        return plain * (EXPECTED_SIZE[self._level] if is_f16(wanted.cells) else 1.0)

    # ---- from here -----------------------------------------------------------------------------

    async def _local(self, job: _Load) -> None:
        wanted = job.wanted
        counts = self._vault.counts(wanted.model, job.links, job.layers, job.codec)
        places = [
            (number, layer)
            for layer, count in zip(job.layers, counts, strict=True)
            for number in range(count)
        ]
        if not places:
            return
        keys = [job.key(number, layer) for number, layer in places]
        sealed = await self._vault.read(keys)
        held = [(place, key, data) for place, key, data in zip(places, keys, sealed, strict=True)]

        def read() -> None:
            for place, key, data in held:
                if data is None:
                    continue
                try:
                    job.found[place] = read_block(key, data, wanted.cells, level=job.level)
                except CorruptData as error:
                    log.warning("a KV block of this node's own store is dropped: %s", error)

        await self._offload(read)

    # ---- from peers ----------------------------------------------------------------------------

    async def _remote(self, job: _Load) -> None:
        held = await self._ask(job, self._candidates(job))
        for _ in range(ROUNDS):
            local = job.counts()
            count = leading(job.layers, [local, *held.values()])
            count = self._worth(job, local, held, count)
            speeds = {peer: self._link(peer).bandwidth for peer in held}
            asks = share_out(job.layers, local, held, count, speeds)
            if not asks:
                return
            watch = Watch(asks, trio.current_time())
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, job, watch, nursery.cancel_scope)
                async with trio.open_nursery() as fetches:
                    for ask in asks:
                        fetches.start_soon(self._fetch, job, ask, held, watch)
                nursery.cancel_scope.cancel()
            if watch.given_up:
                return

    async def _watch(self, job: _Load, watch: Watch, scope: trio.CancelScope) -> None:
        """End a fetch that turns out to be slower than computing what is still to come."""
        seconds = job.wanted.computing
        if seconds <= 0 or job.wanted.fetch == "always":
            return
        while not watch.given_up:
            await trio.sleep(WATCH_SECONDS)
            if not watch.pays(trio.current_time(), seconds):
                self.stats.given_up += 1
                watch.given_up = True
                scope.cancel()

    def _worth(
        self,
        job: _Load,
        local: Mapping[int, int],
        held: Mapping[PeerId, Mapping[int, int]],
        count: int,
    ) -> int:
        """Return how many leading blocks it is worth to have, of ``count``."""
        if job.wanted.fetch == "always":
            return count
        links = [self._link(peer) for peer, counts in held.items() if count in counts.values()]
        missing = sum(local[layer] < count for layer in job.layers)
        return worth(
            count,
            min(local.values()),
            blocks=len(job.links),
            block_bytes=missing * self._block_bytes(job.wanted),
            prefill_seconds=job.wanted.computing,
            round_trip=max((link.round_trip for link in links), default=0.0),
            bandwidth=sum(link.bandwidth for link in links),
        )

    def _link(self, peer: PeerId) -> Link:
        """Return what is known of the way to a peer; before any measurement, by its distance."""
        link = self._links.get(peer)
        if link is None:
            if len(self._links) >= MAX_LINKS:
                self._links.clear()
            rtt = next((p.rtt_ms for p in self._mesh.peers() if p.peer_id == peer), None)
            near = rtt is not None and rtt < NEAR_MS
            link = self._links[peer] = Link(
                round_trip=0.05 if rtt is None else rtt / 1000,
                bandwidth=NEAR_BANDWIDTH if near else FAR_BANDWIDTH,
            )
        return link

    def _candidates(self, job: _Load) -> list[PeerId]:
        """Return whom to ask: who says that it has the blocks, and who should."""
        wanted, state = job.wanted, self._consensus.state
        connected = {peer.peer_id for peer in self._mesh.peers()}
        named: list[PeerId] = list(wanted.sources)
        named += self._adverts.holders(wanted.model, job.codec, job.links, job.layers)
        for checkpoint in state.checkpoints.values():
            if checkpoint.model == wanted.model:
                for part in checkpoint.block_holders:
                    if part.first_layer < job.layers.stop and job.layers.start < part.last_layer:
                        named += part.holders
        named += likely_sources(state, wanted.model, job.layers)
        now = trio.current_time()
        able = [
            peer
            for peer in dict.fromkeys(named)
            if peer in connected and self.trust.good(peer, now)
        ]
        return able[:MAX_PEERS_ASKED]

    async def _ask(self, job: _Load, peers: Sequence[PeerId]) -> dict[PeerId, dict[int, int]]:
        """Return how many leading blocks each peer says it has of each layer."""
        wanted = job.wanted
        request = Have(
            wanted.model,
            job.codec,
            job.links,
            wanted.first_layer,
            wanted.last_layer,
            epoch_of(self._consensus.state, wanted.model),
        )
        held: dict[PeerId, dict[int, int]] = {}

        async def ask(peer: PeerId) -> None:
            start = trio.current_time()
            try:
                counts = await self._client.have(peer, request)
            except PyAgentError as error:
                self._failed(peer, error)
                return
            self._link(peer).add(0, trio.current_time() - start)
            held[peer] = dict(zip(job.layers, counts, strict=True))
            if min(counts) == len(job.links):
                scope.deadline = min(scope.deadline, trio.current_time() + GRACE_SECONDS)

        with trio.move_on_after(self._ask_seconds(job)) as scope:
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    nursery.start_soon(ask, peer)
        return held

    def _ask_seconds(self, job: _Load) -> float:
        """Return how long to wait for answers: never much longer than what they could save."""
        have, count = min(job.counts().values()), len(job.links)
        seconds = job.wanted.computing
        if seconds <= 0:
            return ASK_SECONDS if 2 * have < count else LEAST_ASK
        return min(ASK_SECONDS, max(LEAST_ASK, seconds * BLOCK_TOKENS * (count - have) / 2))

    async def _fetch(
        self, job: _Load, ask: Ask, held: dict[PeerId, dict[int, int]], watch: Watch
    ) -> None:
        """Fetch what one peer was asked for; a peer that fails is out of ``held`` after that."""
        wanted, peer = job.wanted, ask.peer
        links = job.links[ask.start : ask.stop]
        epoch = epoch_of(self._consensus.state, wanted.model)
        request = Fetch(wanted.model, job.codec, links, ask.first_layer, ask.last_layer, epoch)
        start, size = trio.current_time(), 0

        def take(number: int, layer: int, sealed: bytes) -> None:
            nonlocal size
            key = job.key(ask.start + number, layer)
            found = read_block(key, sealed, wanted.cells, self._sizes, job.level)
            job.found[ask.start + number, layer] = found
            job.fresh.append(job.sealed(ask.start + number, layer, sealed))
            size += len(sealed)
            watch.came(ask)

        try:
            await self._client.fetch(peer, request, take)
        except PyAgentError as error:
            held.pop(peer, None)
            self._failed(peer, error)
            return
        finally:  # what was cut off tells as much of the way
            self._link(peer).add(size, trio.current_time() - start)
        counts = held.get(peer)
        if counts is not None:  # what it said that it has and did not send is not asked for again
            for layer, count in job.counts().items():
                if ask.first_layer <= layer < ask.last_layer:
                    counts[layer] = min(counts.get(layer, 0), count)

    def _failed(self, peer: PeerId, error: PyAgentError) -> None:
        now = trio.current_time()
        if isinstance(error, CorruptData):
            log.warning(
                "%s sent a wrong KV block, it is asked no more for a while: %s", peer, error
            )
            self.stats.bad[peer] += 1
            self.trust.lied(peer, now)
        elif error.code not in ("kv_not_yours", "kv_budget"):
            self.trust.failed(peer, now)
        self.stats.failed[error.code] += 1


def _patience(wanted: Wanted, blocks: int) -> float:
    """Return for how many seconds a load may go on: about as long as computing would take."""
    if wanted.fetch == "always":
        return LONGEST_LOAD
    if wanted.computing <= 0:
        return UNKNOWN_LOAD
    return min(LONGEST_LOAD, max(SHORTEST_LOAD, wanted.computing * BLOCK_TOKENS * blocks))
