"""The block store of this node, used from the event loop: whatever reads or writes a disk goes to
a worker thread.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TypeVar

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.node.kv_messages import Sealed
from pyagent_node.sharding.block_stats import StoreStats
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.block_trouble import RETRY_SECONDS
from pyagent_node.sharding.kv_keys import BlockKey

T = TypeVar("T")

log = logging.getLogger("pyagent_node.kv")

PAUSE_SECONDS: Final = 0.5
"""What comes within this time is written to the disk together."""
READERS: Final = 4
"""Reads of the disk at the same time."""
CLOSE_SECONDS: Final = 5.0
"""Longest time for a node that ends to write what it holds in memory."""


class Offload(Protocol):
    """Runs what blocks or computes for long."""

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what ``work`` returns."""
        ...


async def in_thread(work: Callable[[], T], /) -> T:
    """Run ``work`` in a worker thread."""
    return await trio.to_thread.run_sync(work)


class KvVault:
    """A :class:`BlockStore` as the rest of the node uses it; implements ``Vault``."""

    def __init__(self, store: BlockStore, offload: Offload = in_thread) -> None:
        self.store = store
        self._offload = offload
        self.changes = 0
        """Counts what was kept or given up, for those who tell others what is held."""
        self._reading = trio.Semaphore(READERS)
        self._wake = trio.Event()

    def counts(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> list[int]:
        """See ``Vault``."""
        return self.store.counts(model, chain, layers, codec)

    def holds(self, model: Digest, link: bytes, layers: range, codec: str) -> bool:
        """Whether all ``layers`` of a block are held."""
        return self.store.leading(model, (link,), layers, codec) == 1

    async def read(self, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """See ``Vault``."""
        found = [self.store.get(key) for key in keys]
        missing = [i for i, data in enumerate(found) if data is None and self.store.has(keys[i])]
        if missing:
            wanted = [keys[i] for i in missing]
            async with self._reading:
                data = await self._offload(lambda: self.store.read(wanted))
            for i, each in zip(missing, data, strict=True):
                found[i] = each
        else:
            await trio.lowlevel.checkpoint()
        return found

    async def write(self, blocks: Sequence[Sealed]) -> None:
        """See ``Vault``."""
        for count, block in enumerate(blocks, 1):
            self.put(block)
            if not count % 64:
                await trio.lowlevel.checkpoint()
        self.wake()

    def put(self, block: Sealed) -> bool:
        """Keep a block if there is room; safe in any thread."""
        try:
            kept = self.store.put(
                block.key, block.data, block.seconds, parent=block.parent, number=block.index
            )
        except PyAgentError as error:
            log.warning("a KV block could not be kept: %s", error)
            return False
        self.changes += kept
        return kept

    def wake(self) -> None:
        """Have what is new written to the disk soon."""
        self._wake.set()

    def stats(self) -> StoreStats:
        """Return counts and sizes."""
        return self.store.stats()

    async def clear(self) -> int:
        """Give up everything; returns how many blocks.  Raises as the store does."""
        count = await self._offload(self.store.clear)
        self.changes += 1
        return count

    async def drop_model(self, model: Digest) -> int:
        """Give up every block of a model.  Raises as the store does."""
        count = await self._offload(lambda: self.store.drop_model(model))
        self.changes += count
        return count

    async def run(self) -> None:
        """Take the disk into use and write to it what is new, for ever."""
        try:
            await self._offload(self.store.open)
            self.changes += 1
            while True:
                self._wake = trio.Event()
                while await self._offload(self.store.write_back):
                    pass
                # What the disk did not take is offered again, though nothing new may come.
                again = RETRY_SECONDS if self.store.stats().pending else math.inf
                with trio.move_on_after(again):
                    await self._wake.wait()
                await trio.sleep(PAUSE_SECONDS)
        finally:
            with trio.CancelScope(shield=True):
                await self._offload(self._close)

    def _close(self) -> None:
        end = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < end and self.store.write_back():
            pass
        try:
            self.store.close()
        except PyAgentError as error:
            log.warning("the store of KV blocks was not closed well: %s", error)
