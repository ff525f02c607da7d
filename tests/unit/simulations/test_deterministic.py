"""The same seed, the same run."""

from __future__ import annotations

import time

import trio

from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.trace import Trace


async def race() -> str:
    """Let ten tasks compete for one lock at equal times; return the digest of who got it when."""
    trace = Trace(trio.current_time)
    lock = trio.Lock()

    async def compete(number: int) -> None:
        for turn in range(20):
            await trio.sleep(1.0)
            async with lock:
                trace.add(number, "turn", str(turn))
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(compete, number)
    assert trace.count == 200
    return trace.digest


def test_a_seed_decides_the_order_of_everything() -> None:
    first = run_deterministic(race, 1)
    assert run_deterministic(race, 1) == first
    assert run_deterministic(race, 2) != first


def test_time_is_virtual() -> None:
    async def program() -> float:
        began = trio.current_time()
        await trio.sleep(86_400)
        return trio.current_time() - began

    began = time.monotonic()
    assert run_deterministic(program, 1) == 86_400
    assert time.monotonic() - began < 60


def test_the_digest_covers_what_is_no_longer_kept() -> None:
    a, b = Trace(lambda: 1.0), Trace(lambda: 1.0)
    a.add(1, "first")
    b.add(2, "first")
    for trace in (a, b):
        for number in range(30_000):
            trace.add(None, "more", str(number))
    assert list(a.events) == list(b.events)
    assert a.digest != b.digest
    assert str(a.events[-1]).split() == ["1.000", "s", "swarm", "more", "29999"]
