"""Sessions that change their head: nothing of an answer is lost, doubled or changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import Conflict, NotFound, PyAgentError
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import ClaimSession, SetMeshSetting
from pyagent_node.inference.generation import Generated
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.journal_messages import (
    PROTOCOL,
    TO_HEAD,
    TO_HOLDER,
    Begin,
    Declined,
    End,
    FetchJournal,
    JournalCopy,
    chain_of,
    encode_token,
    extend,
    pack,
    public_id,
    signed_bytes,
)
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.sessions import (
    N_LAYERS,
    SessionNode,
    SessionWorld,
    open_session_world,
    session_id,
    wall,
)

PROMPT = [72, 101, 108, 108, 111]
S = session_id(1)


def reference(n: int, seed: int = 7) -> list[int]:
    return toy_generate(N_LAYERS, PROMPT, n, SamplingParams(seed=seed))


@asynccontextmanager
async def placed(nodes: int = 6) -> AsyncIterator[SessionWorld]:
    async with open_session_world(nodes) as world:
        await world.place((3, 7), nodes=(0, 1, 2))
        yield world


class Client:
    """Reads an answer at one node until it is told to stop, or the node stops it."""

    def __init__(self, node: SessionNode, session: SessionId = S) -> None:
        self.node = node
        self.session = session
        self.tokens: list[int] = []
        self.error: PyAgentError | None = None
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        self._grown = trio.Event()

    async def seen(self, n: int) -> list[int]:
        while len(self.tokens) < n and not self.ended.is_set():
            self._grown = trio.Event()
            await self._grown.wait()
        return list(self.tokens)

    async def ask(self, world: SessionWorld, n: int, *, resume_seconds: float = 0.0) -> None:
        request = world.request(self.session, PROMPT, n)
        await self._follow(self.node.live.generate(request, resume_seconds=resume_seconds))

    async def attach(self, after: int) -> None:
        await self._follow(self.node.live.attach(self.session, after))

    async def _follow(self, opening) -> None:
        try:
            with self.scope:
                async with opening as reader:
                    async for event in reader:
                        if isinstance(event, Generated):
                            self.tokens.append(event.token)
                            self._grown.set()
        except PyAgentError as error:
            self.error = error
        finally:
            self.ended.set()
            self._grown.set()


def checkpoint(world: SessionWorld):
    return world.nodes[0].consensus.state.checkpoints.get(public_id(S))


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


# ---- those who do not keep to the rules ------------------------------------------------------


async def test_only_who_claimed_a_session_gets_its_journal(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 100)
        await client.seen(30)
        holder = min(world.holders(public_id(S)))
        with pytest.raises(PyAgentError) as caught:
            await world.nodes[5].rpc.call(world.nodes[holder].peer_id, FetchJournal(S), JournalCopy)
        assert caught.value.code == "not_claimed"
        # knowing the log is not enough either: a copy is asked for by the id itself
        with pytest.raises(PyAgentError) as caught:
            await world.nodes[3].rpc.call(
                world.nodes[holder].peer_id, FetchJournal(public_id(S)), JournalCopy
            )
        assert caught.value.code == "not_claimed"


def forge(node: SessionNode, change: str) -> None:
    """Change the copy that a node keeps."""
    copy = node.book.get(public_id(S), trio.current_time())
    assert copy is not None
    match change:
        case "token":
            copy.pieces[5] = encode_token(Sampled(3))
        case "longer":
            copy.pieces.append(encode_token(Sampled(3)))
        case "header":
            copy.pieces[0] = copy.pieces[0].replace(b"toy", b"joy") + b""
            copy.pieces[0] = copy.pieces[0][:-1] + bytes([copy.pieces[0][-1] ^ 1])
        case "signed by itself":
            copy.head = node.peer_id
            copy.pieces[5] = encode_token(Sampled(3))
            chain = chain_of(copy.pieces[0])
            for piece in copy.pieces[1:]:
                chain = extend(chain, piece)
            data = signed_bytes(public_id(S), copy.claim, copy.tokens, chain)
            copy.signature = NodeKey(node.number.to_bytes(32, "big")).sign(data)
        case "claim":
            copy.claim = 2**63
        case "empty":
            copy.pieces.clear()
        case "short":
            del copy.pieces[20:]


@pytest.mark.parametrize(
    "change", ["token", "longer", "header", "signed by itself", "claim", "empty", "short"]
)
async def test_a_holder_that_lies_is_not_believed(
    change: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(60)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        holders = sorted(world.holders(public_id(S)))
        forge(world.nodes[holders[0]], change)
        other = next(n for n in world.nodes if n.number not in {3, *holders})
        assert await other.resume(S, 30) == whole[30:]
        assert other.recovery.bad_copies == 1


async def test_when_every_holder_lies_nothing_is_made_up(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        world.crash(3)
        for holder in world.holders(public_id(S)):
            forge(world.nodes[holder], "token")
        with pytest.raises(PyAgentError) as caught:
            await world.nodes[5].resume(S, 30)
        assert caught.value.code in ("bad_journal", "journal_unavailable")


async def test_a_stranger_cannot_replace_or_end_a_copy(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 100)
        await client.seen(30)
        holder = world.nodes[min(world.holders(public_id(S)))]
        before = holder.book.get(public_id(S), 0.0)
        assert before is not None
        liar = next(n for n in world.nodes if n.number not in {3, holder.number})
        stream = await liar.mesh.open(holder.peer_id, PROTOCOL)
        header = before.pieces[0]
        for claim in (0, 1, 2, 99):
            message = Begin(public_id(S), claim, b"x" * 64)
            await stream.send(Frame(TO_HOLDER.encode(message), pack([header])))
            answer = await stream.receive()
            assert answer is not None
            assert isinstance(TO_HEAD.decode(answer.header), Declined)
        await stream.send(Frame(TO_HOLDER.encode(End(public_id(S)))))
        await client.seen(40)
        assert holder.book.get(public_id(S), 0.0) is before
        assert before.head == world.nodes[3].peer_id


@pytest.mark.parametrize(
    "tail",
    [b"", b"\xc1", pack([]), pack([b"junk"]), pack([b""] * 1000), msgspec.msgpack.encode("x")],
)
async def test_malformed_journals_are_declined(tail: bytes, autojump_clock: MockClock) -> None:
    async with open_session_world(2) as world:
        liar, holder = world.nodes
        stream = await liar.mesh.open(holder.peer_id, PROTOCOL)
        for session in (public_id(S), SessionId("nonsense"), SessionId("")):
            await stream.send(Frame(TO_HOLDER.encode(Begin(session, 1, b"")), tail))
            answer = await stream.receive()
            assert answer is not None
            declined = TO_HEAD.decode(answer.header)
            assert isinstance(declined, Declined)
            assert declined.error.code == "bad_journal"
        assert holder.book.size == 0
        await stream.send(Frame(b"\xc1garbage"))
        assert await ended(stream)


async def ended(stream: FrameStream) -> bool:
    try:
        return await stream.receive() is None
    except PyAgentError:
        return True


async def test_a_holder_cannot_stop_a_session_with_a_word(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A holder says that the session was claimed; the log says no such thing."""
    whole = reference(80)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 80)
        await client.seen(30)
        keeper = world.nodes[3].keeper
        for holder in world.holders(public_id(S)):
            lie = Conflict("It is mine.", code="session_claimed")
            keeper.lost(PeerId(world.nodes[holder].peer_id), public_id(S), lie)
        await client.ended.wait()
        assert client.error is None
        assert client.tokens == whole
