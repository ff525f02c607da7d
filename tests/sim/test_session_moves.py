"""Sessions that are given to another head while they are read: their readers notice nothing."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import Conflict, NotFound, PyAgentError, Refused
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.generation import Generated
from pyagent_node.node.journal_messages import public_id
from pyagent_node.node.session_moves import (
    MAX_MOVED,
    PROTOCOL,
    TO_FORMER_HEAD,
    TO_NEW_HEAD,
    Broken,
    Read,
    Successor,
    Taken,
    TakeOver,
    Token,
    ask,
)
from pyagent_node.simulations.sessions import SessionNode, session_id
from tests.sim.session_kit import Client, S, checkpoint, placed, reference


async def give(node: SessionNode, to: SessionNode) -> int:
    async def give_away(session: str, seconds: float) -> Successor:
        return await ask(node.mesh, to.peer_id, S, seconds)

    return await node.live.move(S, give_away)


@pytest.mark.parametrize("moment", [15, 40, 90])
async def test_the_reader_of_a_moved_session_notices_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery, moment: int
) -> None:
    whole = reference(120)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(moment)
        await give(world.nodes[3], world.nodes[4])
        assert world.nodes[4].live.taken_over == 1
        known = checkpoint(world)
        assert known is not None
        assert known.head == world.nodes[4].peer_id
        await client.ended.wait()
        assert client.error is None
        assert client.tokens == whole
        await trio.sleep(40)
        assert [len(node.live) for node in world.nodes] == [0] * 6
        assert all(node.pipeline.stages.sessions() == [] for node in world.nodes)


async def test_a_session_moves_again_and_back(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 200)
        await client.seen(20)
        await give(world.nodes[3], world.nodes[4])
        await client.seen(60)
        await give(world.nodes[4], world.nodes[5])
        await client.ended.wait()
        assert client.error is None
        assert client.tokens == reference(200)


async def test_a_session_is_taken_back_when_its_new_head_dies(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 150)
        await client.seen(20)
        await give(world.nodes[3], world.nodes[4])
        await client.seen(60)
        world.crash(4)
        await client.ended.wait()
        assert client.error is None
        assert client.tokens == reference(150)


async def test_the_client_may_come_to_the_new_head_when_the_former_one_dies(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(150)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 150)
        await client.seen(20)
        await give(world.nodes[3], world.nodes[4])
        await client.seen(60)
        world.crash(3)
        assert await world.nodes[4].resume(S, 60) == whole[60:]


async def test_a_client_that_hangs_up_ends_the_session_on_its_new_head_too(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 500)
        await client.seen(20)
        await give(world.nodes[3], world.nodes[4])
        await client.seen(40)
        client.scope.cancel()
        await client.ended.wait()
        await trio.sleep(10)
        assert [len(node.live) for node in world.nodes] == [0] * 6


async def test_what_cannot_be_moved_goes_on_where_it_is(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(3)  # too young for the mesh to know it
        with pytest.raises(Refused) as refused:
            await give(world.nodes[3], world.nodes[4])
        assert refused.value.code == "not_its_head"
        await client.seen(20)
        world.crash(5)
        with pytest.raises(PyAgentError) as away:
            await give(world.nodes[3], world.nodes[5])
        assert away.value.code == "peer_unreachable"
        with pytest.raises(NotFound) as unknown:
            await world.nodes[4].live.move(S, lambda _s, _t: pytest.fail("never asked"))
        assert unknown.value.code == "session_not_here"
        await client.ended.wait()
        assert client.error is None
        assert client.tokens == reference(120)


async def test_two_moves_at_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(20)
        refusals: list[str] = []

        async def move(to: int) -> None:
            try:
                await give(world.nodes[3], world.nodes[to])
            except Conflict as error:
                refusals.append(error.code)

        async with trio.open_nursery() as both:
            both.start_soon(move, 4)
            both.start_soon(move, 5)
        assert refusals == ["session_moving"]
        await client.ended.wait()
        assert client.tokens == reference(120)


async def test_only_a_sessions_head_gives_it_away(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(20)
        thief, target = world.nodes[5], world.nodes[4]
        for session in (S, session_id(9)):
            with pytest.raises(Refused) as refused:
                await ask(thief.mesh, target.peer_id, session, 0.0)
            assert refused.value.code == "not_its_head"
        stream = await thief.mesh.open(target.peer_id, PROTOCOL)
        await stream.send(Frame(TO_NEW_HEAD.encode(Read(0))))
        frame = await stream.receive()
        assert frame is not None
        answer = TO_FORMER_HEAD.decode(frame.header)
        assert isinstance(answer, Broken)
        assert answer.error.code == "bad_order"
        assert target.moved.refused == {"not_its_head": 2, "bad_order": 1}
        known = checkpoint(world)
        assert known is not None
        assert known.head == world.nodes[3].peer_id
        await client.ended.wait()
        assert client.tokens == reference(120)


async def test_a_head_that_says_nothing_more_is_not_waited_for(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 2000)
        await client.seen(20)
        target = world.nodes[4]
        streams = []
        for seconds in (-1.0, 1e9, float("nan")):
            stream = await world.nodes[3].mesh.open(target.peer_id, PROTOCOL)
            await stream.send(Frame(TO_NEW_HEAD.encode(TakeOver(S, seconds))))
            frame = await stream.receive()
            assert frame is not None
            answer = TO_FORMER_HEAD.decode(frame.header)
            assert isinstance(answer, Broken)
            assert answer.error.code == "bad_parameter"
        for _ in range(MAX_MOVED + 1):
            streams.append(await world.nodes[3].mesh.open(target.peer_id, PROTOCOL))
        last = await streams[-1].receive()
        assert last is not None
        full = TO_FORMER_HEAD.decode(last.header)
        assert isinstance(full, Broken)
        assert full.error.code == "too_many_sessions"
        await trio.sleep(31)
        first = await streams[0].receive()
        assert first is not None
        idle = TO_FORMER_HEAD.decode(first.header)
        assert isinstance(idle, Broken)
        assert idle.error.code == "session_idle"
        assert public_id(S) in world.nodes[0].consensus.state.checkpoints
        client.scope.cancel()


class _Canned:
    """A stream on which a new head says these things, and then nothing more."""

    def __init__(self, *said: bytes) -> None:
        self.peer = PeerId("someone")
        self._said = list(said)

    async def send(self, frame: Frame) -> None:
        assert TO_NEW_HEAD.decode(frame.header) == Read(3)

    def try_send(self, frame: Frame) -> bool:
        return False

    async def receive(self) -> Frame | None:
        return Frame(self._said.pop(0)) if self._said else None

    async def aclose(self) -> None:
        return


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ((), "bad_session_event"),
        ((TO_FORMER_HEAD.encode(Taken(3)),), "bad_session_event"),
        ((TO_FORMER_HEAD.encode(Token(Generated(1, "a", b"a"))),), "bad_session_event"),
        ((b"\x93nonsense",), "malformed_message"),
        ((TO_NEW_HEAD.encode(Read(1)),), "unknown_message"),
    ],
)
async def test_a_new_head_that_talks_nonsense_is_named(said: tuple[bytes, ...], code: str) -> None:
    with pytest.raises(PyAgentError) as caught:
        async for _ in Successor(_Canned(*said), 3).events(3):
            pass
    assert caught.value.code == code
