"""Sessions that change their head: nothing of an answer is lost, doubled or changed."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import NotFound, PyAgentError, Unavailable
from pyagent_node.consensus.commands import (
    AdmitMember,
    ClaimSession,
    RemoveMember,
    RevokeMember,
    SetMeshSetting,
)
from pyagent_node.node.journal_messages import public_id
from pyagent_node.simulations.sessions import session_id, wall
from tests.sim.session_kit import Client, S, checkpoint, placed, reference


async def test_any_node_goes_on_where_a_dead_head_stopped(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(100)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 100)
        assert await client.seen(40) == whole[:40]
        manifest = checkpoint(world)
        assert manifest is not None
        assert manifest.head == manifest.signer == world.nodes[3].peer_id
        holders = {world.number(p) for p in manifest.holders}
        assert len(holders) == 2
        assert world.holders(public_id(S)) == holders
        world.crash(3)
        stranger = next(n for n in world.nodes if n.number not in {3, *holders})
        assert await stranger.resume(S, 40) == whole[40:]
        await trio.sleep(36)
        assert checkpoint(world) is None
        assert world.holders(public_id(S)) == set()
        with pytest.raises(NotFound) as caught:
            await stranger.resume(S, 40)
        assert caught.value.code == "session_not_found"


async def test_a_holder_goes_on_from_its_own_copy(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(80)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 80)
        await client.seen(30)
        holders = world.holders(public_id(S))
        world.crash(3)
        holder = world.nodes[min(holders)]
        assert await holder.resume(S, 0) == whole


async def test_heads_die_one_after_the_other(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(200)
    async with placed(8) as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 200)
        got = await client.seen(25)
        for number in (4, 5, 6):
            world.crash(client.node.number)
            client = Client(world.nodes[number])
            nursery.start_soon(client.attach, len(got))
            got += await client.seen(25)
            assert got == whole[: len(got)]
            manifest = checkpoint(world)
            assert manifest is not None
        assert manifest.claim == 4
        world.crash(6)
        assert got + await world.nodes[7].resume(S, len(got)) == whole


async def test_a_head_that_dies_right_after_its_claim_leaves_the_copies_good(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        got = await client.seen(30)
        world.crash(3)
        second = world.nodes[4]
        claim = ClaimSession(public_id(S), second.peer_id, 1, int(wall()))
        await second.consensus.propose(claim)
        world.crash(4)
        assert got + await world.nodes[5].resume(S, 30) == whole


async def test_a_head_that_lives_stops_when_another_takes_over(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(120)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        got = await client.seen(30)
        assert await world.nodes[5].resume(S, 30) == whole[30:]
        await client.ended.wait()
        assert client.error is not None
        assert client.error.code == "session_claimed"
        assert client.error.facts["head"] == world.nodes[5].peer_id
        assert client.tokens == whole[: len(client.tokens)]
        assert len(got) <= len(client.tokens) < 120


async def test_a_head_cut_off_is_fenced_when_it_comes_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(400)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 400)
        got = await client.seen(30)
        world.network.isolate(world.nodes[3].peer_id)
        other = Client(world.nodes[5])
        nursery.start_soon(other.attach, len(got))
        await other.seen(10)
        assert not client.ended.is_set()
        world.network.rejoin(world.nodes[3].peer_id)
        await client.ended.wait()
        assert client.error is not None
        assert client.error.code == "session_claimed"
        await other.ended.wait()
        assert other.error is None
        assert got + other.tokens == whole
        assert client.tokens == whole[: len(client.tokens)]


async def test_two_at_once_on_two_nodes(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        rivals = [Client(world.nodes[4]), Client(world.nodes[5])]
        for rival in rivals:
            nursery.start_soon(rival.attach, 30)
        for rival in rivals:
            await rival.ended.wait()
        winners = [r for r in rivals if r.error is None]
        losers = [r for r in rivals if r.error is not None]
        assert len(winners) == len(losers) == 1
        assert winners[0].tokens == whole[30:]
        assert losers[0].error is not None
        assert losers[0].error.code == "session_claimed"


async def test_two_at_once_on_one_node(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        rivals = [Client(world.nodes[4]), Client(world.nodes[4])]
        for rival in rivals:
            nursery.start_soon(rival.attach, 30)
        for rival in rivals:
            await rival.ended.wait()
        assert sorted(r.error.code if r.error else "" for r in rivals) == [
            "",
            "session_read_elsewhere",
        ]
        winner = next(r for r in rivals if r.error is None)
        assert winner.tokens == whole[30:]
        assert world.nodes[4].live.taken_over == 1


async def test_unknown_short_and_expired_sessions(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        with pytest.raises(NotFound):
            await world.nodes[4].resume(session_id(99), 0)
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 1)
        await client.ended.wait()
        await trio.sleep(1)
        assert checkpoint(world) is None
        assert all(node.book.size == 0 for node in world.nodes)
        await world.nodes[0].consensus.propose(SetMeshSetting("session_ttl", 10))
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 400)
        await client.seen(30)
        world.crash(3)
        await trio.sleep(10)
        assert checkpoint(world) is not None, "ten seconds are promised"
        await trio.sleep(20)
        with pytest.raises(NotFound) as caught:
            await world.nodes[4].resume(S, 30)
        assert caught.value.code == "session_not_found"
        assert world.holders(public_id(S)) == set()


async def test_a_session_of_which_no_copy_is_left_is_told_to_be_lost(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """After a power cut of everything a client must be told to ask anew, not to try again."""
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        for holder in world.holders(public_id(S)):
            world.nodes[holder].book.drop(public_id(S))
        with pytest.raises(Unavailable) as unavailable:
            await world.nodes[5].resume(S, 30)
        assert unavailable.value.code == "journal_unavailable", "its head may still come back"
        await world.add(3)
        with pytest.raises(NotFound) as caught:
            await world.nodes[5].resume(S, 30)
        assert caught.value.code == "session_not_found"
        assert checkpoint(world) is None


async def test_who_left_the_mesh_is_not_waited_for(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        holders = world.holders(public_id(S))
        propose = world.nodes[0].consensus.propose
        for number in (3, *sorted(holders)):
            name = f"n{number}"
            await propose(AdmitMember(world.nodes[number].peer_id, name, "voter", b"certificate"))
        world.crash(3)
        world.nodes[0].book.drop(public_id(S))
        for number in holders - {0}:
            world.network.isolate(world.nodes[number].peer_id)
            await propose(RemoveMember(world.nodes[number].peer_id, int(wall())))
        await propose(RevokeMember(world.nodes[3].peer_id, "stolen"))
        other = next(n for n in world.nodes[1:] if n.number not in {3, *holders})
        with pytest.raises(NotFound) as caught:
            await other.resume(S, 30)
        assert caught.value.code == "session_not_found"


async def test_a_lost_holder_is_replaced(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    whole = reference(200)
    async with placed(8) as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 200)
        await client.seen(20)
        lost: set[int] = set()
        for seen in (60, 100):
            free = sorted(world.holders(public_id(S)) - {0, 1, 2})
            if free:
                world.crash(free[0])
                lost.add(free[0])
            await client.seen(seen)
            manifest = checkpoint(world)
            assert manifest is not None
            holders = {world.number(p) for p in manifest.holders}
            assert len(holders) == 2
            assert not holders & lost
        world.crash(3)
        last = next(n for n in (7, 6, 5, 4) if n not in lost)
        assert await world.nodes[last].resume(S, 0) == whole


async def test_a_client_comes_back_to_a_living_head(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(100)
    async with placed() as world:
        node = world.nodes[3]
        client = Client(node)
        nursery.start_soon(lambda: client.ask(world, 100, resume_seconds=30.0))
        got = await client.seen(20)
        client.scope.cancel()
        await trio.sleep(2)
        assert await node.resume(S, len(got)) == whole[len(got) :]
        manifest = checkpoint(world)
        assert manifest is not None
        assert manifest.claim == 1
        await trio.sleep(31)
        assert len(node.live) == 0
        # one that nobody comes back for ends
        client = Client(node, session_id(2))
        nursery.start_soon(lambda: client.ask(world, 2000, resume_seconds=3.0))
        await client.seen(20)
        client.scope.cancel()
        await trio.sleep(2.5)
        assert len(node.pipeline.engine.sessions()) == 1
        await trio.sleep(1)
        assert node.pipeline.engine.sessions() == []
        await trio.sleep(1)
        assert checkpoint(world) is None
        # and one that was not asked to wait ends at once
        client = Client(node, session_id(3))
        nursery.start_soon(client.ask, world, 100)
        await client.seen(20)
        client.scope.cancel()
        await client.ended.wait()
        assert node.pipeline.engine.sessions() == []


async def test_a_finished_answer_waits_for_its_reader(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(40)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(lambda: client.ask(world, 40, resume_seconds=100.0))
        await client.seen(20)
        client.scope.cancel()
        await trio.sleep(30)
        assert world.nodes[3].pipeline.engine.sessions() == []
        world.crash(3)
        assert await world.nodes[4].resume(S, 20) == whole[20:]


async def test_a_node_that_stops_leaves_its_sessions_to_others(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(100)
    async with placed() as world:
        head = world.nodes[3]
        client = Client(head)
        nursery.start_soon(client.ask, world, 100)
        got = await client.seen(30)
        head.keeper.stop()
        client.scope.cancel()
        await client.ended.wait()
        await trio.sleep(5)
        head.scope.cancel()
        assert checkpoint(world) is not None
        assert got + await world.nodes[5].resume(S, 30) == whole


async def test_one_that_saw_more_than_was_saved(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        assert await world.nodes[4].resume(S, 45) == whole[45:]


@pytest.mark.parametrize("after", [61, 10**6])
async def test_from_beyond_the_end(
    after: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        with pytest.raises(PyAgentError) as caught:
            await world.nodes[4].resume(S, after)
        assert caught.value.code == "beyond_end"
        assert await world.nodes[4].resume(S, 60) == []
        assert await world.nodes[5].resume(S, 0) == whole


async def test_copies_that_nobody_needs_are_forgotten(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed(8) as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 1000)
        got = await client.seen(30)
        first = world.holders(public_id(S))
        world.crash(3)
        outsider = next(n for n in world.nodes if n.number not in {0, 1, 2, 3, *first})
        second = Client(outsider)
        nursery.start_soon(second.attach, len(got))
        await second.seen(30)
        assert world.holders(public_id(S)) == first, "the same nodes keep it for the new head"
        # a holder that is cut off meanwhile keeps an old copy, until it hears that there are others
        away = world.nodes[max(first)]
        world.network.isolate(away.peer_id)
        await second.seen(120)
        assert public_id(S) in dict(away.book.left())
        second.scope.cancel()
        await second.ended.wait()
        await trio.sleep(40)
        assert checkpoint(world) is None
        world.network.rejoin(away.peer_id)
        await trio.sleep(80)
        assert world.holders(public_id(S)) == set()
