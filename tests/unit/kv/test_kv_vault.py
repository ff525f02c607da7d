"""The store behind the event loop: what is kept is on the disk soon, and there after a restart."""

from __future__ import annotations

from pathlib import Path

import trio

from pyagent_node.node.kv_messages import Sealed, seal
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.sharding.block_disk import open_real_disk
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.kv_keys import BlockKey

from .kv_kit import CODEC, LINKS, MODEL

SIZE = 1000


def blocks(count: int) -> list[Sealed]:
    made = []
    for number in range(count):
        for layer in range(3):
            key = BlockKey(MODEL, layer, LINKS[number], CODEC)
            parent = LINKS[number - 1] if number else b""
            made.append(Sealed(key, parent, number, seal(key, bytes([layer]) * SIZE), 0.1))
    return made


def vault(folder: Path, memory: int = 1 << 22) -> KvVault:
    return KvVault(BlockStore(memory_bytes=memory, disk=open_real_disk(folder, 1 << 26, reserve=0)))


async def test_blocks_outlive_the_node(tmp_path: Path) -> None:
    first = vault(tmp_path)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            await first.write(blocks(4))
            assert first.counts(MODEL, LINKS[:6], range(3), CODEC) == [4, 4, 4]
            assert first.holds(MODEL, LINKS[3], range(3), CODEC)
            assert not first.holds(MODEL, LINKS[3], range(4), CODEC)
            nursery.cancel_scope.cancel()  # what is not on the disk yet gets there first
        second = vault(tmp_path, memory=3 * SIZE)
        before = second.changes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.run)
            while second.changes == before:  # noqa: ASYNC110 - the vault tells nobody
                await trio.sleep(0.01)
            assert second.counts(MODEL, LINKS[:6], range(1, 3), CODEC) == [4, 4]
            keys = [block.key for block in blocks(5)]
            found = await second.read(keys)
            assert found == [*(block.data for block in blocks(4)), None, None, None]
            assert await second.drop_model(MODEL) == 12
            assert await second.read(keys) == [None] * 15
            nursery.cancel_scope.cancel()


async def test_what_is_no_block_is_dropped_without_a_word_to_the_caller(tmp_path: Path) -> None:
    it = KvVault(BlockStore(memory_bytes=1 << 20))
    bad = Sealed(BlockKey(MODEL, 0, b"short", CODEC), b"", 0, b"data", 0.1)
    await it.write([bad, *blocks(1)])
    assert it.counts(MODEL, LINKS[:1], range(3), CODEC) == [1, 1, 1]
    assert await it.clear() == 3
