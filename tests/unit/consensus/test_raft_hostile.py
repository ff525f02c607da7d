"""The engine raft-rs against peers that lie, disks that fail and entries nobody understands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pyagent_node.base.errors import ErrorInfo, PyAgentError, Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus import raft_links
from pyagent_node.consensus.checks import encode_command
from pyagent_node.consensus.log import MemoryLog
from pyagent_node.consensus.port import Applied
from pyagent_node.consensus.raft_messages import (
    PROTOCOL,
    RAFT_MESSAGES,
    Hello,
    Piece,
    Propose,
    RaftMessage,
    Refusal,
    Stop,
    Transfer,
    frame,
    pieces,
)
from pyagent_node.consensus.raft_proposals import Pending
from pyagent_node.consensus.raft_storage import raft_id
from pyagent_node.consensus.replica import Record
from pyagent_node.consensus.segments import LogEntry
from pyagent_node.native import RaftConf, RaftCore
from pyagent_node.simulations.mesh import SimulatedMesh

from .conftest import Network
from .raft_cluster import Cluster, model

INCARNATION = b"x" * 16
REQUEST = b"r" * 16


@pytest.fixture
async def cluster(network: Network, nursery: trio.Nursery) -> AsyncIterator[Cluster]:
    cluster = Cluster(network, nursery)
    yield cluster
    nursery.cancel_scope.cancel()


class Stranger:
    """A peer of the mesh that speaks the protocol as it likes."""

    def __init__(self, cluster: Cluster, mesh: SimulatedMesh) -> None:
        self.cluster = cluster
        self.mesh = mesh
        self.raft_id = raft_id(mesh.peer_id, INCARNATION)
        self.heard: list[RaftMessage] = []
        mesh.handle(PROTOCOL, self._listen)

    async def _listen(self, stream: FrameStream) -> None:
        while (received := await stream.receive()) is not None:
            self.heard.append(RAFT_MESSAGES.decode(received.header))

    def hello(self, *, voter: bool = True) -> Hello:
        return Hello(self.raft_id, INCARNATION, voter=voter, last_index=0)

    async def open(self, to: str) -> FrameStream:
        return await self.mesh.open(self.cluster.peer(to), PROTOCOL)

    async def say(self, to: str, *frames: Frame) -> FrameStream:
        stream = await self.open(to)
        await stream.send(frame(self.hello()))
        for each in frames:
            await stream.send(each)
        await trio.sleep(1)
        return stream

    def refusals(self) -> list[ErrorInfo]:
        return [m.error for m in self.heard if isinstance(m, Refusal)]


@pytest.fixture
async def stranger(cluster: Cluster, network: Network) -> AsyncIterator[Stranger]:
    async with network.started(network.node("stranger", "voter")) as mesh:
        yield Stranger(cluster, mesh)


def core_of(node_id: int, voters: Sequence[int], term: int) -> RaftCore:
    return RaftCore(
        node_id,
        conf=RaftConf(voters),
        term=term,
        vote=0,
        commit=1,
        snapshot_index=1,
        snapshot_term=1,
        snapshot_data=b"",
        entries=[],
        heartbeat_ticks=1,
        election_ticks=5,
        max_message_bytes=1 << 20,
        max_inflight=16,
        max_uncommitted_bytes=1 << 20,
    )


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (Frame(b""), "malformed_message"),
        (Frame(b"\xc1" * 100), "malformed_message"),
        (Frame(msgspec.msgpack.encode({"type": "unheard_of"})), "unknown_message"),
        (frame(Piece(1, last=True)), "protocol_error"),
        (frame(Hello(5, INCARNATION, voter=True, last_index=0)), "forged_raft_id"),
        (frame(Hello(5, b"short", voter=True, last_index=0)), "forged_raft_id"),
        (Frame(msgspec.msgpack.encode({"type": "hello", "raft_id": -1})), "malformed_message"),
    ],
)
async def test_a_stream_must_begin_with_a_true_hello(
    cluster: Cluster, stranger: Stranger, message: Frame, code: str, autojump_clock: MockClock
) -> None:
    engine = await cluster.start("a", founder=True)
    await stranger.mesh.connect((cluster.lives["a"].mesh).addresses[0])
    stream = await stranger.open("a")
    await stream.send(message)
    received = await stream.receive()
    assert received is not None
    stop = RAFT_MESSAGES.decode(received.header)
    assert isinstance(stop, Stop)
    assert stop.error.code == code
    assert engine.links.counters.refused_messages == 1
    await cluster.propose("a")


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([frame(Stop(ErrorInfo("error", "x", "y")))], "protocol_error"),
        ([frame(Propose(b"", b"", 0))], "malformed_message"),
        ([frame(Hello(1, b"y" * 16, voter=True, last_index=0))], "protocol_error"),
        ([Frame(frame(Piece(1, last=False)).header, bytes(600))] * 2, "message_too_large"),
        ([Frame(frame(Piece(1, last=False)).header, bytes(599))], "protocol_error"),
        ([Frame(frame(Piece(1, last=False)).header)], "protocol_error"),
    ],
)
async def test_what_makes_no_sense_ends_the_stream(
    cluster: Cluster,
    stranger: Stranger,
    messages: list[Frame],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    monkeypatch.setattr(raft_links, "MAX_MESSAGE", 1000)
    monkeypatch.setattr(raft_links, "PIECE_BYTES", 600)
    await cluster.start("a", founder=True)
    await stranger.mesh.connect(cluster.lives["a"].mesh.addresses[0])
    stream = await stranger.say("a", *messages)
    received = await stream.receive()
    assert received is not None
    stop = RAFT_MESSAGES.decode(received.header)
    assert isinstance(stop, Stop)
    assert stop.error.code == code
    await cluster.propose("a")


async def test_a_stranger_raises_no_term(
    cluster: Cluster, stranger: Stranger, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await stranger.mesh.connect(cluster.lives["b"].mesh.addresses[0])
    victim = cluster.engine("b")
    term = victim.status().term
    liar = core_of(stranger.raft_id, [stranger.raft_id], term=1000)
    liar.campaign()
    while liar.has_ready():
        ready = liar.ready()
        liar.advance()
        if ready.committed:
            liar.advance_apply(ready.committed[-1].index)
    liar.propose_conf([stranger.raft_id], [victim.members.me])
    messages: list[bytes] = []
    for _ in range(20):
        while liar.has_ready():
            ready = liar.ready()
            light = liar.advance()
            for entry in (*ready.committed, *light.committed):
                if entry.kind == 1:
                    liar.apply_conf(entry)
                liar.advance_apply(entry.index)
            messages += [data for _, _, data in (*ready.messages, *light.messages)]
        liar.tick()
    assert messages
    refused = victim.node.counters.refused_messages
    for data in messages:
        await stranger.say("b", *pieces(victim.members.me, data))
    assert victim.node.counters.refused_messages == refused + len(messages)
    assert victim.status().term == term
    await cluster.propose("b")
    assert cluster.engine("a").status().role == "leader"


async def test_garbage_of_a_member_is_refused_and_counted(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    sender, victim = cluster.engine("c"), cluster.engine("b")
    peer = cluster.peer("b")
    garbage = [b"", b"\x00", b"\xff" * 40, bytes(range(256)), b"\x08\x07" + b"\xff" * 9]
    for data in garbage:
        assert sender.links.put(peer, pieces(victim.members.me, data))
    assert sender.links.put(peer, pieces(12345, b"for somebody else"))
    await trio.sleep(1)
    assert victim.node.counters.refused_messages == len(garbage)
    assert victim.links.counters.refused_messages == 1
    for name in "abc":
        await cluster.propose(name)


async def test_bad_proposals_are_answered_with_the_reason(
    cluster: Cluster, stranger: Stranger, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await stranger.mesh.connect(cluster.lives["a"].mesh.addresses[0])
    unknown = msgspec.msgpack.encode({"type": "set_fire"})
    commands = [b"", b"\xc1", unknown, bytes(60_000)]
    await stranger.say(
        "a", *(frame(Propose(bytes([n]) * 16, data, 0)) for n, data in enumerate(commands))
    )
    codes = [error.code for error in stranger.refusals()]
    assert codes == [
        "malformed_message",
        "malformed_message",
        "unknown_message",
        "command_too_large",
    ]
    assert cluster.engine("a").node.counters.refused_proposals == 4
    assert not cluster.engine("a").state.models


async def test_a_proposal_that_comes_again_is_applied_once(
    cluster: Cluster, stranger: Stranger, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await stranger.mesh.connect(cluster.lives["a"].mesh.addresses[0])
    engine = cluster.engine("a")
    seen: list[PeerId] = []
    cluster.authorise = lambda command, proposer, role: seen.append(proposer)
    index = engine.state.index
    same = frame(Propose(REQUEST, encode_command(model(500)), index))
    await stranger.say("a", same, same, same)
    await stranger.say("a", same)
    await cluster.engine("a").transfer(cluster.peer("b"))
    engine = cluster.engine("b")
    await stranger.mesh.connect(cluster.lives["b"].mesh.addresses[0])
    await stranger.say("b", same, same)
    assert seen == [stranger.mesh.peer_id], "the proposer is who sent it, whatever it says"
    assert len(engine.state.models) == 1
    record = Record(REQUEST, stranger.mesh.peer_id, encode_command(model(500)), index)
    engine.node.core.propose(msgspec.msgpack.encode(record))
    engine.node.poke()
    await cluster.propose("c")
    await cluster.settled()
    assert [len(cluster.engine(n).state.models) for n in "abc"] == [2, 2, 2]


async def test_a_proposal_from_long_ago_is_refused(
    cluster: Cluster,
    stranger: Stranger,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    monkeypatch.setattr("pyagent_node.consensus.replica.REMEMBERED_REQUESTS", 8)
    await cluster.found("abc")
    for _ in range(20):
        await cluster.propose("a")
    await stranger.mesh.connect(cluster.lives["a"].mesh.addresses[0])
    await stranger.say("a", frame(Propose(REQUEST, encode_command(model(99)), 3)))
    assert [error.code for error in stranger.refusals()] == ["proposal_too_old"]
    assert len(cluster.engine("a").state.models) == 20


async def test_a_node_that_is_far_behind_proposes_all_the_same(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("pyagent_node.consensus.replica.REMEMBERED_REQUESTS", 8)
    await cluster.found("abc")
    for _ in range(20):
        await cluster.propose("a")
    engine = cluster.engine("b")
    pending = Pending(REQUEST, model(99), encode_command(model(99)), since=2, tick=engine.node.tick)
    engine._proposals.add(pending)
    with trio.fail_after(5):
        await pending.done.wait()
    assert isinstance(pending.outcome, Applied)
    assert len(engine.state.models) == 21


async def test_transfers_to_nobody_are_ignored(
    cluster: Cluster, stranger: Stranger, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await stranger.mesh.connect(cluster.lives["a"].mesh.addresses[0])
    await stranger.say("a", frame(Transfer(PeerId("nobody"))), frame(Transfer(PeerId(""))))
    assert cluster.leaders() == ["a"]
    await cluster.propose("c")


async def test_entries_that_nobody_can_read_are_passed_over_by_all(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    for garbage in (b"\xc1", b"garbage", msgspec.msgpack.encode(Record(REQUEST, PeerId("a"), b""))):
        cluster.engine("a").node.core.propose(garbage)
    await cluster.propose("b")
    await cluster.settled()
    for name in "abc":
        assert cluster.engine(name).node.applier.counters.refused_entries == 3
        assert len(cluster.engine(name).state.models) == 1


async def test_a_command_of_a_later_version_stops_the_state_but_not_the_log(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.propose("a")
    unknown = msgspec.msgpack.encode({"type": "set_fire"})
    record = Record(REQUEST, cluster.peer("a"), unknown)
    cluster.engine("a").node.core.propose(msgspec.msgpack.encode(record))
    cluster.engine("a").node.poke()
    await trio.sleep(2)
    for name in "abc":
        problem = cluster.engine(name).status().problem
        assert problem is not None
        assert problem.code == "unknown_command"
        assert "Upgrade" in (problem.remedy or "")
        with pytest.raises(PyAgentError) as caught:
            await cluster.propose(name)
        assert caught.value.code == "unknown_command"
    before = cluster.engine("b").state.index
    await cluster.stop("b")
    assert (await cluster.start("b")).state.index == before
    assert len(cluster.leaders()) == 1


class BadDisk(MemoryLog):
    """A disk that fails on command."""

    def __init__(self) -> None:
        super().__init__()
        self.code: str | None = None

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        if self.code is not None:
            await trio.lowlevel.checkpoint()
            raise Unavailable("The disk has a problem.", code=self.code, remedy="Free some space.")
        await super().append(entries, hard_state)


async def test_a_full_disk_moves_the_leadership_and_heals(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    disk = cluster.stores["a"] = BadDisk()
    await cluster.found("abc")
    disk.code = "disk_full"
    with pytest.raises(Unavailable) as caught:
        await cluster.propose("a")
    assert caught.value.code == "disk_full"
    problem = cluster.engine("a").status().problem
    assert problem is not None
    assert problem.code == "disk_full"
    await cluster.until(lambda: any(n in "bc" for n in cluster.leaders()))
    await cluster.propose("b")
    disk.code = None
    assert await cluster.leader() in "bc"
    await cluster.propose("a")
    await cluster.settled()
    assert cluster.engine("a").status().problem is None


async def test_a_disk_that_fails_ends_the_engine(
    cluster: Cluster, autojump_clock: MockClock
) -> None:
    disk = cluster.stores["a"] = BadDisk()
    await cluster.found("abc")
    life = cluster.lives["a"]
    disk.code = "disk_failed"
    with pytest.raises(Unavailable) as caught:
        await cluster.propose("a")
    assert caught.value.code == "disk_failed"
    await life.over.wait()
    assert isinstance(life.failure, Unavailable)
    assert life.failure.code == "disk_failed"
    await cluster.propose("b")


async def test_a_snapshot_that_makes_no_sense_is_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    await cluster.found("abc")
    await cluster.propose("a")
    leader, follower = cluster.engine("a"), await cluster.start("d")
    await cluster.until(lambda: cluster.peer("d") in leader.members.heard)
    with monkeypatch.context() as lying:
        lying.setattr(leader.node, "_content", lambda: b"nonsense")
        with trio.move_on_after(5):
            await leader.reconfigure(cluster.peers("abc"), cluster.peers("d"))
            await trio.sleep(5)
    assert follower.node.counters.refused_messages > 0
    assert follower.state.index == 0
    await cluster.propose("b")
    await leader.compact()
    await cluster.settled()
    assert len(follower.state.models) == 2
