"""The disk tier on a disk that loses power at any operation, fills up and damages what it has."""

from __future__ import annotations

import errno
import math
import random

import pytest

from pyagent_node.base.files import map_os_error
from pyagent_node.sharding.block_disk import BlockDisk
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.block_trouble import RETRY_SECONDS
from pyagent_node.sharding.kv_keys import BlockKey
from pyagent_node.simulations.block_disk import (
    SimulatedBlocks,
    SimulatedIndex,
    simulated_block_disk,
)
from pyagent_node.simulations.disk import PowerLoss, SimulatedDisk
from tests.unit.sharding.blocks import MODEL, OTHER, chain_of, payload_of, put_chain

LIMIT = 300_000


class World:
    """A store on a simulated disk, driven by a generator; every answer is checked."""

    def __init__(self, seed: int, *, limit: int = LIMIT) -> None:
        self.rng = random.Random(seed)
        self.disk = SimulatedDisk(random.Random(seed + 1))
        self.index = SimulatedIndex(self.disk, random.Random(seed + 2))
        self.limit = limit
        self.now = 0.0
        self.known: dict[BlockKey, None] = {}
        self.store = self.make()

    def make(self) -> BlockStore:
        tier = simulated_block_disk(self.disk, self.index, self.limit)
        return BlockStore(memory_bytes=60_000, disk=tier, clock=lambda: self.now)

    def start(self) -> None:
        self.store = self.make()
        self.store.open()

    def crash(self) -> None:
        self.disk.crash()
        self.index.crash()

    def step(self) -> None:
        rng = self.rng
        match rng.randrange(12):
            case 0 | 1 | 2 | 3:
                model = rng.choice((MODEL, MODEL, OTHER))
                chain = chain_of(rng.randrange(24), rng.randrange(1, 6), model)
                for key in put_chain(self.store, chain, model=model, cost=rng.random()):
                    self.known[key] = None
            case 4 | 5 | 6 | 7:
                self.store.write_back(rng.choice((1, 5000, 50_000)))
            case 8 if self.known:
                self.check_reads(rng.sample(sorted(self.known), min(20, len(self.known))))
            case 9:
                self.store.pin("s", MODEL, "f16", chain_of(rng.randrange(24), 3))
            case 10 if rng.random() < 0.2:
                gone = rng.choice((MODEL, OTHER))
                self.store.drop_model(gone)
                assert not any(self.store.has(key) for key in self.known if key.model == gone)
            case _:
                self.store.unpin("s")
        self.check()

    def check_reads(self, keys: list[BlockKey]) -> int:
        """Nothing but what was put comes back; returns how much did."""
        found = self.store.read(keys)
        for key, payload in zip(keys, found, strict=True):
            assert payload is None or payload == payload_of(key, len(payload))
        return sum(payload is not None for payload in found)

    def check(self) -> None:
        stats = self.store.stats()
        assert stats.disk_bytes <= self.limit
        assert stats.memory_bytes <= stats.memory_limit
        on_disk = [n for n in self.disk.names() if n.endswith(".kv")]
        assert sum(self.disk.size(name) for name in on_disk) == stats.disk_bytes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_power_is_lost_at_every_operation(seed: int) -> None:
    world = World(seed)
    world.start()
    for _ in range(200):
        world.step()
    total = world.disk.operations
    assert total > 100
    for last in range(seed % 3, total, 3):
        world = World(seed)
        world.disk.power_for = last
        with pytest.raises(PowerLoss):  # noqa: PT012
            world.start()
            for _ in range(201):
                world.step()
        world.crash()
        world.start()
        assert world.store.stats().disk == "on"
        world.check()
        world.check_reads(sorted(world.known))
        # And it is of use again.
        for key in put_chain(world.store, chain_of(99, 3)):
            world.known[key] = None
        while world.store.write_back():
            world.check()
        world.start()
        assert world.check_reads([k for k in world.known if k.chain in chain_of(99, 3)]) == 6


@pytest.mark.parametrize("seed", range(4))
def test_many_lives(seed: int) -> None:
    world = World(seed + 100)
    rng = random.Random(seed)
    for _ in range(25):
        try:
            world.disk.power_for = rng.choice((math.inf, rng.randrange(1, 80)))
            world.limit = rng.choice((LIMIT, LIMIT, 100_000, 20_000))
            world.start()
            world.check_reads(sorted(world.known))
            for _ in range(30):
                world.disk.room = rng.choice((10**9, 10**9, rng.randrange(20_000)))
                world.disk.failing_syncs = rng.choice((0, 0, 0, 1))
                world.index.failing = rng.choice((0, 0, 0, 2))
                world.now += 10.0
                world.step()
            if rng.random() < 0.5:
                world.store.close()
        except PowerLoss:
            world.crash()
        else:
            world.disk.survive()
        world.disk.room, world.disk.failing_syncs, world.index.failing = 10**9, 0, 0


