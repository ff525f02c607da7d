"""What this node measures of itself for the planner: memory, and two short benchmarks.

The benchmarks say what a runner's threads can do on a machine that is otherwise idle: the best of
many short runs counts, so that other work (daemons on the same machine measure at the same time)
disturbs them little.  They are single-threaded NumPy operations, run once for each thread that a
runner would use: the linear algebra library's own threads wait for each other by spinning, and
measure ten times too little as soon as one of them has to wait for the processor.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.limits import MIB
from pyagent_node.base.types import ACTIVATIONS, Digest, PeerId, Slice
from pyagent_node.inference import backends
from pyagent_node.inference.backend_names import BackendState
from pyagent_node.inference.llama.memory import available_memory
from pyagent_node.inference.machine import DeviceMemory, Power
from pyagent_node.inference.pipeline.plan_types import (
    NodeFacts,
)
from pyagent_node.inference.power import share_of
from pyagent_node.inference.threads import default_threads
from pyagent_node.node.speeds import SpeedBook

BUFFER_BYTES: Final = 64 * MIB
"""Memory that all threads together read in one run: larger than most caches."""
SIDE: Final = 64
"""Side of the matrices multiplied in one run: small enough for one thread."""
PRODUCTS: Final = 100
"""Products in one run."""
MEASURE_SECONDS: Final = 0.12
"""Time given to each of the two measurements."""


class Speed(NamedTuple):
    """Bytes read a second, and floating-point operations a second, with all threads."""

    bandwidth: float
    compute: float


def best_time(work: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Return the shortest of the runs of ``work`` that fit into ``seconds`` (two at least)."""
    shortest = float("inf")
    end = clock() + seconds
    runs = 0
    while runs < 2 or clock() < end:
        start = clock()
        work()
        shortest = min(shortest, clock() - start)
        runs += 1
    return max(shortest, 1e-9)


def _read(part: NDArray[np.int32]) -> float:
    return part.nbytes / best_time(part.max, MEASURE_SECONDS, time.perf_counter)


def _multiply() -> float:
    square = np.ones((SIDE, SIDE), dtype=np.float32)
    out = np.empty_like(square)

    def run() -> None:
        for _ in range(PRODUCTS):
            np.matmul(square, square, out=out)

    return PRODUCTS * 2 * SIDE**3 / best_time(run, MEASURE_SECONDS, time.perf_counter)


async def measure_speed(threads: int) -> Speed:
    """Measure this machine with so many threads, in about a quarter of a second."""
    buffer = np.zeros(BUFFER_BYTES // 4, dtype=np.int32)
    buffer += 1  # memory that was never written is one page of zeros
    parts = np.array_split(buffer, threads)
    totals = [0.0, 0.0]

    async def measure(index: int, work: Callable[[], float]) -> None:
        totals[index] += await trio.to_thread.run_sync(work)

    async with trio.open_nursery() as nursery:
        for part in parts:
            nursery.start_soon(measure, 0, lambda part=part: _read(part))
    async with trio.open_nursery() as nursery:
        for _ in range(threads):
            nursery.start_soon(measure, 1, _multiply)
    return Speed(*totals)


class FactsProvider:
    """This node's facts; the speed is measured once, when it is first asked for.

    ``held`` tells which slices of a model lie here already, ``speeds`` what slices were measured to
    do.  ``power`` and ``memories`` look at the machine; ``on_battery`` is the setting.
    """

    def __init__(
        self,
        peer_id: PeerId,
        name: str,
        held: Callable[[Digest], tuple[Slice, ...]],
        *,
        threads: int | None = None,
        measure: Callable[[int], Awaitable[Speed]] = measure_speed,
        memory: Callable[[], int] = available_memory,
        speeds: SpeedBook | None = None,
        power: Callable[[], Power] = Power,
        memories: Callable[[tuple[BackendState, ...]], tuple[DeviceMemory, ...]] = lambda _: (),
        on_battery: str = "less",
    ) -> None:
        self._peer_id = peer_id
        self._name = name
        self._held = held
        self._threads = threads or default_threads()
        self._measure = measure
        self._memory = memory
        self._speeds = speeds
        self._power = power
        self._memories = memories
        self._on_battery = on_battery
        self._speed: Speed | None = None
        self._backends: tuple[BackendState, ...] = ()
        self._measuring = trio.Lock()

    async def facts(self, model: Digest) -> NodeFacts:
        """Return the facts as of now."""
        async with self._measuring:
            if self._speed is None:
                self._speed = await self._measure(self._threads)
                self._backends = await trio.to_thread.run_sync(backends.survey)
        if self._speeds is not None:
            await self._speeds.tidy()
        power = await trio.to_thread.run_sync(self._power)
        return NodeFacts(
            peer_id=self._peer_id,
            name=self._name,
            memory_bytes=await trio.to_thread.run_sync(self._memory),
            threads=self._threads,
            bandwidth=self._speed.bandwidth,
            compute=self._speed.compute,
            held=await trio.to_thread.run_sync(self._held, model),
            backends=self._backends,
            activations=ACTIVATIONS,
            speeds=self._speeds.speeds(model, self._threads) if self._speeds is not None else (),
            memories=await trio.to_thread.run_sync(self._memories, self._backends),
            power=power,
            share=share_of(power, self._on_battery),
        )
