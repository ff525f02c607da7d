"""Operations that report how far they are, as a stream of NDJSON lines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec
import trio

from pyagent_node.node.api.exchange import Sender
from pyagent_node.node.api.schema import Line, Progress

Report = Callable[[Progress], None]
"""Takes a progress report; never blocks."""

NDJSON: Final = "application/x-ndjson"

T = TypeVar("T")


def nobody(_: Progress) -> None:
    """Take a report that nobody waits for."""


class _Latest:
    """Keeps the newest report of each step until the reader has time for it.

    A fast operation so never waits for a slow terminal, and memory stays bounded by the number of
    distinct steps.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Progress] = {}
        self._changed = trio.Event()
        self._ended = False

    def put(self, progress: Progress) -> None:
        self._waiting[progress.step] = progress
        self._changed.set()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    def take(self) -> list[Progress]:
        taken = list(self._waiting.values())
        self._waiting.clear()
        self._changed = trio.Event()
        return taken

    async def wait(self) -> bool:
        """Wait for reports; ``False`` when all were taken and no more will come."""
        if not self._ended:
            await self._changed.wait()
        return bool(self._waiting) or not self._ended


async def follow_work(work: Callable[[Report], Awaitable[T]], sender: Sender) -> None:
    """Run ``work`` and send what it reports, then its result."""
    latest = _Latest()
    results: list[T] = []

    async def run() -> None:
        results.append(await work(latest.put))
        latest.end()

    await sender.start(NDJSON)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        while await latest.wait():
            for progress in latest.take():
                await send_line(sender, Line[object](progress=progress))
    await send_line(sender, Line[object](done=results[0]))
    await sender.end()


async def send_line(sender: Sender, line: object) -> None:
    """Send one line of a stream."""
    await sender.write(msgspec.json.encode(line) + b"\n")
