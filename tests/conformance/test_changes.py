"""Voters that come and go, leaderships handed over, followers that were away for long."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.consensus.commands import ModelRecord, RegisterModel

from .clients import Clients
from .cluster import REGISTER, Cluster, Machine, Opener, cluster, retried, simulate, write


def voters(made: Cluster) -> set[int]:
    """Return the numbers of the machines that vote, as every machine that runs sees it."""
    numbers = {machine.peer_id: machine.number for machine in made.machines}
    (seen,) = {frozenset(machine.running.status().voters) for machine in made.up()}
    return {numbers[peer] for peer in seen}


async def everyone_writes(made: Cluster, clients: Clients) -> None:
    for machine in made.up():
        await retried(partial(clients.surely_write, machine), 30)
        await retried(partial(clients.surely_read, machine), 30)


def test_one_voter_at_a_time_up_to_seven_and_down_to_one(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            await made.form(1)
            for count in range(2, 8):
                await made.start(made.add())
                await made.reconfigure(made.machines)
                await everyone_writes(made, clients)
                await made.settled()
                assert voters(made) == set(range(count))
            for count in range(6, 0, -1):
                await made.reconfigure(made.machines[-count:], made.machines[:-count])
                await everyone_writes(made, clients)
                await made.settled()
                assert voters(made) == set(range(7 - count, 7))
            assert await made.leader() is made.machines[6]
            clients.check()

    simulate(program)


def test_every_voter_is_replaced_at_once_while_in_use(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            old = list(await made.form(3))
            new = [await made.start(made.add()) for _ in range(3)]
            over = False

            async def use(machine: Machine) -> None:
                while not over:
                    await clients.write(machine)
                    await clients.swap(machine, machine)
                    await clients.read(machine)
                    await trio.sleep(0.05)

            async with trio.open_nursery() as nursery:
                for machine in (old[0], old[1], new[0]):
                    nursery.start_soon(use, machine)
                await trio.sleep(1)
                await made.reconfigure(new, old)
                await trio.sleep(1)
                over = True
            await made.settled()
            assert voters(made) == {3, 4, 5}
            for machine in old:
                await made.kill(machine, power=True)
            await everyone_writes(made, clients)
            clients.check()
            assert len(clients.acknowledged) > 20

    simulate(program)


def test_learners_follow_but_do_not_count(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            first = await made.start(made.add())
            learners = [await made.start(made.add()) for _ in range(3)]
            await made.leader()
            await made.reconfigure([first], learners)
            await everyone_writes(made, clients)
            await made.settled()
            for learner in learners:
                status = learner.running.status()
                assert status.role == "learner"
                assert status.learners
                assert status.voters == (first.peer_id,)
                await made.kill(learner)
            assert await clients.write(first)
            assert await clients.read(first)
            for learner in learners:
                await made.start(learner)
            await made.settled()
            await made.kill(first)
            await trio.sleep(30)
            assert all(learner.running.status().role == "learner" for learner in learners)
            with pytest.raises(PyAgentError):
                await learners[0].running.propose(write(10))
            await made.start(first)
            await made.settled()
            clients.check()

    simulate(program)


def test_a_node_that_is_given_up_is_no_longer_sent_the_log(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            machines = await made.form(4)
            leader = await made.leader()
            gone = next(machine for machine in machines if machine is not leader)
            rest = [machine for machine in machines if machine is not gone]
            await made.reconfigure(rest)
            await trio.sleep(5)
            at = gone.running.state.index
            term = max(machine.running.status().term for machine in rest)
            leader = await made.leader(rest)
            for value in range(20, 30):
                await leader.running.propose(write(value))
            await trio.sleep(60)
            assert gone.running.state.index <= at + 1
            assert gone.running.status().role != "leader"
            assert max(m.running.status().term for m in rest) == term, "it disturbs nobody"
            await made.reconfigure(machines)
            await made.settled()
            assert gone.running.state.settings[REGISTER] == 29

    simulate(program)


def test_the_leader_is_removed_and_another_leads(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            machines = await made.form(3)
            leader = await made.leader()
            rest = [machine for machine in machines if machine is not leader]
            await made.reconfigure(rest, [leader])
            await made.propose(write(20))
            assert (await made.leader(rest)) in rest
            await made.settled()
            assert leader.running.status().role == "learner"

    simulate(program)


def test_a_change_that_the_leader_does_not_survive(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine, compact_entries=20) as made:
            clients = Clients(made)
            machines = list(await made.form(3))
            machines += [await made.start(made.add()) for _ in range(2)]
            for point in range(10):
                wanted = machines[:5] if point % 2 else machines[:3]
                leader = await made.leader()
                async with trio.open_nursery() as nursery:

                    async def change(leader: Machine, wanted: list[Machine]) -> None:
                        with trio.move_on_after(1):
                            with contextlib.suppress(PyAgentError):
                                await leader.running.reconfigure(
                                    frozenset(m.peer_id for m in wanted),
                                    frozenset(m.peer_id for m in machines if m not in wanted),
                                )

                    nursery.start_soon(change, leader, wanted)
                    leader.disk.power_for = point
                    await trio.sleep(0.5)
                leader.disk.power_for = float("inf")
                if leader.engine is None:
                    await made.start(leader)
                await made.reconfigure(wanted, [m for m in machines if m not in wanted])
                await everyone_writes(made, clients)
            await made.settled()
            clients.check()

    simulate(program)


def test_the_leadership_is_handed_over_from_any_node(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            machines = await made.form(3)
            for asked in machines:
                for heir in machines:
                    await retried(partial(asked.running.transfer, heir.peer_id), 30)
                    assert await made.leader() is heir
                    await retried(partial(clients.surely_write, asked), 30)
            clients.check()

    simulate(program)


def test_a_handover_to_a_node_that_is_down_leaves_a_leader(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            machines = await made.form(3)
            leader = await made.leader()
            down = next(machine for machine in machines if machine is not leader)
            await made.kill(down)
            with pytest.raises(PyAgentError) as caught:
                await leader.running.transfer(down.peer_id)
            assert caught.value.code
            await made.propose(write(20))
            await made.start(down)
            await made.settled()

    simulate(program)


def model(n: int) -> RegisterModel:
    digest = Digest(f"{n:064x}")
    return RegisterModel(
        ModelRecord(digest, f"m{n}", 1, "llama", 1, 1, 1, 1, Digest("0" * 64), created=0)
    )


@pytest.mark.parametrize("newcomer", [False, True])
def test_who_is_far_behind_gets_a_snapshot(engine: Opener, newcomer: bool) -> None:
    async def program() -> None:
        async with cluster(engine, compact_entries=50) as made:
            machines = list(await made.form(3))
            behind = machines[2]
            await made.kill(behind)
            async with trio.open_nursery() as nursery:
                for number in range(600):  # a snapshot of more than a frame's header
                    nursery.start_soon(made.propose, model(number))
                    if number % 50 == 0:
                        await trio.sleep(0.5)
            await made.settled()
            leader = await made.leader()
            await leader.running.compact()
            if newcomer:
                machines.append(await made.start(made.add()))
                await made.reconfigure([*machines[:2], machines[3]])
                behind = machines[3]
            else:
                await made.start(behind)
            await made.settled()
            assert len(behind.running.state.models) == 600
            index = await behind.running.compact()
            assert behind.running.chain_at(index) == leader.running.chain_at(index)
            await made.restart(behind, power=True)
            await made.settled()
            assert len(behind.running.state.models) == 600

    simulate(program)
