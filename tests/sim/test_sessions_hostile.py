"""Nodes that lie about sessions, or want those of others."""

from __future__ import annotations

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import Conflict, PyAgentError
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.sampling import Sampled
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
from pyagent_node.simulations.sessions import SessionNode, open_session_world
from tests.sim.session_kit import Client, S, placed, reference


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
