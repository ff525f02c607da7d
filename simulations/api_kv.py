"""The KV blocks of a simulated API: some of each sort, given up when that is asked for."""

from __future__ import annotations

from pyagent_node.node.api.kv_schema import (
    ClearedReply,
    KvView,
    LoadsView,
    StreamView,
    TierView,
)


class SimulatedKvServices:
    """Answers as a node with some blocks would; ``error`` refuses."""

    def __init__(self) -> None:
        self.cleared = 0
        self.error: Exception | None = None
        self.answer = KvView(
            tiers=(
                TierView("memory", "on", 2 << 20, 1 << 30, 40, 30),
                TierView("disk", "disk_full", 3 << 20, 4 << 30, 60, 10),
            ),
            misses=5,
            corrupt=1,
            evicted=2,
            kept=100,
            dropped=0,
            served_bytes=1 << 20,
            known_peers=2,
            loads=LoadsView(
                loads=4,
                blocks_wanted=40,
                blocks_local=20,
                blocks_remote=10,
                bytes_fetched=1 << 20,
                seconds=0.5,
                bad_blocks=1,
                distrusted=1,
            ),
            stream=StreamView(
                limit=32 << 20,
                sessions=2,
                targets=1,
                blocks_sent=9,
                bytes_sent=9 << 20,
                bytes_kept=5 << 20,
                failures=0,
            ),
        )

    async def view(self) -> KvView:
        """Return what was set."""
        if self.error is not None:
            raise self.error
        return self.answer

    async def clear(self) -> ClearedReply:
        """Count the call."""
        if self.error is not None:
            raise self.error
        self.cleared += 1
        return ClearedReply(100)
