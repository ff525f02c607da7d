"""The KV service of a simulated node: the node's own, in memory, without threads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, TypeVar

import trio

from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.kv_service import KvService, open_kv
from pyagent_node.node.kv_vault import KvVault
from pyagent_node.sharding.block_store import BlockStore

T = TypeVar("T")

MEMORY_BYTES: Final = 16 * MIB
STREAM_BYTES_PER_SECOND: Final = 256 * MIB


async def at_once(work: Callable[[], T], /) -> T:
    """Run ``work`` here, as if a thread had done it."""
    await trio.lowlevel.checkpoint()
    return work()


def open_simulated_kv(
    mesh: Mesh,
    consensus: Consensus,
    *,
    memory_bytes: int = MEMORY_BYTES,
    stream_bytes: int = STREAM_BYTES_PER_SECOND,
) -> AbstractAsyncContextManager[KvService]:
    """Keep KV blocks for a simulated node while the context lasts.

    What a real node leaves to a thread is done at once: threads know nothing of simulated time.
    """
    store = BlockStore(memory_bytes=memory_bytes, clock=trio.current_time)
    return open_kv(
        mesh,
        consensus,
        KvVault(store, at_once),
        stream_bytes_per_second=stream_bytes,
        offload=at_once,
    )
