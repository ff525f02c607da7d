"""Machines that stop at any moment, lose their disks, or have bad ones."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from pyagent_node.base.errors import PyAgentError

from .clients import Clients
from .cluster import REGISTER, Cluster, Machine, Opener, cluster, retried, simulate, swap, write

POINTS = 24
"""Disk operations after each of which a machine loses its power."""


async def busy(clients: Clients, machines: list[Machine], rounds: int = 3) -> None:
    """Let every machine that runs write, swap and read; what fails, fails."""

    async def use(machine: Machine) -> None:
        for _ in range(rounds):
            if machine.engine is not None:
                await clients.write(machine)
            if machine.engine is not None:
                await clients.swap(machine, machine)
            if machine.engine is not None:
                await clients.read(machine)

    async def until_over(machine: Machine) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    await machine.over.wait()
                    scope.cancel()

                nursery.start_soon(watch)
                await use(machine)
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for machine in machines:
            if machine.engine is not None:
                nursery.start_soon(until_over, machine)


async def agreed(made: Cluster, clients: Clients) -> None:
    """Bring everyone up; all must know all that was ever acknowledged."""
    for machine in made.machines:
        machine.disk.power_for = float("inf")
        if machine.engine is None:
            await made.start(machine)
    await made.settled()
    for machine in made.machines:
        await retried(partial(clients.surely_read, machine), 30)
    clients.check()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_restart_at_every_point_between_write_and_sync(engine: Opener, victim: str) -> None:
    async def program() -> None:
        async with cluster(engine, compact_entries=9) as made:
            await made.form(3)
            clients = Clients(made)
            lost = 0
            for point in range(POINTS):
                leader = await made.leader()
                others = [machine for machine in made.machines if machine is not leader]
                chosen = leader if victim == "leader" else others[point % 2]
                chosen.disk.power_for = point
                await busy(clients, made.machines)
                if chosen.engine is None:
                    lost += 1
                    chosen.disk.power_for = point % 7  # again, while the log is opened
                    await made.start(chosen)
                    await trio.sleep(1)
                chosen.disk.power_for = float("inf")
                if chosen.engine is None:
                    await made.start(chosen)
                await made.settled()
            assert lost > POINTS // 2
            assert len(clients.acknowledged) > POINTS
            await agreed(made, clients)

    simulate(program)


def test_all_machines_lose_their_power_at_once(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine, compact_entries=25) as made:
            await made.form(3)
            clients = Clients(made)
            for moment in (0.02, 0.05, 0.3):

                async def power_cut(moment: float) -> None:
                    await trio.sleep(moment)
                    for machine in made.machines:
                        await made.kill(machine, power=True)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(power_cut, moment)
                    await busy(clients, made.machines, rounds=20)
                for machine in made.machines:
                    await made.start(machine)
                await made.settled()
            await agreed(made, clients)
            assert clients.acknowledged

    simulate(program)


def test_a_node_that_forgot_everything_cannot_undo_what_it_agreed_to(engine: Opener) -> None:
    """0 and 1 commit without 2; then 1 loses its disk: 1 and 2 together must decide nothing."""

    async def program() -> None:
        async with cluster(engine) as made:
            zero, one, two = await made.form(3)
            made.network.isolate(two.peer_id)
            await made.propose(write(4242))
            await made.kill(zero)
            await made.kill(one)
            one.disk.erase()
            made.network.rejoin(two.peer_id)
            await made.start(one)
            await made.greet()
            await trio.sleep(30)
            for machine in (one, two):
                with pytest.raises(PyAgentError):
                    await machine.running.propose(write(1111))
                assert machine.running.status().role != "leader"
            await made.start(zero)
            await made.settled()
            assert two.running.state.settings[REGISTER] == 4242
            await made.reconfigure(made.machines)
            await made.kill(zero)
            await made.propose(write(2222))
            await made.settled()
            assert one.running.state.settings[REGISTER] == 2222

    simulate(program)


def test_a_failed_sync_ends_the_engine_and_nothing_is_acknowledged(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            clients = Clients(made)
            leader = await made.leader()
            leader.disk.failing_syncs = 1
            await busy(clients, [leader])
            await leader.over.wait()
            assert leader.failure is not None
            assert "disk_failed" in codes(leader.failure)
            await busy(clients, made.machines)
            await made.kill(leader, power=True)
            await agreed(made, clients)

    simulate(program)


def codes(error: BaseException) -> set[str]:
    if isinstance(error, BaseExceptionGroup):
        return set().union(*(codes(each) for each in error.exceptions))
    return {error.code} if isinstance(error, PyAgentError) else set()


@pytest.mark.parametrize("victim", ["leader", "follower"])
def test_a_full_disk_stops_nobody_else_and_heals(engine: Opener, victim: str) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            clients = Clients(made)
            leader = await made.leader()
            others = [machine for machine in made.machines if machine is not leader]
            full = leader if victim == "leader" else others[0]
            full.disk.room = 10
            if victim == "leader":
                with pytest.raises(PyAgentError) as caught:
                    await leader.running.propose(swap(0, leader.peer_id))
                assert caught.value.remedy
                clients.lost_swap(leader, 0)
            fine = [machine for machine in made.machines if machine is not full]

            await retried(partial(clients.surely_write, fine[0]), 60)
            await busy(clients, fine)
            full.disk.room = 1e9
            await agreed(made, clients)

    simulate(program)


def test_a_flipped_bit_stops_that_node_and_names_the_file(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            machines = await made.form(3)
            clients = Clients(made)
            await busy(clients, machines)
            leader = await made.leader()
            bad = next(machine for machine in machines if machine is not leader)
            await made.kill(bad)
            name = next(name for name in bad.disk.names() if name.endswith(".log"))
            bad.disk.flip(name, bad.disk.size(name) // 2, 3)
            await made.start(bad)
            assert bad.engine is None
            assert codes(bad.failure or AssertionError()) == {"log_corrupt"}
            assert name in str(error_of(bad.failure))
            await busy(clients, machines)
            bad.disk.erase()  # the remedy that the error names
            await made.start(bad)
            await made.reconfigure(machines)
            await agreed(made, clients)

    simulate(program)


def error_of(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def test_a_slow_disk_makes_things_slow(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            clients = Clients(made)
            (await made.leader()).disk.delay = 0.3
            await busy(clients, made.machines)
            assert len(clients.acknowledged) == 9
            await agreed(made, clients)

    simulate(program)


def test_the_suite_notices_a_disk_that_lies(engine: Opener) -> None:
    """A check of the checks: with syncs that keep nothing, a power cut must look wrong."""

    async def program() -> None:
        async with cluster(engine, 3) as made:
            await made.form(3)
            clients = Clients(made)
            for machine in made.machines:
                machine.disk.lying = True
            await busy(clients, made.machines)
            for machine in made.machines:
                await made.kill(machine, power=True)
            for machine in made.machines:
                machine.disk.lying = False
            await agreed(made, clients)

    with pytest.raises(BaseExceptionGroup) as caught:
        simulate(program)
    assert caught.group_contains(AssertionError, depth=None)
