"""Pipelines over real KV services: what is fetched from peers, streamed to standbys and lied about.

The log says what the test likes; store, protocol, stream and pipeline are the node's own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from pyagent_node.base.types import PeerId, Placement, Prepared, Rank, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.state import State
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import PROTOCOL
from pyagent_node.node.kv_service import KvService
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.kv import open_simulated_kv
from pyagent_node.simulations.mesh import SimulatedMesh
from pyagent_node.simulations.pipeline import (
    MODEL,
    Answer,
    PipelineWorld,
    open_pipeline_world,
    peer,
)
from pyagent_node.simulations.sessions import open_session_world
from tests.unit.kv.kv_kit import Log

from .session_kit import Client, checkpoint, reference

pytestmark = pytest.mark.slow

LAYERS = 10
PARAMS = SamplingParams(seed=5, temperature=0.8)


class KvWorld:
    def __init__(self, world: PipelineWorld, log: Log, kv: list[KvService]) -> None:
        self.world, self.log, self.kv = world, log, kv

    def place(
        self,
        boundaries: Sequence[int],
        nodes: Sequence[int],
        standbys: dict[int, int] | None = None,
        *,
        seconds: float = 0.01,
    ) -> None:
        """Place the toy, with a standby for some ranks, in the log too."""
        placement = self.world.place(boundaries, nodes, seconds=seconds)
        ranks = tuple(
            msgspec.structs.replace(
                rank, standbys=(peer(standbys[rank.rank]),) if rank.rank in (standbys or {}) else ()
            )
            for rank in placement.ranks
        )
        placement = msgspec.structs.replace(placement, ranks=ranks)
        self.log.become(State(index=placement.epoch, placements={MODEL: placement}))

    def prepare(self, boundaries: Sequence[int], nodes: Sequence[int]) -> None:
        """Say in the log which ranks come next."""
        state = self.log.state
        placement: Placement = state.placements[MODEL]
        cuts = (0, *boundaries, LAYERS)
        ranks = tuple(
            Rank(r, Slice(cuts[r], cuts[r + 1], r == len(nodes) - 1), peer(nodes[r]))
            for r in range(len(nodes))
        )
        coming = Prepared(MODEL, 9, placement.epoch, ranks, 4096, 8, peer(0))
        self.log.become(msgspec.structs.replace(state, prepared={MODEL: coming}))


@asynccontextmanager
async def kv_world(nodes: int) -> AsyncIterator[KvWorld]:
    log = Log(State())
    made: list[KvService] = []

    @asynccontextmanager
    async def shelf(mesh: SimulatedMesh) -> AsyncIterator[KvService]:
        async with open_simulated_kv(mesh, log) as kv:  # type: ignore[arg-type]
            made.append(kv)
            yield kv

    async with open_pipeline_world(nodes, latency=0.002, open_shelf=shelf) as world:
        for kv, pipeline in zip(made, world.pipelines, strict=True):
            kv.rests.moved_on = pipeline.stages.moved_on
        yield KvWorld(world, log, made)


def text(length: int) -> list[int]:
    return [(7 * i + i // 11) % 128 for i in range(length)]


async def ask(it: KvWorld, head: int, tokens: list[int], n: int = 20) -> Answer:
    answer = await it.world.ask(head, tokens, max_tokens=n, sampling=PARAMS)
    assert answer.tokens == toy_generate(LAYERS, tokens, n, PARAMS)
    return answer


async def test_any_head_begins_from_what_ranks_have(autojump_clock):
    async with kv_world(4) as it:
        it.place((3, 7), (1, 2, 3))
        assert (await ask(it, 0, text(500))).finished.usage.cached_tokens == 0
        await trio.sleep(2)
        for head in (0, 2):
            usage = (await ask(it, head, text(500))).finished.usage
            assert usage.cached_tokens == 384
        assert all(kv.loader.stats.blocks_remote == 0 for kv in it.kv)


async def test_other_boundaries_fetch_from_who_had_the_layers(autojump_clock):
    async with kv_world(5) as it:
        it.place((3, 7), (1, 2, 3))
        await ask(it, 0, text(500))
        await trio.sleep(2)
        it.place((5,), (4, 0))
        assert (await ask(it, 4, text(500))).finished.usage.cached_tokens == 384
        for number in (0, 4):
            assert it.kv[number].loader.stats.blocks_remote >= 6, "this node had nothing"


async def test_a_fetch_that_is_slower_than_computing_is_ended(autojump_clock, monkeypatch):
    async with kv_world(5) as it:
        it.place((3, 7), (1, 2, 3), seconds=2.0)
        plain = (await ask(it, 0, text(500))).finished.usage
        await trio.sleep(2)
        it.place((5,), (4, 0), seconds=2.0)
        fetch = KvClient.fetch

        async def slow(client, peer, request, take):
            taken = 0

            def count(*block):
                nonlocal taken
                taken += 1
                take(*block)

            await fetch(
                client, peer, msgspec.structs.replace(request, chain=request.chain[:1]), count
            )
            await trio.sleep_forever()

        monkeypatch.setattr(KvClient, "fetch", slow)
        usage = (await ask(it, 0, text(500))).finished.usage
        assert usage.cached_tokens == 64, "what had come is used"
        assert sum(it.kv[number].loader.stats.given_up for number in (0, 4)) == 2
        assert usage.ttft_seconds < 4 * plain.ttft_seconds


async def moved(it: KvWorld, standbys: dict[int, int], change) -> Answer:
    """Ask, and have ``change`` called in the middle of the answer."""
    tokens, got = text(300), []

    async def run() -> None:
        got.append(await ask(it, 0, tokens, 200))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        with trio.fail_after(600):
            while sum(r.tokens_done for r in it.world.runners) < 1300:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert not got
        change()
    return got[0]


async def test_a_standby_takes_over_from_streamed_blocks(autojump_clock):
    async with kv_world(5) as it:
        it.place((3, 7), (1, 2, 3), {0: 4, 1: 4, 2: 4})

        def fail() -> None:
            it.world.network.crash(peer(2))
            it.place((3, 7), (1, 4, 3))

        usage = (await moved(it, {}, fail)).finished.usage
        assert usage.failovers == 1
        assert 0 < usage.recomputed_tokens <= 64
        stats = it.kv[4].loader.stats
        assert stats.blocks_local >= 5
        assert stats.blocks_remote == 0


async def test_layers_move_to_a_prepared_node_and_nothing_is_computed_again(autojump_clock):
    async with kv_world(5) as it:
        it.place((3, 7), (1, 2, 3))

        async def prepared() -> None:
            await trio.sleep(1)
            it.prepare((5,), (1, 4))

        it.world.start_soon(prepared)
        usage = (await moved(it, {}, lambda: it.place((5,), (1, 4)))).finished.usage
        assert usage.failovers == 1
        assert usage.recomputed_tokens == 0
        assert it.kv[4].loader.stats.blocks_local >= 5


async def test_without_standbys_blocks_come_from_the_ranks_that_live(autojump_clock):
    async with kv_world(5) as it:
        it.place((3, 7), (1, 2, 3))
        usage = (await moved(it, {}, lambda: it.place((5,), (1, 4)))).finished.usage
        assert usage.recomputed_tokens == 0
        assert it.kv[4].loader.stats.blocks_remote >= 5


@pytest.mark.parametrize("how", ["corrupt", "cut", "lost"])
async def test_spoilt_blocks_on_the_way_change_no_token(how: str, autojump_clock):
    async with kv_world(5) as it:

        def meddle(sender: PeerId, receiver: PeerId, protocol: str, frame: Frame):
            if protocol != PROTOCOL or len(frame.tail) < 1000:
                return [frame]
            tail = bytearray(frame.tail)
            tail[len(tail) // 2] ^= 255
            if how == "corrupt":
                return [Frame(frame.header, bytes(tail))]
            return [Frame(frame.header, bytes(tail[:-1]))] if how == "cut" else []

        it.world.network.meddler = meddle
        it.place((3, 7), (1, 2, 3), {0: 4, 1: 4, 2: 4})
        usage = (await moved(it, {}, lambda: it.place((5,), (0, 4)))).finished.usage
        assert usage.failovers == 1
        assert usage.recomputed_tokens > 300, "nothing could be had: all was computed again"
        assert (await ask(it, 3, text(300))).tokens


async def test_the_log_knows_who_holds_a_sessions_blocks_and_another_head_goes_on(
    autojump_clock, nursery
):
    async with open_session_world(6, keeps_kv=True) as it:
        await it.place((3, 7), (0, 1, 2), standby=3)
        client = Client(it.nodes[4])
        nursery.start_soon(client.ask, it, 400)
        await client.seen(150)
        entries = it.nodes[0].consensus.state.index
        await client.seen(300)
        assert it.nodes[0].consensus.state.index - entries < 10, "the log stays small"
        known = checkpoint(it)
        assert known is not None
        held = {(part.first_layer, part.last_layer): part for part in known.block_holders}
        assert set(held) == {(0, 3), (3, 7), (7, 10)}
        for rank, part in enumerate(held.values()):
            assert set(part.holders) == {peer(rank), peer(3), peer((rank + 1) % 3)}
            assert part.blocks >= 1
        it.crash(4)
        again = Client(it.nodes[5])
        nursery.start_soon(again.attach, 0)
        with trio.fail_after(600):
            await again.ended.wait()
        assert again.error is None
        assert again.tokens == reference(400)
        for node in it.nodes[:3]:
            assert node.kv is not None
            assert node.kv.loader.stats.blocks_local >= 4, "it began from blocks"
