"""The vault: the block store from the event loop, over a disk that fills up and has room again."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from pyagent_node.base.types import Digest
from pyagent_node.node.kv_messages import Sealed
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.block_trouble import RETRY_SECONDS
from pyagent_node.sharding.kv_keys import BlockKey
from pyagent_node.simulations.block_disk import SimulatedIndex, simulated_block_disk
from pyagent_node.simulations.disk import SimulatedDisk

MODEL = Digest("ab" * 32)


async def inline(work):
    await trio.lowlevel.checkpoint()
    return work()


def block(number: int) -> Sealed:
    key = BlockKey(MODEL, 0, bytes([number]) * 32, "f16")
    return Sealed(key, b"", number, bytes([number]) * 1000, 1.0)


def make(disk: SimulatedDisk, index: SimulatedIndex) -> KvVault:
    tier = simulated_block_disk(disk, index, 10**6)
    return KvVault(BlockStore(memory_bytes=10**5, disk=tier, clock=trio.current_time), inline)


async def test_what_a_full_disk_refused_is_written_when_there_is_room(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SimulatedDisk(random.Random(0))
    index = SimulatedIndex(disk, random.Random(0))
    vault = make(disk, index)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vault.run)
        disk.room = 100
        await vault.write([block(1), block(2)])
        await trio.sleep(3 * RETRY_SECONDS)
        assert vault.stats().disk == "disk_full"
        assert vault.stats().pending == 2
        assert await vault.read([block(1).key, block(9).key]) == [block(1).data, None]
        disk.room = 10**6
        await trio.sleep(2 * RETRY_SECONDS)  # nothing new came
        assert vault.stats().disk == "on"
        assert vault.stats().pending == 0
        await vault.write([block(3)])
        nursery.cancel_scope.cancel()  # before it was written: the end writes it
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    again = make(disk, index)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        await trio.sleep(1)
        keys = [block(n).key for n in (1, 2, 3)]
        assert await again.read(keys) == [block(n).data for n in (1, 2, 3)]
        assert again.counts(MODEL, [block(2).key.chain], range(2), "f16") == [1, 0]
        nursery.cancel_scope.cancel()
