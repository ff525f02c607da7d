"""What every engine does when nothing goes wrong, and what it refuses."""

from __future__ import annotations

import pytest
import trio

from pyagent_node.base.errors import (
    Conflict,
    InvalidRequest,
    PyAgentError,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import PeerId
from pyagent_node.consensus.commands import Command, SetMeshSetting
from pyagent_node.consensus.state import State, encode_snapshot

from .clients import Clients
from .cluster import REGISTER, Cluster, Machine, Opener, cluster, simulate, swap, write


def encoded(machine: Machine) -> bytes:
    state = machine.running.state
    assert isinstance(state, State)
    return encode_snapshot(state)


async def alike(made: Cluster) -> None:
    """Every node that runs comes to the same state, byte for byte."""
    await made.settled()
    assert len({encoded(machine) for machine in made.up()}) == 1


def test_one_node_founds_a_mesh_and_another_never_does(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            founder = await made.start(made.add())
            assert await made.leader() is founder
            applied = await founder.running.propose(write(100))
            assert founder.running.state.settings[REGISTER] == 100
            assert founder.running.state.index >= applied.index
            stranger = await made.start(made.add())
            await trio.sleep(30)
            status = stranger.running.status()
            assert status.role in ("follower", "learner", "candidate")
            assert stranger.peer_id not in status.voters
            assert founder.running.status().voters == (founder.peer_id,)

    simulate(program)


def test_every_node_proposes_and_all_apply_alike(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            clients = Clients(made)
            for _ in range(5):
                for machine in made.machines:
                    assert await clients.write(machine)
                    await clients.swap(machine, machine)
                    assert await clients.read(machine)
            await alike(made)
            clients.check()
            assert made.machines[0].running.state.bucket_epoch > 5

    simulate(program)


def test_many_proposals_at_once(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            clients = Clients(made)
            leader = await made.leader()
            syncs = leader.disk.syncs
            async with trio.open_nursery() as nursery:
                for machine in made.machines * 20:
                    nursery.start_soon(clients.write, machine)
                    nursery.start_soon(clients.swap, machine, machine)
            assert len(clients.acknowledged) == 60
            assert leader.disk.syncs - syncs < 60, "proposals that wait share a sync"
            await alike(made)
            for machine in made.machines:
                await clients.read(machine)
            clients.check()

    simulate(program)


def test_what_the_state_machine_refuses_comes_back_to_the_proposer(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            for machine in made.machines:
                with pytest.raises(Conflict) as caught:
                    await machine.running.propose(swap(77, machine.peer_id))
                assert caught.value.code == "stale_epoch"
            bad: list[Command] = [
                SetMeshSetting("no_such", 1),
                SetMeshSetting(REGISTER, -1),
                SetMeshSetting("x" * 100_000, 1),
                swap(-1, made.machines[0].peer_id),
                swap(0, PeerId("")),
            ]
            for machine in made.machines:
                before = machine.running.state.index
                for command in bad:
                    with pytest.raises(PyAgentError):
                        await machine.running.propose(command)
                assert machine.running.state.index <= before + 1, "checked before it is appended"
            await alike(made)

    simulate(program)


def test_who_may_not_propose_is_refused_by_the_leader(engine: Opener) -> None:
    refused: set[PeerId] = set()

    def authorise(command: Command, proposer: PeerId, role: str | None) -> None:
        if proposer in refused:
            raise Refused("Not you.", code="role_not_allowed")

    async def program() -> None:
        async with cluster(engine, authorise=authorise) as made:
            await made.form(3)
            leader = await made.leader()
            for machine in made.machines:
                refused.clear()
                refused.add(machine.peer_id)
                with pytest.raises(Refused) as caught:
                    await machine.running.propose(write(50 + machine.number))
                assert caught.value.code == "role_not_allowed"
                for other in made.machines:
                    if other is not machine:
                        await other.running.propose(write(60 + other.number))
            assert await made.leader() is leader

    simulate(program)


def test_followers_hear_of_every_entry_once_in_order(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            machine = made.machines[2]
            after = machine.running.state.index
            heard: list[int] = []
            async with machine.running.applied(after) as stream:
                for value in range(20, 30):
                    await made.machines[0].running.propose(write(value))
                async for applied in stream:
                    assert isinstance(applied.command, SetMeshSetting)
                    assert applied.command.value is not None
                    heard.append(applied.command.value)
                    if len(heard) == 10:
                        break
            assert heard == list(range(20, 30))

    simulate(program)


def test_a_mesh_without_a_majority_says_so_and_recovers(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            await made.form(3)
            await made.propose(write(100))
            await made.kill(made.machines[1])
            await made.kill(made.machines[2])
            alone = made.machines[0]
            await trio.sleep(10)
            with pytest.raises(PyAgentError) as caught:
                await alone.running.propose(write(200))
            assert isinstance(caught.value, Unavailable) or caught.value.code.endswith("timeout")
            assert caught.value.remedy
            with pytest.raises(PyAgentError):
                await alone.running.read_barrier()
            assert alone.running.state.settings[REGISTER] == 100
            assert alone.running.status().problem is not None
            assert alone.running.status().leader is None
            await made.start(made.machines[1])
            await made.propose(write(300))
            await made.start(made.machines[2])
            await alike(made)

    simulate(program)


def test_requests_for_changes_of_voters_that_make_no_sense(engine: Opener) -> None:
    async def program() -> None:
        async with cluster(engine) as made:
            machines = await made.form(3)
            leader = await made.leader()
            everyone = frozenset(machine.peer_id for machine in machines)
            with pytest.raises(InvalidRequest) as empty:
                await leader.running.reconfigure(frozenset(), everyone)
            assert empty.value.code == "bad_voters"
            follower = next(machine for machine in machines if machine is not leader)
            with pytest.raises(Refused) as elsewhere:
                await follower.running.reconfigure(everyone, frozenset())
            assert elsewhere.value.code == "not_leader"
            unknown = PeerId("12D3KooWnobody")
            with pytest.raises(Unavailable) as never:
                await leader.running.reconfigure(everyone | {unknown}, frozenset())
            assert never.value.code == "peer_unreachable"
            with pytest.raises(InvalidRequest) as stranger:
                await leader.running.transfer(unknown)
            assert stranger.value.code == "not_a_voter"
            assert set(leader.running.status().voters) == everyone
            await made.propose(write(100))

    simulate(program)
