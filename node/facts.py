"""What this node measures of itself for the planner: memory, and two short benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import trio

from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest, PeerId, Slice
from pyagent_node.inference.llama.memory import available_memory
from pyagent_node.inference.pipeline.plan_types import NodeFacts

VECTOR_BYTES: Final = 32 * MIB
"""Matrix read by the bandwidth measurement: larger than most caches."""
PRODUCT: Final = 512
"""Side of the matrices multiplied by the compute measurement."""
MEASURE_SECONDS: Final = 0.15
"""Time given to each of the two measurements."""


class Speed(NamedTuple):
    """Bytes read a second, and floating-point operations a second, with all threads."""

    bandwidth: float
    compute: float


def _best(work: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
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


def measure_speed(
    seconds: float = MEASURE_SECONDS, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Measure this machine; blocks for about twice ``seconds``.

    A matrix times a vector is bound by memory bandwidth and is what decoding mostly does; a product
    of matrices is bound by arithmetic, as prefill is.  Both use NumPy's own threads.
    """
    columns = 4096
    matrix = np.ones((VECTOR_BYTES // 4 // columns, columns), dtype=np.float32)
    vector = np.ones(columns, dtype=np.float32)
    bandwidth = matrix.nbytes / _best(lambda: matrix @ vector, seconds, clock)
    square = np.ones((PRODUCT, PRODUCT), dtype=np.float32)
    compute = 2 * PRODUCT**3 / _best(lambda: square @ square, seconds, clock)
    return Speed(bandwidth, compute)


class FactsProvider:
    """This node's facts; the speed is measured once, when it is first asked for.

    ``held`` tells which slices of a model lie here already.
    """

    def __init__(
        self,
        peer_id: PeerId,
        name: str,
        held: Callable[[Digest], tuple[Slice, ...]],
        *,
        threads: int | None = None,
        measure: Callable[[], Speed] = measure_speed,
        memory: Callable[[], int] = available_memory,
    ) -> None:
        self._peer_id = peer_id
        self._name = name
        self._held = held
        self._threads = threads or os.cpu_count() or 1
        self._measure = measure
        self._memory = memory
        self._speed: Speed | None = None
        self._measuring = trio.Lock()

    async def facts(self, model: Digest) -> NodeFacts:
        """Return the facts as of now."""
        async with self._measuring:
            if self._speed is None:
                self._speed = await trio.to_thread.run_sync(self._measure)
        return NodeFacts(
            peer_id=self._peer_id,
            name=self._name,
            memory_bytes=await trio.to_thread.run_sync(self._memory),
            threads=self._threads,
            bandwidth=self._speed.bandwidth,
            compute=self._speed.compute,
            held=await trio.to_thread.run_sync(self._held, model),
        )
