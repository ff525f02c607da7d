"""Measures the simulator, and the swarm in it, at growing numbers of nodes.

Each size forms a swarm (every node joins), places the model, lives quietly for a while, and then
goes through faults drawn from a seed; the invariants are looked at as always.  What nodes send is
counted by purpose and by phase.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Final

import msgspec
import psutil
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.simulations.deterministic import HASH_SEED
from pyagent_node.simulations.faults import Schedule, draw_schedule
from pyagent_node.simulations.mesh import Meter as FrameMeter
from pyagent_node.simulations.run import Found, Run
from pyagent_node.simulations.swarm import FORM_SECONDS, Swarm
from pyagent_node.simulations.traffic import Meter, Period

QUIET_SECONDS: Final = 10.0
"""Virtual time without faults, in which people ask."""
FAULT_SECONDS: Final = 20.0
POLL_SECONDS: Final = 0.1
PHASES: Final = ("join", "quiet", "faults")


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What a swarm of ``nodes`` nodes cost; seconds of the processor are this process's own.

    ``join_seconds`` are virtual: from the first start until every node has the log and the model
    is placed.  ``memory_bytes`` is what the process takes in the end.
    """

    nodes: int
    seed: int
    virtual_seconds: float
    wall_seconds: float
    cpu_seconds: float
    join_seconds: float
    memory_bytes: int
    faults: int
    requests: int
    periods: tuple[Period, ...]
    violations: tuple[Found, ...]
    trace_digest: str


class _Both:
    """Shows each frame to two meters."""

    def __init__(self, one: FrameMeter | None, other: FrameMeter) -> None:
        self._one = one
        self._other = other

    def frame(self, sender: PeerId, receiver: PeerId, protocol: str, frame: Frame) -> None:
        """See ``simulations.mesh.Meter``."""
        if self._one is not None:
            self._one.frame(sender, receiver, protocol, frame)
        self._other.frame(sender, receiver, protocol, frame)


class ScaleRun(Run):
    """A run whose traffic is counted, with a quiet time before the faults."""

    def __init__(self, seed: int, schedule: Schedule) -> None:
        super().__init__(seed, schedule)
        self.meter = Meter(trio.current_time)
        self.join_seconds = 0.0
        self.periods: tuple[Period, ...] = ()

    async def _phases(self, swarm: Swarm) -> None:
        swarm.network.meter = _Both(swarm.network.meter, self.meter)
        self.meter.begin("join", self.schedule.nodes)
        await super()._phases(swarm)
        self.periods = self.meter.periods(len(swarm.machines))

    async def _form(self, swarm: Swarm) -> None:
        nodes = self.schedule.nodes
        began = trio.current_time()
        await super()._form(swarm)
        with trio.move_on_after(FORM_SECONDS) as patience:
            while not _settled(swarm):  # noqa: ASYNC110 - many nodes change it
                await trio.sleep(POLL_SECONDS)
        if patience.cancelled_caught:
            swarm.violation("forming", "not every node has the whole log")
        self.join_seconds = trio.current_time() - began
        self.meter.begin("quiet", nodes)
        with trio.move_on_after(QUIET_SECONDS):
            await self._ask(swarm)
        self.meter.begin("faults", nodes)


def _settled(swarm: Swarm) -> bool:
    indices = {m.parts.consensus.state.index for m in swarm.machines if m.parts is not None}
    return len(indices) == 1


def measure(nodes: int, *, seed: int, duration: float) -> Size:
    """Run one size in this process; ``duration`` virtual seconds of faults."""
    schedule = draw_schedule(seed, nodes=nodes, duration=duration)
    run = ScaleRun(seed, schedule)
    began = time.process_time()
    outcome = run.play()
    return Size(
        nodes=nodes,
        seed=seed,
        virtual_seconds=outcome.virtual_seconds,
        wall_seconds=outcome.wall_seconds,
        cpu_seconds=round(time.process_time() - began, 3),
        join_seconds=round(run.join_seconds, 3),
        memory_bytes=psutil.Process().memory_info().rss,
        faults=outcome.faults,
        requests=outcome.requests,
        periods=run.periods,
        violations=outcome.violations,
        trace_digest=outcome.trace_digest,
    )


def measure_apart(nodes: int, *, seed: int, duration: float) -> Size:
    """Run one size in a process of its own, whose hashes of strings are those of every other.

    Raises :class:`PyAgentError`: ``simulation_failed`` when the process fails,
    ``simulation_broken`` when the run ends before its last phase.
    """
    done = subprocess.run(
        [sys.executable, "-m", __spec__.name, str(nodes), str(seed), str(duration)],
        env={**os.environ, "PYTHONHASHSEED": HASH_SEED},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise PyAgentError(
            f"The simulation of {nodes} nodes ended with status {done.returncode}: {last[:200]}",
            code="simulation_failed",
            remedy="There may be too little memory: try fewer nodes.",
        )
    size = msgspec.json.decode(done.stdout, type=Size)
    if [period.phase for period in size.periods] != list(PHASES):
        found = size.violations[0] if size.violations else None
        raise PyAgentError(
            f"The simulation of {nodes} nodes ended too early:"
            f" {f'{found.invariant}: {found.detail}' if found else 'without a reason'}",
            code="simulation_broken",
            remedy=f"See it with 'pyagent-node simulate --nodes {nodes} --seed {seed}'.",
        )
    return size


def main() -> None:
    """Measure what the command line says and print it as JSON: nodes, seed, duration."""
    nodes, seed, duration = sys.argv[1:]
    size = measure(int(nodes), seed=int(seed), duration=float(duration))
    sys.stdout.buffer.write(msgspec.json.encode(size))


if __name__ == "__main__":
    main()
