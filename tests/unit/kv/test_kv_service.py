"""Whole services over a simulated mesh: blocks come back exactly, from here and from peers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.state import State
from pyagent_node.inference.backend import KvRange, LayerKv
from pyagent_node.inference.kv.landmarks import cells_name
from pyagent_node.inference.kv.port import SettledBlock, Wanted
from pyagent_node.node.kv_blocks import codec_name
from pyagent_node.node.kv_messages import (
    PROTOCOL,
    REPLIES,
    REQUESTS,
    Done,
    Fetch,
    Had,
    Have,
    Piece,
    seal,
)
from pyagent_node.node.kv_service import KvService
from pyagent_node.node.kv_views import samples
from pyagent_node.sharding.kv_codec import KvShape
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, BlockKey
from pyagent_node.sharding.kv_landmarks import pack, split
from pyagent_node.simulations.kv import open_simulated_kv
from pyagent_node.simulations.mesh import SimulatedNetwork, open_network

from .kv_kit import LINKS, MODEL, A, B, C, D, Log, placed, rank

CELLS = "test/1/f16"
ROW = 24
TWO = (rank(0, 0, 10, A, C), rank(1, 10, 30, B, C))


def cells(index: int, layers: range) -> KvRange:
    """Return the cells of a block: f16 numbers that depend on block and layer."""
    made = []
    for layer in layers:
        rows = np.random.default_rng(100 * index + layer).standard_normal((2, BLOCK_TOKENS, ROW))
        keys, values = rows.astype(np.float16)
        made.append(LayerKv(layer, keys.tobytes(), values.tobytes()))
    start = index * BLOCK_TOKENS
    return KvRange(CELLS, start, start + BLOCK_TOKENS, tuple(made))


def settled(index: int, session: str = "5" * 32, layers: range = range(10)) -> SettledBlock:
    return SettledBlock(
        SessionId(session), A, MODEL, 4, index, LINKS[index], layers.start, layers.stop, CELLS
    )


def wanted(count: int, layers: range = range(10), **more: object) -> Wanted:
    return Wanted(
        SessionId("7" * 32), MODEL, LINKS[:count], layers.start, layers.stop, CELLS, **more
    )  # type: ignore[arg-type]


class World:
    def __init__(self, network: SimulatedNetwork, log: Log) -> None:
        self.network = network
        self.log = log
        self.kv: dict[PeerId, KvService] = {}


@asynccontextmanager
async def services(
    *who: PeerId, state: State | None = None, memory: int = 1 << 26
) -> AsyncIterator[World]:
    log = Log(state or placed(*TWO))
    async with open_network(latency=0.01) as network, trio.open_nursery() as nursery:
        world = World(network, log)

        async def run(peer: PeerId, task_status=trio.TASK_STATUS_IGNORED) -> None:
            opened = open_simulated_kv(network.node(peer), log, memory_bytes=memory)  # type: ignore[arg-type]
            async with opened as kv:
                world.kv[peer] = kv
                task_status.started()
                await trio.sleep_forever()

        for peer in who:
            await nursery.start(run, peer)
        await network.connect_all()
        yield world
        nursery.cancel_scope.cancel()


def harvest(kv: KvService, count: int, session: str = "5" * 32, layers: range = range(10)) -> int:
    asked = 0
    for index in range(count):
        block = settled(index, session, layers)
        if kv.wants(block):
            kv.keep(block, cells(index, layers), 0.5)
            asked += 1
    return asked


async def test_what_was_kept_comes_back_bit_for_bit(autojump_clock):
    async with services(A) as world:
        kv = world.kv[A]
        assert kv.promises(MODEL, LINKS[:5], range(10)) == 0
        assert await kv.load(wanted(5)) == []
        assert harvest(kv, 4) == 4
        await trio.sleep(1)
        assert kv.promises(MODEL, LINKS[:5], range(10)) == 4
        assert await kv.load(wanted(5)) == [cells(i, range(10)) for i in range(4)]
        assert await kv.load(wanted(5, skip=1, limit=2)) == [cells(i, range(10)) for i in (1, 2)]
        assert await kv.load(wanted(5, range(3, 5))) == [cells(i, range(3, 5)) for i in range(4)]
        assert await kv.load(wanted(5, range(3, 12))) == []
        assert harvest(kv, 4, session="6" * 32) == 0, "what is there is not exported again"
        view = await kv.view()
        assert (view.kept, view.dropped, view.tiers[0].blocks) == (4, 0, 40)
        assert view.loads.blocks_local == 10
        assert {sample.name for sample in samples(kv)} >= {"kv_bytes", "kv_loaded", "kv_misses"}
        assert (await kv.clear()).blocks == 40
        assert await kv.load(wanted(5)) == []
        kv.ended(SessionId("5" * 32))
        kv.ended(SessionId("5" * 32))


async def test_a_standby_gets_them_and_a_peer_loads_what_two_others_have(autojump_clock):
    async with services(A, B, C, D) as world:
        harvest(world.kv[A], 4)
        harvest(world.kv[B], 4, layers=range(10, 30))
        await trio.sleep(3)
        both = [cells(i, range(30)) for i in range(4)]
        assert await world.kv[C].load(wanted(4, range(30))) == both
        assert world.kv[C].loader.stats.blocks_local == 4
        # A head that holds nothing knows from adverts what the ranks could begin from.
        assert world.kv[D].promises(MODEL, LINKS[:6], range(30)) == 4
        assert world.kv[D].promises(MODEL, LINKS[1:6], range(30)) == 3
        assert await world.kv[D].load(wanted(4, range(30))) == [], "it was given no layers"
        world.log.become(placed(rank(0, 0, 30, D), epoch=5, index=2))
        world.kv[C].vault.store.drop_model(MODEL)
        assert await world.kv[D].load(wanted(4, range(30), prefill_seconds=0.01)) == both
        stats = world.kv[D].loader.stats
        assert stats.blocks_remote == 4
        assert not stats.bad
        assert await world.kv[D].load(wanted(4, range(30))) == both, "they are kept here now"
        assert stats.blocks_local == 4


async def test_what_takes_longer_than_computing_is_not_fetched(autojump_clock):
    async with services(A, D) as world:
        harvest(world.kv[A], 4)
        harvest(world.kv[D], 1, session="8" * 32)
        await trio.sleep(3)
        world.log.become(placed(rank(0, 0, 10, D), rank(1, 10, 30, B), epoch=5, index=2))
        assert len(await world.kv[D].load(wanted(4, prefill_seconds=1e-9))) == 1
        assert len(await world.kv[D].load(wanted(4, prefill_seconds=1.0))) == 4


Answer = Callable[[Fetch], list[tuple[object, bytes]]]


def piece(request: Fetch, payload: bytes, *, layer: int = 0, of: int = 0, sign: int = 0) -> object:
    key = BlockKey(MODEL, request.first_layer + sign, request.chain[of], request.codec)
    data = seal(key, payload)
    return Piece(0, request.first_layer + layer, (len(data),)), data


NAN = np.full(BLOCK_TOKENS * ROW, np.nan, np.float16).tobytes()


@pytest.mark.parametrize(
    ("lie", "bad"),
    [
        (lambda r: [piece(r, b"")], True),
        (lambda r: [piece(r, b"\0\0\0")], True),
        (lambda r: [piece(r, b"\1" + bytes(60))], True),
        (lambda r: [piece(r, b"\0" + (4).to_bytes(4, "little") + b"keys" + b"values")], True),
        (lambda r: [piece(r, b"\0" + len(NAN).to_bytes(4, "little") + NAN + NAN)], True),
        (lambda r: [piece(r, b"\0x" * 99, sign=1)], True),
        (lambda r: [piece(r, b"\0x" * 99, of=1)], True),
        (lambda r: [(Piece(5, 0, (20,)), bytes(20))], True),
        (lambda r: [(Piece(0, 0, (20,)), bytes(10))], True),
        (lambda r: [(Had((1,)), b"")], True),
        (lambda r: [(Done(), b"")], False),
    ],
)
async def test_a_liar_spoils_nothing_and_is_not_asked_again(lie: Answer, bad, autojump_clock):
    asked: list[object] = []

    async def serve(stream) -> None:
        while (frame := await stream.receive()) is not None:
            request = REQUESTS.decode(frame.header)
            asked.append(request)
            if isinstance(request, Have):
                answers = [(Had((4,) * (request.last_layer - request.first_layer)), b"")]
            elif isinstance(request, Fetch):
                answers = [*lie(request), (Done(), b"")]
            else:
                answers = [(Done(), b"")]
            for reply, tail in answers:
                await stream.send(Frame(REPLIES.encode(reply), tail))

    async with services(C) as world:
        world.network.node(A).handle(PROTOCOL, serve)
        await world.network.connect_all()
        kv = world.kv[C]
        harvest(kv, 1, session="8" * 32, layers=range(10))  # so that sizes of rows are known
        await trio.sleep(1)
        found = await kv.load(wanted(4))
        assert found == [cells(0, range(10))], "its own block is used all the same"
        assert bool(kv.loader.stats.bad[A]) is bad
        if bad:
            fetches = sum(isinstance(each, Fetch) for each in asked)
            assert await kv.load(wanted(4)) == found
            assert sum(isinstance(each, Fetch) for each in asked) == fetches
            assert kv.loader.trust.distrusted(trio.current_time()) == 1
        assert len(kv.vault.store.held()) == 1


async def test_a_mute_peer_costs_little_time(autojump_clock):
    async def mute(_stream: object) -> None:
        await trio.sleep_forever()

    async with services(C) as world:
        world.network.node(A).handle(PROTOCOL, mute)
        await world.network.connect_all()
        start = trio.current_time()
        assert await world.kv[C].load(wanted(4, prefill_seconds=0.01)) == []
        assert trio.current_time() - start < 3


async def test_a_store_without_room_degrades_to_none(autojump_clock):
    async with services(A, memory=0) as world:
        harvest(world.kv[A], 3)
        await trio.sleep(1)
        assert await world.kv[A].load(wanted(3)) == []
        assert world.kv[A].kept == 0


async def test_too_many_blocks_at_once_are_dropped(autojump_clock, monkeypatch):
    monkeypatch.setattr("pyagent_node.node.kv_service.MAX_QUEUED_BYTES", 3 * 64 * ROW * 4 * 10)
    async with services(A) as world:
        kv = world.kv[A]
        harvest(kv, 8)
        await trio.sleep(1)
        assert kv.dropped >= 4
        assert len(await kv.load(wanted(8))) == kv.kept <= 4


async def test_adverts_follow_what_is_held_and_nonsense_is_refused(autojump_clock):
    async with services(A, D) as world:
        a, d = world.kv[A], world.kv[D]
        harvest(a, 2)
        await trio.sleep(2)
        assert d.promises(MODEL, LINKS[:4], range(10)) == 2
        assert d.promises(MODEL, LINKS[:4], range(11)) == 0
        await a.clear()
        await trio.sleep(2)
        assert d.promises(MODEL, LINKS[:4], range(10)) == 0
        harvest(a, 3, session="9" * 32)
        await trio.sleep(2)
        assert d.promises(MODEL, LINKS[:4], range(10)) == 3
        world.network.cut(A, D)
        await trio.sleep(1)
        assert d.promises(MODEL, LINKS[:4], range(10)) == 0
        world.network.heal(A, D)
        await trio.sleep(3)
        assert d.promises(MODEL, LINKS[:4], range(10)) == 3


def test_the_codec_names_the_format_of_cells():
    assert codec_name("llama.cpp/1/f16") != codec_name("llama.cpp/2/f16")
    BlockKey(MODEL, 0, LINKS[0], codec_name("x" * 100)).check()


async def test_the_blocks_of_a_model_that_the_mesh_forgets_go(autojump_clock):
    state = placed(*TWO)
    registered = msgspec.structs.replace(state, models={MODEL: None, Digest("cd" * 32): None})
    async with services(A, state=registered) as world:
        kv = world.kv[A]
        harvest(kv, 2)
        await trio.sleep(1)
        assert kv.vault.stats().memory_blocks == 20
        world.log.become(msgspec.structs.replace(registered, models={MODEL: None}, index=2))
        await trio.sleep(1)
        assert kv.vault.stats().memory_blocks == 20
        world.log.become(msgspec.structs.replace(registered, models={}, index=3))
        await trio.sleep(1)
        assert kv.vault.stats().memory_blocks == 0
        assert await kv.load(wanted(2)) == []


def landmarks(index: int, seed: int = 0) -> tuple[SettledBlock, KvRange]:
    """Return a landmark block, as a stage gives it; every one has a length of its own."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(10):
        rows = rng.standard_normal((2, BLOCK_TOKENS, ROW)) * rng.uniform(0.1, 9)
        keys, values = (each.astype(np.float16).tobytes() for each in rows)
        at = np.arange(BLOCK_TOKENS, dtype=np.int32) * 2
        shape = KvShape(1, ROW, 1e4)
        layers.append(
            LayerKv(layer, *split(pack("int4", keys, values, places=at, tokens=200, shape=shape)))
        )
    assert len({len(kv.values) for kv in layers}) > 1
    block = msgspec.structs.replace(settled(index), cells=FEW, session=SessionId("4" * 32))
    return block, KvRange(FEW, 64 * index, 64 * index + 64, tuple(layers))


