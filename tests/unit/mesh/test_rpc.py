"""Requests over the simulated mesh: answers, errors, deadlines, cancellation, limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    DeadlineExceeded,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.limits import MAX_TAIL
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.node import rpc as rpc_module
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.rpc import MAX_CALLS, PROTOCOL, Rpc, open_rpc
from pyagent_node.simulations.mesh import SimulatedMesh, SimulatedNetwork, open_network


class Add(msgspec.Struct, frozen=True, tag="add"):
    a: int
    b: int


class Sum(msgspec.Struct, frozen=True, tag="sum"):
    value: int


class Wait(msgspec.Struct, frozen=True, tag="wait"):
    pass


class Pair:
    def __init__(self, network: SimulatedNetwork, a: Rpc, b: Rpc) -> None:
        self.network, self.a, self.b = network, a, b
        self.peer = b.mesh.peer_id


@asynccontextmanager
async def pair(latency: float = 0.0) -> AsyncIterator[Pair]:
    async with open_network(latency=latency) as network:
        a = network.node(NodeKey.generate().peer_id)
        b = network.node(NodeKey.generate().peer_id)
        await a.connect(b.addresses[0])
        async with open_rpc(a) as rpc_a, open_rpc(b) as rpc_b:
            yield Pair(network, rpc_a, rpc_b)


async def add(peer: PeerId, message: Add, tail: bytes) -> tuple[Sum, bytes]:
    return Sum(message.a + message.b), tail[::-1]


async def test_a_request_and_its_answer_with_tails() -> None:
    async with pair() as p:
        p.b.register(Add, add)
        assert await p.a.call(p.peer, Add(2, 3), Sum, tail=b"abc") == (Sum(5), b"cba")
        p.a.register(Add, add)
        assert await p.a.call(p.a.mesh.peer_id, Add(1, 1), Sum) == (Sum(2), b"")


async def test_many_at_once_share_one_stream_and_do_not_wait_for_each_other() -> None:
    async with pair() as p:
        release = trio.Event()
        streams = 0

        async def slow(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            await release.wait()
            return Sum(0), b""

        p.b.register(Wait, slow)
        p.b.register(Add, add)
        mesh = p.a.mesh
        inner = mesh.open

        async def counted(peer: PeerId, protocol: str) -> object:
            nonlocal streams
            streams += 1
            return await inner(peer, protocol)

        mesh.open = counted  # type: ignore[method-assign, assignment]
        done: list[int] = []

        async def ask(number: int) -> None:
            reply, _ = await p.a.call(p.peer, Add(number, 0), Sum)
            done.append(reply.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.a.call, p.peer, Wait(), Sum)
            for number in range(40):
                nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(done) == list(range(40))
            release.set()
        assert streams == 1


@pytest.mark.parametrize(
    "error",
    [
        NotFound("no such model", code="no_model", model="m"),
        LimitExceeded("full", code="too_many_sessions", remedy="Wait.", limit=3),
    ],
)
async def test_an_error_comes_back_as_what_it_was(error: PyAgentError) -> None:
    async with pair() as p:

        async def fail(peer: PeerId, message: Add, tail: bytes) -> tuple[Sum, bytes]:
            raise error

        p.b.register(Add, fail)
        with pytest.raises(type(error)) as caught:
            await p.a.call(p.peer, Add(1, 2), Sum)
        assert caught.value.to_info() == error.to_info()


async def test_a_defect_at_the_other_end_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async with pair() as p:

        async def broken(peer: PeerId, message: Add, tail: bytes) -> tuple[Sum, bytes]:
            raise ValueError("secret detail")

        p.b.register(Add, broken)
        with pytest.raises(PyAgentError) as caught:
            await p.a.call(p.peer, Add(1, 2), Sum)
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value)
        assert "secret detail" in caplog.text


async def test_what_is_not_served_or_not_understood_is_said_so() -> None:
    async with pair() as p:
        with pytest.raises(Unsupported) as unknown:
            await p.a.call(p.peer, Add(1, 2), Sum)
        assert unknown.value.code == "unknown_message"

        class Other(msgspec.Struct, frozen=True, tag="add"):
            a: str

        p.b.register(Add, add)
        with pytest.raises(CorruptData) as malformed:
            await p.a.call(p.peer, Other("x"), Sum)
        assert malformed.value.code == "malformed_message"
        with pytest.raises(Unsupported):
            await p.a.call(p.peer, Add(1, 2), Wait)
        with pytest.raises(Conflict):
            p.b.register(Other, add)


async def test_a_deadline_ends_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    async with pair(latency=0.1) as p:
        ended = trio.Event()

        async def never(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
            raise AssertionError

        p.b.register(Wait, never)
        started = trio.current_time()
        with pytest.raises(DeadlineExceeded):
            await p.a.call(p.peer, Wait(), Sum, seconds=3.0)
        assert trio.current_time() - started == pytest.approx(3.0)
        with trio.fail_after(3.0):
            await ended.wait()


async def test_a_caller_that_gives_up_cancels_the_work(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with pair(latency=0.1) as p:
        started, ended = trio.Event(), trio.Event()

        async def never(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            started.set()
            try:
                await trio.sleep_forever()
            finally:
                ended.set()
            raise AssertionError

        p.b.register(Wait, never)
        p.b.register(Add, add)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(p.a.call, p.peer, Wait(), Sum)
            await started.wait()
            nursery.cancel_scope.cancel()
        with trio.fail_after(1.0):
            await ended.wait()
        assert await p.a.call(p.peer, Add(1, 2), Sum) == (Sum(3), b"")


async def test_a_lost_peer_fails_its_requests_and_comes_back() -> None:
    async with pair() as p:
        started = trio.Event()

        async def never(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            started.set()
            await trio.sleep_forever()
            raise AssertionError

        p.b.register(Wait, never)
        p.b.register(Add, add)
        codes: list[str] = []

        async def ask() -> None:
            with pytest.raises(Unavailable) as caught:
                await p.a.call(p.peer, Wait(), Sum)
            codes.append(caught.value.code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await started.wait()
            p.network.cut(p.a.mesh.peer_id, p.peer)
        assert codes == ["stream_closed"]
        with pytest.raises(Unavailable) as caught:
            await p.a.call(p.peer, Add(1, 2), Sum)
        assert caught.value.code == "peer_unreachable"
        p.network.heal(p.a.mesh.peer_id, p.peer)
        assert await p.a.call(p.peer, Add(1, 2), Sum) == (Sum(3), b"")


async def test_requests_on_one_stream_are_limited() -> None:
    async with pair() as p:
        release = trio.Event()

        async def slow(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            await release.wait()
            return Sum(0), b""

        p.b.register(Wait, slow)
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_CALLS):
                nursery.start_soon(p.a.call, p.peer, Wait(), Sum)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(LimitExceeded) as caught:
                await p.a.call(p.peer, Wait(), Sum)
            assert caught.value.code == "too_many_requests"
            release.set()


async def test_an_oversized_tail_is_refused_on_either_way() -> None:
    async with pair() as p:

        async def huge(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytearray]:
            return Sum(0), bytearray(MAX_TAIL + 1)

        p.b.register(Wait, huge)
        p.b.register(Add, add)
        for call in (
            lambda: p.a.call(p.peer, Add(1, 2), Sum, tail=bytearray(MAX_TAIL + 1)),
            lambda: p.a.call(p.peer, Wait(), Sum),
        ):
            with pytest.raises(LimitExceeded) as caught:
                await call()
            assert caught.value.code == "frame_too_large"
        assert await p.a.call(p.peer, Add(1, 2), Sum) == (Sum(3), b"")


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x81\xa4type\xa5other", b"\x90"])
async def test_garbage_ends_the_stream_and_nothing_else(header: bytes) -> None:
    async with pair() as p:
        p.b.register(Add, add)
        stream = await p.a.mesh.open(p.peer, PROTOCOL)
        await stream.send(Frame(header))
        with pytest.raises(Unavailable):
            await stream.receive()
        assert await p.a.call(p.peer, Add(1, 2), Sum) == (Sum(3), b"")


async def test_a_number_in_use_is_refused() -> None:
    async with pair() as p:

        async def slow(peer: PeerId, message: Wait, tail: bytes) -> tuple[Sum, bytes]:
            await trio.sleep_forever()
            raise AssertionError

        p.b.register(Wait, slow)
        stream = await p.a.mesh.open(p.peer, PROTOCOL)
        body = msgspec.Raw(msgspec.msgpack.encode(Wait()))
        call = rpc_module._ENVELOPE.encode(rpc_module._Call(1, 5.0, body))
        await stream.send(Frame(call))
        await stream.send(Frame(call))
        with pytest.raises(Unavailable):
            await stream.receive()


async def test_a_peer_that_answers_nonsense_fails_the_request() -> None:
    async with open_network() as network:
        a: SimulatedMesh = network.node(NodeKey.generate().peer_id)
        b = network.node(NodeKey.generate().peer_id)
        await a.connect(b.addresses[0])

        async def nonsense(stream: object) -> None:
            frame = await stream.receive()  # type: ignore[attr-defined]
            await stream.send(frame)  # type: ignore[attr-defined]

        b.handle(PROTOCOL, nonsense)
        async with open_rpc(a) as rpc:
            with pytest.raises(PyAgentError):
                await rpc.call(b.peer_id, Add(1, 2), Sum)
