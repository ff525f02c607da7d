"""What the KV of a node shows of itself: ``status``, and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from pyagent_node.node.api.kv_schema import KvView, LoadsView, StreamView, TierView
from pyagent_node.node.kv_adverts import AdvertBook
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_loading import BlockLoader
from pyagent_node.node.kv_rests import Rests
from pyagent_node.node.kv_server import KvServer
from pyagent_node.node.kv_stream import CheckpointStream
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.node.telemetry import Sample


class KvParts(Protocol):
    """The parts of a ``KvService`` that count."""

    dropped: int
    kept: int
    vault: KvVault
    adverts: AdvertBook
    client: KvClient
    server: KvServer
    stream: CheckpointStream
    loader: BlockLoader
    rests: Rests

    @property
    def now(self) -> float:
        """The time, for what is only true for a while."""
        ...


def make_view(kv: KvParts) -> KvView:
    """Return what ``kv status`` shows."""
    store, loads, stream = kv.vault.stats(), kv.loader.stats, kv.stream
    memory = "on" if store.memory_limit else "off"
    return KvView(
        tiers=(
            TierView(
                "memory",
                memory,
                store.memory_bytes,
                store.memory_limit,
                store.memory_blocks,
                store.hits_memory,
            ),
            TierView(
                "disk",
                store.disk,
                store.disk_bytes,
                store.disk_limit,
                store.disk_blocks,
                store.hits_disk,
            ),
        ),
        misses=store.misses,
        corrupt=store.corrupt,
        evicted=store.evicted_memory + store.evicted_disk,
        kept=kv.kept,
        dropped=kv.dropped,
        served_bytes=kv.server.bytes_sent,
        known_peers=len(kv.adverts),
        loads=LoadsView(
            loads=loads.loads,
            blocks_wanted=loads.blocks_wanted,
            blocks_local=loads.blocks_local,
            blocks_remote=loads.blocks_remote,
            bytes_fetched=kv.client.bytes_received,
            seconds=loads.seconds,
            bad_blocks=sum(loads.bad.values()),
            distrusted=kv.loader.trust.distrusted(kv.now),
        ),
        stream=StreamView(
            limit=stream.rate,
            sessions=len(stream.book),
            targets=len(stream.book.targets()),
            blocks_sent=stream.blocks_sent,
            bytes_sent=stream.bytes_sent,
            bytes_kept=kv.server.bytes_kept,
            failures=sum(stream.failed.values()),
        ),
    )


def samples(kv: KvParts) -> Iterator[Sample]:
    """Yield what is counted, for ``/metrics``."""
    view = make_view(kv)
    for tier in view.tiers:
        labels = {"tier": tier.name}
        yield Sample("kv_bytes", "Bytes of KV blocks.", tier.bytes, "gauge", labels)
        text = "KV blocks, each one layer of 64 tokens."
        yield Sample("kv_blocks", text, tier.blocks, "gauge", labels)
        yield Sample("kv_hits", "Blocks found in a tier.", tier.hits, labels=labels)
    yield Sample("kv_misses", "Blocks that the store was asked for and did not have.", view.misses)
    yield Sample("kv_corrupt_blocks", "Blocks that came back damaged.", view.corrupt)
    yield Sample("kv_evicted", "Blocks given up for others.", view.evicted)
    yield Sample("kv_kept", "Blocks of ranks here, all their layers, that were kept.", view.kept)
    yield Sample("kv_dropped", "Blocks of ranks here that came too fast.", view.dropped)
    loads = view.loads
    yield Sample("kv_loads", "Times that a rank here asked for blocks of a session.", loads.loads)
    found = (
        ("local", loads.blocks_local),
        ("remote", loads.blocks_remote),
        ("missing", loads.blocks_wanted - loads.blocks_local - loads.blocks_remote),
    )
    for where, count in found:
        text = "Blocks, all layers of a rank, that sessions began from or did not."
        yield Sample("kv_loaded", text, count, labels={"where": where})
    yield Sample("kv_load_seconds", "Time that loads took.", loads.seconds)
    for way, count in (("in", loads.bytes_fetched), ("out", view.served_bytes)):
        text = "Bytes of blocks that were asked for."
        yield Sample("kv_fetched_bytes", text, count, labels={"direction": way})
    text = "Fetches that were ended because computing was faster."
    yield Sample("kv_fetches_given_up", text, kv.loader.stats.given_up)
    text = "Tokens whose cells ranks here took over from those of the epoch before."
    yield Sample("kv_handed_over_tokens", text, kv.rests.loaded)
    text = "Wrong blocks that peers sent; they were refused."
    yield Sample("kv_bad_blocks", text, loads.bad_blocks)
    text = "Peers that are asked for no blocks now."
    yield Sample("kv_distrusted_peers", text, loads.distrusted, "gauge")
    stream = view.stream
    text = "Slices of running sessions whose blocks go to standbys."
    yield Sample("kv_stream_sessions", text, stream.sessions, "gauge")
    for way, count in (("in", stream.bytes_kept), ("out", stream.bytes_sent)):
        text = "Bytes of blocks on their way to standbys."
        yield Sample("kv_stream_bytes", text, count, labels={"direction": way})
    text = "Blocks that a standby did not take; they are tried again."
    yield Sample("kv_stream_failures", text, stream.failures)
    text = "Peers that told what they hold."
    yield Sample("kv_known_peers", text, view.known_peers, "gauge")
