"""The simulated swarm itself: machines that are switched on and off."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pyagent_node.simulations.swarm import open_swarm
from pyagent_node.simulations.trace import Trace


async def test_a_machine_that_two_switch_on_at_once_runs_once(autojump_clock: MockClock) -> None:
    trace = Trace(trio.current_time)
    async with open_swarm(1, trace) as swarm:
        machine = swarm.add()
        await swarm.start(machine)
        swarm.kill(machine)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.start, machine)
            nursery.start_soon(swarm.start, machine)
        assert machine.up
        assert machine.lives == 2
        assert [event.kind for event in trace.events].count("failed") == 0