def test_after_a_clean_stop_everything_is_there() -> None:
    world = World(7)
    world.start()
    keys = []
    for text in range(6):
        keys += put_chain(world.store, chain_of(text * 8, 3))
        while world.store.write_back():
            pass
    assert len(keys) == 36
    world.store.close()
    world.start()
    assert world.check_reads(keys) == len(keys)
    assert world.store.leading(MODEL, chain_of(8, 5), range(2), "f16") == 3
    assert world.store.stats().hits_disk == len(keys)
    assert world.check_reads(keys[-4:]) == 4
    assert world.store.stats().hits_memory == 4


@pytest.mark.slow
def test_a_flipped_bit_costs_its_block_and_nothing_else() -> None:
    rng = random.Random(3)
    for turn in range(200):
        world = World(turn)
        world.start()
        keys = put_chain(world.store, chain_of(5, 5), range(4))
        while world.store.write_back():
            pass
        if turn % 2:
            world.store.close()
        name = next(n for n in world.disk.names() if n.endswith(".kv"))
        world.disk.flip(name, rng.randrange(world.disk.size(name)), rng.randrange(8))
        if turn % 3 == 0:
            world.index.crash()
        world.start()
        found = world.check_reads(keys)
        if turn % 3:
            # A bit of the segment's header takes the whole segment, nothing else does.
            assert found >= len(keys) - 1 or found == 0
            assert world.store.stats().corrupt + found == len(keys) or found == 0
        assert world.check_reads(keys) == found


def test_a_full_disk_costs_one_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    world = World(1)
    world.start()
    world.disk.room = 1000
    keys = put_chain(world.store, chain_of(3, 5), size=2000)
    for _ in range(5):
        world.now += RETRY_SECONDS
        assert world.store.write_back() == 0
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "memory only" in warnings[0].getMessage()
    assert "Free some space" in warnings[0].getMessage()
    assert world.store.stats().disk == "disk_full"
    assert world.check_reads(keys) == len(keys) == 10
    world.disk.room = 10**6
    assert world.store.write_back() == 0  # not yet: it is tried now and then
    world.now += RETRY_SECONDS
    with caplog.at_level("INFO", logger="pyagent_node.sharding.store"):
        assert world.store.write_back() == 10
    assert "again" in caplog.records[-1].getMessage()
    assert world.store.stats().disk == "on"


def test_the_limit_on_disk_holds_under_any_load() -> None:
    world = World(9, limit=150_000)
    world.start()
    for _ in range(600):
        world.step()
    stats = world.store.stats()
    assert stats.evicted_disk > 0
    assert stats.corrupt == 0
    world.store.close()
    world.limit = 20_000  # lowered
    world.start()
    world.check()
    world.check_reads(sorted(world.known))


def test_a_lowered_limit_needs_no_room_that_is_not_there() -> None:
    world = World(4)
    world.start()
    keys = []
    for text in range(11):  # every segment has some that will go and some that stay
        cost = 1.0 + text % 2
        keys += put_chain(world.store, chain_of(8 * text, 1), size=8000, cost=cost)
        while world.store.write_back():
            pass
    world.store.close()
    world.limit, world.disk.room = 170_000, 0.0
    world.start()
    stats = world.store.stats()
    assert stats.disk == "on"
    assert stats.disk_bytes <= world.limit
    assert stats.corrupt == 0
    assert world.check_reads(keys) == stats.disk_blocks == len(keys) - stats.evicted_disk > 6


class ReadOnly(SimulatedBlocks):
    """A file system that was remounted read-only."""

    mended = False

    def create(self, name: str, data: bytes) -> None:
        if not self.mended:
            raise map_os_error(OSError(errno.EROFS, "Read-only file system"), name, "writing")
        super().create(name, data)


def test_a_read_only_disk_is_one_warning_until_it_is_mended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk, now = SimulatedDisk(random.Random(0)), [0.0]
    files = ReadOnly(disk)
    tier = BlockDisk(files, SimulatedIndex(disk, random.Random(0)), limit=LIMIT, reserve=0)
    store = BlockStore(memory_bytes=60_000, disk=tier, clock=lambda: now[0])
    store.open()
    keys = put_chain(store, chain_of(1, 3))
    for _ in range(3):
        assert store.write_back() == 0
        now[0] += RETRY_SECONDS
    assert store.stats().disk == "file_not_permitted"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert None not in store.read(keys)
    files.mended = True
    assert store.write_back() == 6
    assert store.stats().disk == "on"
