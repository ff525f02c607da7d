"""What operators do with sessions: see them, move them by name, write them out, read them in."""

from __future__ import annotations

import base64
import contextlib
import json

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from pyagent_node.base.types import Digest, SessionId
from pyagent_node.consensus.commands import AdmitMember, RemovePlacement
from pyagent_node.node.api.session_schema import MoveRequest
from pyagent_node.node.live_sessions import MAX_UNREAD
from pyagent_node.node.session_admin import SessionAdmin, read_file
from pyagent_node.simulations.sessions import MODEL, SessionNode, session_id
from tests.sim.session_kit import Client, S, placed, reference


def admin(node: SessionNode) -> SessionAdmin:
    return SessionAdmin(
        node.mesh, node.consensus, node.pipeline.engine, node.live, node.keeper.holder
    )


async def test_each_node_lists_what_it_may_know(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 500)
        await client.seen(40)
        (head,) = (await admin(world.nodes[3]).list()).sessions
        assert (head.session, head.part, head.completion_tokens >= 40) == (S, "head", True)
        assert len(head.holders) == 2
        other = (await admin(world.nodes[5]).list()).sessions
        assert [(row.session, row.part, row.public) for row in other] == [
            (None, "away", head.public)
        ]
        served = (await admin(world.nodes[0]).list()).sessions
        assert "rank" in {row.part for row in served}
        assert all(row.session is None for row in served)
        client.scope.cancel()


async def test_moving_by_name(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(30)
        for number in (3, 4):
            member = AdmitMember(world.nodes[number].peer_id, f"n{number}", "voter", b"cert")
            await world.nodes[0].consensus.propose(member)
        await world.nodes[3].consensus.read_barrier()
        here = admin(world.nodes[3])
        moved = await here.move(MoveRequest(session=S, to="n4"))
        assert (moved.peer_id, moved.name) == (world.nodes[4].peer_id, "n4")
        assert moved.tokens >= 30
        with pytest.raises(Conflict) as same:
            await here.move(MoveRequest(session=S, to=world.nodes[3].peer_id))
        assert same.value.code == "session_here"
        with pytest.raises(NotFound) as none_such:
            await here.move(MoveRequest(session=SessionId("0" * 32), to=world.nodes[3].peer_id))
        assert none_such.value.code == "session_not_here"
        with pytest.raises(NotFound) as nobody:
            await here.move(MoveRequest(session=S, to="nobody"))
        assert nobody.value.code == "member_not_found"
        await client.ended.wait()
        assert client.tokens == reference(120)


async def test_a_session_that_was_written_out_goes_on_elsewhere(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    whole = reference(120)
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 120)
        await client.seen(50)
        data = json.dumps(await admin(world.nodes[3]).write_out(S)).encode()
        copy = await admin(world.nodes[5]).read_in(data)
        again = await admin(world.nodes[5]).read_in(data)  # twice: two sessions
        assert len({S, copy.session, again.session}) == 3
        assert copy.completion_tokens >= 50
        for reply in (copy, again):
            assert await world.nodes[5].resume(reply.session, 0) == whole
        await client.ended.wait()
        assert client.tokens == whole
        with pytest.raises(NotFound) as unknown:
            await admin(world.nodes[4]).write_out(session_id(77))
        assert unknown.value.code == "session_not_here"


async def test_what_nobody_reads_is_forgotten(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        data = json.dumps(await admin(world.nodes[3]).write_out(S)).encode()
        there = admin(world.nodes[5])
        reply = await there.read_in(data)
        await trio.sleep(reply.seconds + 10)
        assert len(world.nodes[5].live) == 0
        for _ in range(MAX_UNREAD):
            await there.read_in(data)
        with pytest.raises(LimitExceeded) as full:
            await there.read_in(data)
        assert full.value.code == "too_many_unread"


async def test_files_that_were_changed_are_refused(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    async with placed() as world:
        client = Client(world.nodes[3])
        nursery.start_soon(client.ask, world, 60)
        await client.seen(30)
        file = await admin(world.nodes[3]).write_out(S)
        there = admin(world.nodes[5])
        journal = bytearray(base64.b64decode(file["journal"]))
        journal[len(journal) // 2] ^= 1
        changed = (
            {**file, "journal": base64.b64encode(journal).decode()},
            {**file, "claim": 7},
            {**file, "session": "0" * 32},
            {**file, "signer": world.nodes[0].peer_id},
            {**file, "signer": "nobody"},
            {**file, "signature": ""},
        )
        for each in changed:
            with pytest.raises(CorruptData):
                await there.read_in(json.dumps(each).encode())
        for bad in (b"", b"[]", b"\xff", json.dumps({**file, "form": "x"}).encode()):
            with pytest.raises(InvalidRequest) as caught:
                await there.read_in(bad)
            assert caught.value.code == "bad_session_file"
        with pytest.raises(InvalidRequest):
            await there.read_in(json.dumps({**file, "journal": "!"}).encode())
        assert len(world.nodes[5].live) == 0
        client.scope.cancel()
        await client.ended.wait()
        await world.nodes[0].consensus.propose(RemovePlacement(MODEL, 1))
        await world.nodes[5].consensus.read_barrier()
        with pytest.raises(Unavailable) as gone:
            await there.read_in(json.dumps(file).encode())
        assert gone.value.code == "model_not_placed"


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_by_name(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        read_file(data)


def test_a_row_needs_no_more_than_plain_values() -> None:
    request = MoveRequest(session=SessionId("0" * 32), to=Digest("b"))
    assert msgspec.json.decode(msgspec.json.encode(request), type=MoveRequest) == request
