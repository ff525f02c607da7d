"""The engine "single": ordering, durability, catching up, idempotency, hostile peers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Refused,
    Unavailable,
)
from pyagent_node.base.types import Digest, PeerId, Rank, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.commands import (
    AdmitMember,
    BurnTicket,
    ForgetModel,
    ModelRecord,
    RegisterModel,
    RevokeMember,
    SetPlacement,
)
from pyagent_node.consensus.log import FileLog, MemoryLog
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.consensus.single import SingleEngine, open_single
from pyagent_node.consensus.single_messages import (
    LOG_MESSAGES,
    PROTOCOL,
    Acknowledge,
    Answer,
    Follow,
    Propose,
    Stop,
    Welcome,
    entries_frame,
    frame,
)
from pyagent_node.consensus.state import encode_snapshot
from pyagent_node.node.identity import NodeKey

LEADER = NodeKey(hashlib.sha256(b"leader").digest()).peer_id
A = NodeKey(hashlib.sha256(b"a").digest()).peer_id
B = NodeKey(hashlib.sha256(b"b").digest()).peer_id


def model(n: int) -> RegisterModel:
    return RegisterModel(
        ModelRecord(
            digest=Digest(f"{n:064x}"),
            name=f"model-{n}",
            size=1000,
            architecture="llama",
            n_layers=4,
            n_embd=8,
            n_vocab=32,
            n_ctx_train=128,
            manifest=Digest("a" * 64),
            created=0,
        )
    )


@pytest.fixture
def engine(network):
    """A node that runs the engine for as long as the block lasts."""

    @asynccontextmanager
    async def run(place, store=None, **options) -> AsyncIterator[SingleEngine]:
        options.setdefault("role", place.role)
        rng = random.Random(1)
        async with (
            network.started(place) as mesh,
            open_single(mesh, store or MemoryLog(), leader=LEADER, rng=rng, **options) as it,
        ):
            yield it

    return run


def same(*engines: SingleEngine) -> bool:
    return len({encode_snapshot(e.state) for e in engines}) == 1


async def reach(engine: SingleEngine, index: int) -> None:
    await engine._journal.wait_for(index)


async def test_leader_alone(network, engine, autojump_clock):
    async with engine(network.node("leader", "voter")) as leader:
        applied = await leader.propose(model(1))
        assert applied == Applied(1, model(1))
        assert list(leader.state.models) == [model(1).model.digest]
        status = leader.status()
        assert (status.role, status.leader, status.index) == ("leader", LEADER, 1)
        await leader.read_barrier()


async def test_follower_follows_and_forwards(network, engine, autojump_clock):
    async with (
        engine(network.node("leader", "voter")) as leader,
        engine(network.node("a")) as a,
        engine(network.node("b", "voter")) as b,
    ):
        assert (await leader.propose(model(1))).index == 1
        assert (await a.propose(model(2))).index == 2
        assert a.state.index == 2
        await b.read_barrier()
        assert same(leader, a, b)
        assert a.status().role == "learner"
        assert b.status().role == "follower"
        assert a.status().leader == LEADER
        await trio.sleep(0.1)
        assert leader.followers == {A: 2, B: 2}


async def test_refusal_of_the_state_machine_reaches_the_proposer(network, engine, autojump_clock):
    async with engine(network.node("leader", "voter")) as leader, engine(network.node("a")) as a:
        for who in (leader, a):
            with pytest.raises(NotFound) as caught:
                await who.propose(ForgetModel(Digest("b" * 64)))
            assert caught.value.code == "model_not_found"
        assert leader.state.index == 0
        assert leader.counted.refused_proposals == 2


async def test_bad_commands_are_refused_before_they_are_appended(network, engine, autojump_clock):
    async with engine(network.node("leader", "voter")) as leader, engine(network.node("a")) as a:
        bad = SetPlacement(Digest("xyz"), (), 0, 0, -1)
        for who in (leader, a):
            with pytest.raises(InvalidRequest) as caught:
                await who.propose(bad)
            assert caught.value.code == "bad_command"
        huge = tuple(
            Rank(
                i,
                Slice(i, i + 1, False),
                PeerId("p" * 128),
                tuple(PeerId(f"{n}" + "q" * 127) for n in range(8)),
            )
            for i in range(256)
        )
        with pytest.raises(LimitExceeded) as too_large:
            await a.propose(SetPlacement(Digest("0" * 64), huge, 128, 1, 0))
        assert too_large.value.code == "command_too_large"
        assert leader.state.index == 0


@pytest.mark.parametrize(
    "command",
    [
        AdmitMember(PeerId("x"), "x", "learner", b"c"),
        BurnTicket("0" * 32, PeerId("x"), 10),
        RevokeMember(PeerId("x"), "because"),
    ],
)
async def test_membership_is_the_leaders_business(network, engine, autojump_clock, command):
    async with engine(network.node("leader", "voter")), engine(network.node("a", "voter")) as a:
        with pytest.raises(Refused) as caught:
            await a.propose(command)
        assert caught.value.code == "not_authority"


async def test_client_may_not_propose_but_reads(network, engine, autojump_clock):
    async with (
        engine(network.node("leader", "voter")) as leader,
        engine(network.node("c", "client")) as client,
    ):
        with pytest.raises(Refused) as caught:
            await client.propose(model(1))
        assert caught.value.code == "role_not_allowed"
        await leader.propose(model(1))
        await client.read_barrier()
        assert same(leader, client)
        assert client.status().role == "client"


async def test_revoked_member_loses_its_stream_and_is_refused(network, engine, autojump_clock):
    async with engine(network.node("leader", "voter")) as leader, engine(network.node("a")) as a:
        await leader.propose(AdmitMember(A, "a", "learner", b"c"))
        await a.read_barrier()
        await leader.propose(RevokeMember(A, "lost laptop"))
        with pytest.raises((Refused, Unavailable)) as caught:
            await a.propose(model(1))
        assert caught.value.code in ("revoked", "no_leader")
        await trio.sleep(10)
        problem = a.status().problem
        assert problem is not None
        assert problem.code == "revoked"
        with pytest.raises(Conflict):
            await leader.propose(RevokeMember(LEADER, "suicide"))


async def test_no_leader_is_named_with_a_remedy(network, engine, autojump_clock):
    async with engine(network.node("a")) as a:
        with pytest.raises(Unavailable) as caught:
            await a.propose(model(1))
        assert caught.value.code == "no_leader"
        assert LEADER in str(caught.value)
        assert a.status().leader is None
        with pytest.raises(Unavailable):
            await a.read_barrier()


async def test_catches_up_after_a_cut_and_survives_restarts(network, engine, autojump_clock):
    lead, node = network.node("leader", "voter"), network.node("a")
    leader_log, node_log = MemoryLog(), MemoryLog()
    async with engine(lead, leader_log) as leader:
        async with engine(node, node_log) as a:
            await a.propose(model(0))
            network.cut(lead, node)
            for n in range(1, 20):
                await leader.propose(model(n))
            assert a.state.index == 1
            network.heal(lead, node)
            await reach(a, 20)
            assert same(leader, a)
        await leader.propose(model(20))
        async with engine(node, node_log) as a:
            assert a.state.index == 20
            await reach(a, 21)
            assert same(leader, a)
    async with engine(lead, leader_log) as leader, engine(node, node_log) as a:
        assert leader.state.index == 21
        await a.propose(model(21))
        assert same(leader, a)


async def test_leader_restart_in_mid_proposal(network, engine, autojump_clock, nursery):
    lead, node = network.node("leader", "voter"), network.node("a")
    store = MemoryLog()
    done = trio.Event()
    async with engine(node) as a:
        async with engine(lead, store) as leader:
            await a.read_barrier()
            network.cut(lead, node)

            async def propose() -> None:
                assert (await a.propose(model(1))).index == 1
                done.set()

            nursery.start_soon(propose)
            await trio.sleep(1)
            assert leader.state.index == 0
        network.heal(lead, node)
        async with engine(lead, store):
            await done.wait()


async def test_lost_answer_does_not_apply_a_proposal_twice(network, engine, autojump_clock):
    """The link breaks after the leader took the proposal: sent again, found again."""
    lead, node = network.node("leader", "voter"), network.node("a")
    placement = SetPlacement(model(1).model.digest, (Rank(0, Slice(0, 4, True), A),), 64, 1, 0)
    async with engine(lead) as leader, engine(node) as a:
        await a.propose(model(1))
        commit = leader._journal.commit

        async def cut_after(entries):
            result = await commit(entries)
            leader._journal.commit = commit
            network.cut(lead, node)
            return result

        leader._journal.commit = cut_after
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def heal() -> None:
                await reach(leader, 2)
                await trio.sleep(1)
                network.heal(lead, node)

            applied = await a.propose(placement)
        assert applied.index == 2
        assert applied.error is None
        assert leader.state.index == a.state.index == 2


async def test_snapshot_brings_a_far_behind_follower_up(
    network, engine, autojump_clock, monkeypatch
):
    monkeypatch.setattr("pyagent_node.consensus.history.WINDOW", 8)
    lead, node = network.node("leader", "voter"), network.node("a")
    leader_log, node_log = MemoryLog(), MemoryLog()
    async with engine(lead, leader_log, compact_entries=10) as leader:
        for n in range(35):
            await leader.propose(model(n))
        async with engine(node, node_log) as a:
            await a.read_barrier()
            assert same(leader, a)
            await a.propose(model(99))
            async with a.applied(3) as entries:
                with pytest.raises(LimitExceeded) as caught:
                    await anext(entries)
                assert caught.value.code == "lagging"
            async with a.applied(35) as entries:
                assert (await anext(entries)).command == model(99)
    async with engine(lead, leader_log) as leader, engine(node, node_log) as a:
        assert leader.state.index == 36
        assert (await a.propose(model(100))).index == 37
        assert same(leader, a)


async def test_applied_follows_in_order(network, engine, autojump_clock):
    async with engine(network.node("leader", "voter")) as leader, engine(network.node("a")) as a:
        seen: list[int] = []
        async with trio.open_nursery() as nursery, a.applied(0) as entries:

            @nursery.start_soon
            async def write() -> None:
                async with trio.open_nursery() as writers:
                    for n in range(50):
                        writers.start_soon((leader if n % 2 else a).propose, model(n))

            async for entry in entries:
                seen.append(entry.index)
                if entry.index == 50:
                    break
        assert seen == list(range(1, 51))
        assert same(leader, a)


async def test_two_burns_at_once_one_wins(network, engine, autojump_clock):
    outcomes: list[object] = []
    async with engine(network.node("leader", "voter")) as leader:

        async def burn(peer: str) -> None:
            try:
                await leader.propose(BurnTicket("0" * 32, PeerId(peer), 100))
                outcomes.append("won")
            except Refused as error:
                outcomes.append(error.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(burn, "x")
            nursery.start_soon(burn, "y")
        await leader.propose(BurnTicket("0" * 32, leader.state.burnt_tickets["0" * 32], 100))
    assert sorted(map(str, outcomes)) == ["ticket_used", "won"]


async def test_log_of_a_follower_that_is_ahead_is_reported(network, engine, autojump_clock):
    lead, node = network.node("leader", "voter"), network.node("a")
    node_log = MemoryLog()
    async with engine(lead) as leader, engine(node, node_log) as a:
        await a.propose(model(1))
    async with engine(lead) as leader, engine(node, node_log) as a:  # the leader lost its log
        with pytest.raises(Unavailable) as caught:
            await a.propose(model(2))
        assert caught.value.code == "no_leader"
        problem = a.status().problem
        assert problem is not None
        assert problem.code == "log_diverged"
        assert problem.remedy
        for n in (5, 6):
            await leader.propose(model(n))
        await trio.sleep(30)
        assert a.state.index == 1
        problem = a.status().problem
        assert problem is not None
        assert problem.code == "log_diverged"


GARBAGE = [
    Frame(b""),
    Frame(b"\xff" * 100),
    Frame(msgspec.msgpack.encode({"type": "overthrow"})),
    Frame(msgspec.msgpack.encode({"type": "follow"})),
    frame(Propose(b"r" * 16, b"junk")),
    frame(Follow(-1, bytes(32))),
    frame(Follow(7, bytes(32))),
    frame(Welcome(3)),
]


@pytest.mark.parametrize("first", GARBAGE)
async def test_garbage_ends_the_stream_and_the_loop_lives(network, engine, autojump_clock, first):
    async with (
        engine(network.node("leader", "voter")) as leader,
        network.started(network.node("evil")) as node,
    ):
        stream = await node.open(LEADER, PROTOCOL)
        await stream.send(first)
        answer = await stream.receive()
        assert answer is not None
        assert isinstance(LOG_MESSAGES.decode(answer.header), Stop)
        assert leader.counted.refused_messages == 1
        assert (await leader.propose(model(1))).index == 1


AFTER_WELCOME = [
    frame(Follow(0, bytes(32))),
    frame(Acknowledge(5)),
    frame(Acknowledge(-5)),
    frame(Propose(b"short", b"")),
    entries_frame([LogEntry(1, 1, b"x")]),
    Frame(b"\xc1"),
]


@pytest.mark.parametrize("second", AFTER_WELCOME)
async def test_garbage_after_the_welcome(network, engine, autojump_clock, second):
    async with (
        engine(network.node("leader", "voter")) as leader,
        network.started(network.node("evil")) as node,
    ):
        stream = await node.open(LEADER, PROTOCOL)
        await stream.send(frame(Follow(0, bytes(32))))
        welcome = await stream.receive()
        assert welcome is not None
        assert LOG_MESSAGES.decode(welcome.header) == Welcome(0)
        await stream.send(second)
        answer = await stream.receive()
        assert answer is not None
        assert isinstance(LOG_MESSAGES.decode(answer.header), Stop)
        assert (await leader.propose(model(1))).index == 1


async def test_garbage_commands_are_answered_with_errors(network, engine, autojump_clock):
    async with (
        engine(network.node("leader", "voter")) as leader,
        network.started(network.node("evil")) as node,
    ):
        stream = await node.open(LEADER, PROTOCOL)
        await stream.send(frame(Follow(0, bytes(32))))
        await stream.receive()
        codes = []
        for data in (
            b"",
            b"junk",
            msgspec.msgpack.encode({"type": "self_destruct"}),
            b"z" * 50_000,
        ):
            await stream.send(frame(Propose(b"0" * 16, data)))
            answer = await stream.receive()
            assert answer is not None
            message = LOG_MESSAGES.decode(answer.header)
            assert isinstance(message, Answer)
            assert message.error is not None
            codes.append(message.error.code)
        assert codes == [
            "malformed_message",
            "malformed_message",
            "unknown_message",
            "command_too_large",
        ]
        assert leader.state.index == 0


async def test_follower_refuses_a_lying_leader_and_tries_again(network, engine, autojump_clock):
    lead, node = network.node("leader", "voter"), network.node("a")
    attempts = 0

    async def lie(stream) -> None:
        nonlocal attempts
        attempts += 1
        await stream.receive()
        await stream.send(frame(Welcome(9)))
        await stream.send(entries_frame([LogEntry(5, 1, b"nonsense")]))
        await stream.receive()

    async with engine(node) as a:
        async with network.started(lead) as mesh:
            mesh.handle(PROTOCOL, lie)
            await trio.sleep(3)
        assert attempts > 1
        assert a.state.index == 0
        assert a.counted.refused_messages == attempts
        problem = a.status().problem
        assert problem is not None
        assert problem.code == "log_gap"
        async with engine(lead) as leader:
            await a.propose(model(1))
            assert same(leader, a)
            assert a.status().problem is None


async def test_silent_leader_meets_the_deadline(network, engine, autojump_clock):
    lead, node = network.node("leader", "voter"), network.node("a")

    async def mute(stream) -> None:
        await stream.receive()
        await stream.send(frame(Welcome(0)))
        while await stream.receive() is not None:
            pass

    async with network.started(lead) as mesh, engine(node, propose_seconds=4) as a:
        mesh.handle(PROTOCOL, mute)
        with pytest.raises(DeadlineExceeded) as caught:
            await a.propose(model(1))
        assert caught.value.code == "propose_timeout"


async def test_disk_failure_refuses_and_the_writer_lives(network, engine, autojump_clock):
    class Failing(MemoryLog):
        fail = False

        async def append(self, entries, hard_state=None):
            if self.fail:
                raise Unavailable("full", code="disk_full")
            await super().append(entries, hard_state)

    store = Failing()
    async with (
        engine(network.node("leader", "voter"), store) as leader,
        engine(network.node("a")) as a,
    ):
        await a.propose(model(1))
        store.fail = True
        for who in (leader, a):
            with pytest.raises(Unavailable) as caught:
                await who.propose(model(2))
            assert caught.value.code == "disk_full"
        store.fail = False
        assert (await a.propose(model(2))).index == 2
        assert same(leader, a)


async def test_proposals_of_one_node_are_bounded(network, engine, autojump_clock):
    async with engine(network.node("a")) as a:
        refused = 0

        async def propose(n: int) -> None:
            nonlocal refused
            try:
                await a.propose(model(n))
            except LimitExceeded:
                refused += 1
            except Unavailable:
                pass

        async with trio.open_nursery() as nursery:
            for n in range(300):
                nursery.start_soon(propose, n)
        assert refused == 44


async def test_on_disk(network, engine, tmp_path: Path):
    lead, node = network.node("leader", "voter"), network.node("a")
    for start in (0, 10):
        async with (
            engine(lead, FileLog(tmp_path / "leader"), compact_entries=4) as leader,
            engine(node, FileLog(tmp_path / "a"), compact_entries=4) as a,
        ):
            assert leader.state.index == start
            for n in range(start, start + 10):
                await (a if n % 2 else leader).propose(model(n))
            await a.read_barrier()
            assert same(leader, a)
