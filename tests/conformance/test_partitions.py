"""Networks that are cut, or that are silent in one direction only."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pytest
import trio

from pyagent_node.base.errors import PyAgentError

from .clients import Clients
from .cluster import (
    ELECTION_SECONDS,
    Cluster,
    Machine,
    Opener,
    cluster,
    retried,
    simulate,
)

Way = Literal["cut", "deaf", "mute", "silent"]
WAYS: tuple[Way, ...] = ("cut", "deaf", "mute", "silent")


def part(made: Cluster, one: Machine, way: Way) -> None:
    """Separate a machine from all others: openly, or without a word in some direction."""
    for other in made.machines:
        if other is one:
            continue
        if way == "cut":
            made.network.cut(one.peer_id, other.peer_id)
        if way in ("deaf", "silent"):
            made.network.hold(other.peer_id, one.peer_id)
        if way in ("mute", "silent"):
            made.network.hold(one.peer_id, other.peer_id)


def join(made: Cluster, one: Machine) -> None:
    """Undo it."""
    made.network.rejoin(one.peer_id)
    for other in made.machines:
        if other is not one:
            made.network.release(other.peer_id, one.peer_id)
            made.network.release(one.peer_id, other.peer_id)


@pytest.mark.parametrize("way", WAYS)
def test_the_rest_goes_on_without_the_leader_and_it_reads_nothing_old(
    engine: Opener, way: Way
) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            await made.form(3)
            old = await made.leader()
            rest = [machine for machine in made.machines if machine is not old]
            await clients.write(old)
            part(made, old, way)
            over = False

            async def insist() -> None:
                """Read on the old leader all the time: no answer, or the newest."""
                while not over:
                    with trio.move_on_after(3):
                        await clients.read(old)
                    await trio.sleep(0.02)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(insist)
                began = trio.current_time()
                for machine in rest:
                    await retried(partial(clients.surely_write, machine), 60)
                took = trio.current_time() - began
                for machine in rest * 3:
                    await retried(partial(clients.surely_write, machine), 60)
                    await retried(partial(clients.surely_read, machine), 60)
                over = True
            assert took < 10 * ELECTION_SECONDS
            join(made, old)
            await made.greet()
            await made.settled()
            for machine in made.machines:
                await retried(partial(clients.surely_read, machine), 30)
            clients.check()

    simulate(program)


@pytest.mark.parametrize("way", WAYS)
def test_a_follower_that_is_cut_off_disturbs_nobody_when_it_returns(
    engine: Opener, way: Way
) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            await made.form(3)
            leader = await made.leader()
            lost = next(machine for machine in made.machines if machine is not leader)
            term = leader.running.status().term
            part(made, lost, way)
            for _ in range(10):
                assert await clients.write(leader)
                await trio.sleep(2)
            with trio.fail_after(60), pytest.raises(PyAgentError):
                await lost.running.read_barrier()
            join(made, lost)
            await made.greet()
            await made.settled()
            await retried(partial(clients.surely_read, lost), 30)
            clients.check()
            if "raft-rs" in leader.running.status().engine:  # PreVote: no election was needed
                assert leader.running.status().term == term
                assert await made.leader() is leader

    simulate(program)


def test_halves_of_an_even_cluster(engine: Opener) -> None:
    """With two of four on either side nobody decides; when they meet again everything is whole."""

    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            a, b, c, d = await made.form(4)
            for one in (a, b):
                for other in (c, d):
                    made.network.cut(one.peer_id, other.peer_id)
            await trio.sleep(10)
            for machine in made.machines:
                assert not await clients.write(machine)
                assert not await clients.read(machine)
            for one in (a, b):
                for other in (c, d):
                    made.network.heal(one.peer_id, other.peer_id)
            await made.greet()
            await made.settled()
            for machine in made.machines:
                await retried(partial(clients.surely_write, machine), 30)
                await retried(partial(clients.surely_read, machine), 30)
            clients.check()

    simulate(program)


def test_a_link_that_comes_and_goes(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            clients = Clients(made)
            await made.form(3)
            for turn in range(20):
                leader = await made.leader()
                other = made.machines[turn % 3]
                if other is not leader:
                    made.network.cut(leader.peer_id, other.peer_id)
                await clients.write(made.machines[(turn + 1) % 3])
                await clients.read(other)
                if other is not leader:
                    made.network.heal(leader.peer_id, other.peer_id)
                    await made.greet()
            await made.settled()
            for machine in made.machines:
                await retried(partial(clients.surely_read, machine), 30)
            clients.check()
            assert len(clients.acknowledged) > 10

    simulate(program)
