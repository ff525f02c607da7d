"""Carries a schedule of faults out on a simulated swarm, and mends everything in the end."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.consensus.commands import SetDraining
from pyagent_node.simulations.evil import misbehave
from pyagent_node.simulations.faults import (
    ClockJump,
    Crash,
    Drain,
    Evil,
    Fault,
    Flap,
    FullDisk,
    Join,
    KillRunner,
    MoveLeader,
    OneWay,
    Partition,
    Pause,
    Replace,
    Schedule,
    SlowDisk,
    SlowLink,
    SlowRunner,
)
from pyagent_node.simulations.machine import Machine
from pyagent_node.simulations.swarm import LATENCY, Swarm

TORN_AFTER: Final = 3
"""Disk operations that a machine whose power goes in the middle of one still does, at most."""
OPERATOR_SECONDS: Final = 5.0
"""How long an operator waits for what was asked."""
RESTART_SECONDS: Final = 0.5


class Injector:
    """Strikes the machines of ``swarm``; several faults may hold the same thing at once."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._network = swarm.network
        self._cuts: dict[tuple[int, int], int] = {}
        self._holds: dict[tuple[int, int], int] = {}

    async def run(self, schedule: Schedule) -> None:
        """Carry everything out; returns when the last fault is over."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for fault in schedule.faults:
                await trio.sleep_until(began + fault.at)
                self._swarm.trace.add(None, "fault", repr(fault))
                nursery.start_soon(self._strike, fault)
            await trio.sleep_until(began + schedule.duration)

    async def mend(self) -> None:
        """Undo what is left of every fault and start what is off."""
        swarm = self._swarm
        for pair in [pair for pair, count in self._cuts.items() if count]:
            self._cuts[pair] = 1
            self._mend_link(*pair)
        for pair in [pair for pair, count in self._holds.items() if count]:
            self._holds[pair] = 1
            self._release(*pair)
        for machine in swarm.machines:
            machine.disk.room = math.inf
            machine.disk.delay = 0.0
            machine.disk.power_for = math.inf
            machine.set_slowness(1.0)
        for machine in swarm.machines:
            await self._restart(machine)
            await swarm.propose(SetDraining(machine.peer_id, False), OPERATOR_SECONDS)

    async def keep_running(self) -> None:
        """Start again what failed by itself, as a service manager does."""
        while True:
            await trio.sleep(RESTART_SECONDS)
            for machine in self._swarm.machines:
                if not machine.up and machine.over.is_set() and not machine.held_down:
                    await self._restart(machine)

    async def _restart(self, machine: Machine) -> None:
        if not machine.up and machine.over.is_set():
            await self._swarm.start(machine)

    async def _strike(self, fault: Fault) -> None:
        match fault:
            case Crash():
                await self._crash(fault)
            case Partition():
                everyone = range(len(self._swarm.machines))
                pairs = [(a, b) for a in fault.left for b in everyone if b not in set(fault.left)]
                await self._during(fault.seconds, pairs, self._cut_link, self._mend_link)
            case OneWay():
                pairs = [(fault.source, fault.target)]
                await self._during(fault.seconds, pairs, self._hold, self._release)
            case Flap():
                for _ in range(fault.times):
                    half = fault.seconds / fault.times / 2
                    await self._during(half, [(fault.a, fault.b)], self._cut_link, self._mend_link)
                    await trio.sleep(half)
            case Pause():
                others = [n for n in range(len(self._swarm.machines)) if n != fault.node]
                pairs = [p for n in others for p in ((fault.node, n), (n, fault.node))]
                await self._during(fault.seconds, pairs, self._hold, self._release)
            case SlowLink():
                await self._slow_link(fault)
            case KillRunner():
                assets = self._machine(fault.node).assets
                for runner in list(assets.runners) if assets is not None else ():
                    runner.kill()
            case SlowRunner() | SlowDisk() | FullDisk():
                await self._hamper(fault)
            case ClockJump():
                self._machine(fault.node).skew += fault.by
            case MoveLeader() | Replace() | Drain() | Join():
                await self._operate(fault)
            case Evil():
                machine = self._machine(fault.node)
                if machine.parts is not None:
                    with trio.move_on_after(fault.seconds):
                        await misbehave(self._swarm, machine, fault.how)

    def _machine(self, number: int) -> Machine:
        return self._swarm.machines[number]

    # ---- nodes -----------------------------------------------------------------------------

    async def _crash(self, fault: Crash) -> None:
        machine = self._machine(fault.node)
        if not machine.up:
            return
        machine.held_down = True
        if fault.disk == "torn":
            machine.disk.power_for = self._swarm.rng.randrange(TORN_AFTER)
            with trio.move_on_after(1.0):
                await machine.over.wait()
        self._swarm.kill(machine)
        await machine.over.wait()
        if fault.disk == "erased":
            machine.disk.erase()
            machine.slices.clear()
        await trio.sleep(fault.seconds)
        machine.held_down = False
        await self._restart(machine)

    async def _hamper(self, fault: SlowRunner | SlowDisk | FullDisk) -> None:
        machine = self._machine(fault.node)
        match fault:
            case SlowRunner():
                machine.set_slowness(fault.factor)
            case SlowDisk():
                machine.disk.delay = fault.delay
            case FullDisk():
                machine.disk.room = 0
        await trio.sleep(fault.seconds)
        match fault:
            case SlowRunner():
                machine.set_slowness(1.0)
            case SlowDisk():
                machine.disk.delay = 0.0
            case FullDisk():
                machine.disk.room = math.inf

    # ---- links -----------------------------------------------------------------------------

    async def _during(
        self,
        seconds: float,
        pairs: list[tuple[int, int]],
        begin: Callable[[int, int], None],
        end: Callable[[int, int], None],
    ) -> None:
        for pair in pairs:
            begin(*pair)
        await trio.sleep(seconds)
        for pair in pairs:
            end(*pair)

    def _peers(self, a: int, b: int) -> tuple[Machine, Machine]:
        return self._machine(a), self._machine(b)

    def _cut_link(self, a: int, b: int) -> None:
        key = (min(a, b), max(a, b))
        self._cuts[key] = self._cuts.get(key, 0) + 1
        one, other = self._peers(a, b)
        self._network.cut(one.peer_id, other.peer_id)

    def _mend_link(self, a: int, b: int) -> None:
        key = (min(a, b), max(a, b))
        self._cuts[key] = max(0, self._cuts.get(key, 0) - 1)
        if not self._cuts[key]:
            one, other = self._peers(a, b)
            self._network.heal(one.peer_id, other.peer_id)

    def _hold(self, a: int, b: int) -> None:
        self._holds[a, b] = self._holds.get((a, b), 0) + 1
        one, other = self._peers(a, b)
        self._network.hold(one.peer_id, other.peer_id)

    def _release(self, a: int, b: int) -> None:
        self._holds[a, b] = max(0, self._holds.get((a, b), 0) - 1)
        if not self._holds[a, b]:
            one, other = self._peers(a, b)
            self._network.release(one.peer_id, other.peer_id)

    async def _slow_link(self, fault: SlowLink) -> None:
        """Slow the streams that are opened meanwhile: those that are open are broken off."""
        one, other = self._peers(fault.a, fault.b)
        self._network.set_latency(one.peer_id, other.peer_id, fault.latency)
        self._flick(fault.a, fault.b)
        await trio.sleep(fault.seconds)
        self._network.set_latency(one.peer_id, other.peer_id, LATENCY)
        self._flick(fault.a, fault.b)

    def _flick(self, a: int, b: int) -> None:
        self._cut_link(a, b)
        self._mend_link(a, b)

    # ---- operators -------------------------------------------------------------------------

    async def _operate(self, fault: MoveLeader | Replace | Drain | Join) -> None:
        swarm = self._swarm
        match fault:
            case MoveLeader():
                await self._guarded(lambda: self._transfer(fault.to))
            case Replace():
                await swarm.place(fault.boundaries, fault.nodes, OPERATOR_SECONDS)
            case Drain():
                node = self._machine(fault.node).peer_id
                await swarm.propose(SetDraining(node, True), OPERATOR_SECONDS)
                await trio.sleep(fault.seconds)
                await swarm.propose(SetDraining(node, False), OPERATOR_SECONDS)
            case Join():
                for _ in range(fault.count):
                    machine = swarm.add()
                    await swarm.start(machine)
                    await swarm.admit(machine)

    async def _transfer(self, to: int) -> None:
        leader = self._swarm.leader()
        if leader is not None and leader.parts is not None:
            await leader.parts.consensus.transfer(self._machine(to).peer_id)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        with trio.move_on_after(OPERATOR_SECONDS):
            try:
                await work()
            except PyAgentError as error:
                self._swarm.trace.add(None, "refused", error.code)
