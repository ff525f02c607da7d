"""Carries a schedule of faults out on a simulated swarm, and mends everything in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.simulations.evil import misbehave
from pyagent_node.simulations.fault_kinds import (
    Blackout,
    ChurnLeaders,
    ClockDrift,
    ClockJump,
    Crash,
    Draft,
    Drain,
    Evil,
    Fault,
    Flap,
    FullDisk,
    HitLeader,
    Jitter,
    Join,
    KillRunner,
    Leave,
    LowMemory,
    MoveLeader,
    OneWay,
    Partition,
    Pause,
    Replace,
    Reshard,
    Revoke,
    SlowDisk,
    SlowLink,
    SlowRunner,
)
from pyagent_node.simulations.faults import Schedule
from pyagent_node.simulations.losses import corrupt, may_lose_log
from pyagent_node.simulations.machine import Machine
from pyagent_node.simulations.operator import Operator
from pyagent_node.simulations.swarm import LATENCY, Swarm

TORN_AFTER: Final = 3
"""Disk operations that a machine whose power goes in the middle of one still does, at most."""
RESTART_SECONDS: Final = 0.5
SLOW_DISK_SECONDS: Final = 0.3
"""What a disk operation takes on a leader that is hit."""


class Injector:
    """Strikes the machines of ``swarm``; several faults may hold the same thing at once."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._network = swarm.network
        self._operator = Operator(swarm)
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
        self._network.lateness.clear()
        for machine in swarm.machines:
            machine.disk.room = math.inf
            machine.disk.delay = 0.0
            machine.disk.power_for = math.inf
            machine.skew, machine.drifts = 0.0, []
            machine.set_slowness(1.0)
            machine.set_starved(False)
        for machine in swarm.machines:
            await self._restart(machine)
        await self._operator.undrain()

    async def keep_running(self) -> None:
        """Start again what failed by itself, as a service manager does."""
        while True:
            await trio.sleep(RESTART_SECONDS)
            for machine in self._swarm.machines:
                if machine.over.is_set() and not machine.holds:
                    await self._restart(machine)

    async def _restart(self, machine: Machine) -> None:
        if machine.over.is_set() and not machine.gone:
            await self._swarm.start(machine)

    async def _strike(self, fault: Fault) -> None:
        match fault:
            case Crash():
                await self._crash(fault)
            case Blackout():
                await self._blackout(fault)
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
            case Jitter():
                await self._jitter(fault)
            case KillRunner():
                self._machine(fault.node).kill_runners()
            case SlowRunner() | SlowDisk() | FullDisk() | LowMemory() | ClockDrift():
                await self._hamper(fault)
            case ClockJump():
                self._machine(fault.node).skew += fault.by
            case HitLeader():
                await self._hit_leader(fault)
            case MoveLeader() | ChurnLeaders() | Replace() | Reshard() | Draft() | Drain():
                await self._operator.do(fault)
            case Join() | Leave() | Revoke():
                await self._operator.do(fault)
            case Evil():
                machine = self._machine(fault.node)
                with trio.move_on_after(fault.seconds):
                    await misbehave(self._swarm, machine, fault.how)

    def _machine(self, number: int) -> Machine:
        return self._swarm.machines[number]

    # ---- nodes -----------------------------------------------------------------------------

    async def _crash(self, fault: Crash) -> None:
        machine = self._machine(fault.node)
        if not machine.up:
            return
        machine.holds += 1
        if fault.disk == "torn":
            machine.disk.power_for = self._swarm.rng.randrange(TORN_AFTER)
            with trio.move_on_after(1.0):
                await machine.over.wait()
        loses = fault.disk in ("erased", "corrupt")
        if loses and not may_lose_log(self._swarm, machine):
            self._swarm.trace.add(machine.number, "spared", "too many logs are lost already")
            loses = False
        machine.lost_log = machine.lost_log or loses
        self._swarm.kill(machine)
        await machine.over.wait()
        if loses and fault.disk == "corrupt":
            await self._start_corrupted(machine)
        if loses:
            machine.disk.erase()
            machine.slices.clear()
        await trio.sleep(fault.seconds)
        machine.holds -= 1
        if not machine.holds:
            await self._restart(machine)

    async def _start_corrupted(self, machine: Machine) -> None:
        """Change a bit on a machine's disk; its node must not start and say which file it is."""
        name = corrupt(machine.disk, self._swarm.rng)
        if name is None or machine.gone:
            return
        self._swarm.trace.add(machine.number, "corrupt", name)
        await self._swarm.start(machine)
        told = [e for e in machine.failures if e.code == "log_corrupt" and name in e.message]
        if machine.up or not told:
            codes = [error.code for error in machine.failures]
            self._swarm.violation(
                "corruption", f"node {machine.number} began with a damaged {name}: {codes}"
            )
        self._swarm.kill(machine)
        await machine.over.wait()

    async def _blackout(self, fault: Blackout) -> None:
        struck = [self._machine(number) for number in fault.nodes]
        for machine in struck:
            machine.holds += 1
            self._swarm.kill(machine)
        await trio.sleep(fault.seconds)
        async with trio.open_nursery() as nursery:
            for machine in struck:
                machine.holds -= 1
                if not machine.holds:
                    nursery.start_soon(self._restart, machine)

    async def _hit_leader(self, fault: HitLeader) -> None:
        leader = self._swarm.leader()
        if leader is None:
            return
        at, seconds, number = fault.at, fault.seconds, leader.number
        self._swarm.trace.add(number, "hit", fault.blow)
        match fault.blow:
            case "crash":
                await self._strike(Crash(at, number, seconds))
            case "pause":
                await self._strike(Pause(at, seconds, number))
            case "cut":
                await self._strike(Partition(at, seconds, (number,)))
            case "slow_disk":
                await self._strike(SlowDisk(at, seconds, number, SLOW_DISK_SECONDS))
            case "full_disk":
                await self._strike(FullDisk(at, seconds, number))

    async def _hamper(
        self, fault: SlowRunner | SlowDisk | FullDisk | LowMemory | ClockDrift
    ) -> None:
        machine = self._machine(fault.node)
        drift = (trio.current_time(), 0.0)
        match fault:
            case SlowRunner():
                machine.set_slowness(fault.factor)
            case SlowDisk():
                machine.disk.delay = fault.delay
            case FullDisk():
                machine.disk.room = 0
            case LowMemory():
                machine.set_starved(True, kill=fault.kill)
            case ClockDrift():
                drift = (trio.current_time(), fault.rate)
                machine.drifts.append(drift)
        await trio.sleep(fault.seconds)
        match fault:
            case SlowRunner():
                machine.set_slowness(1.0)
            case SlowDisk():
                machine.disk.delay = 0.0
            case FullDisk():
                machine.disk.room = math.inf
            case LowMemory():
                machine.set_starved(False)
            case ClockDrift():
                machine.drifts.remove(drift)
                machine.skew += (trio.current_time() - drift[0]) * fault.rate

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

    async def _jitter(self, fault: Jitter) -> None:
        peer, rng = self._machine(fault.node).peer_id, self._swarm.rng
        self._network.lateness[peer] = lambda: rng.uniform(0.0, fault.most)
        await trio.sleep(fault.seconds)
        self._network.lateness.pop(peer, None)