FEW = cells_name(CELLS)


async def test_landmark_blocks_go_the_way_of_all_blocks_and_their_cost_is_told(autojump_clock):
    async with services(A, D) as world:
        a, d = world.kv[A], world.kv[D]
        harvest(a, 4)
        block, kv = landmarks(0)
        assert a.wants(block)
        a.keep(block, kv, 0.0)
        await trio.sleep(3)
        few = wanted(1, block_bytes=900.0)
        few = msgspec.structs.replace(few, cells=FEW)
        all_of_it = wanted(4, block_bytes=64.0 * 4 * ROW)
        assert await a.load(few) == [kv]
        assert await a.cost(few) == await a.cost(all_of_it) == 0.0
        assert math.isinf(await d.cost(all_of_it)), "it was given no layers"
        world.log.become(placed(rank(0, 0, 10, D), rank(1, 10, 30, B), epoch=5, index=2))
        assert d.promises(MODEL, few.chain, few.layers) == 1
        small, large = await d.cost(few), await d.cost(all_of_it)
        assert 0 < small < large < math.inf
        assert math.isinf(await d.cost(msgspec.structs.replace(few, fetch="never")))
        assert math.isinf(await d.cost(wanted(5)))
        assert math.isinf(await d.cost(wanted(0)))
        assert await d.load(few) == [kv]
        assert not d.loader.stats.bad
        assert await d.cost(few) == 0.0


async def test_what_only_calls_itself_landmarks_is_a_lie(autojump_clock):
    async with services(A, D) as world:
        a, d = world.kv[A], world.kv[D]
        block, kv = landmarks(0)
        broken = [LayerKv(x.layer, x.keys, x.values[:-1] + b"?") for x in kv.layers]
        a.wants(block)
        a.keep(block, KvRange(FEW, 0, 64, tuple(broken)), 0.0)
        await trio.sleep(3)
        world.log.become(placed(rank(0, 0, 10, D), rank(1, 10, 30, B), epoch=5, index=2))
        assert await d.load(msgspec.structs.replace(wanted(1), cells=FEW)) == []
        assert d.loader.stats.bad[A]
