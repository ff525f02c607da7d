"""Faults of the simulated network that nobody is told of."""

from __future__ import annotations

import pytest
import trio

from pyagent_node.base.errors import DeadlineExceeded
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Frame
from pyagent_node.node.identity import NodeKey
from pyagent_node.simulations.mesh import open_network

A, B = (NodeKey(bytes([n]) * 32).peer_id for n in (1, 2))


async def echo(stream: FrameStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


async def ask(stream: FrameStream, word: bytes) -> bytes:
    await stream.send(Frame(word))
    answer = await stream.receive()
    assert answer is not None
    return bytes(answer.header)


@pytest.mark.parametrize("there", [True, False])
async def test_a_stalled_direction(there: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with open_network(latency=0.01) as network:
        a, b = network.node(A), network.node(B)
        b.handle("/echo/1", echo)
        await network.connect_all()
        stream = await a.open(B, "/echo/1")
        assert await ask(stream, b"one") == b"one"
        direction = (A, B) if there else (B, A)
        network.hold(*direction)
        await stream.send(Frame(b"two"))
        with trio.move_on_after(100) as waiting:
            await stream.receive()
        assert waiting.cancelled_caught
        assert [peer.peer_id for peer in a.peers()] == [B]
        with pytest.raises(DeadlineExceeded):
            await a.open(B, "/echo/1")
        await stream.send(Frame(b"three"))
        network.release(*direction)
        assert [await stream.receive(), await stream.receive()] == [(b"two", b""), (b"three", b"")]
        assert await ask(await a.open(B, "/echo/1"), b"four") == b"four"


async def test_a_dial_during_a_short_stall_gets_through(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_network() as network:
        a, b = network.node(A), network.node(B)
        b.handle("/echo/1", echo)
        network.hold(B, A)

        async def later() -> None:
            await trio.sleep(3)
            network.release(B, A)

        nursery.start_soon(later)
        await a.connect(b.addresses[0])
        assert await ask(await a.open(B, "/echo/1"), b"x") == b"x"


async def test_frames_can_be_lost_repeated_and_changed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_network() as network:
        a, b = network.node(A), network.node(B)
        b.handle("/echo/1", echo)
        await network.connect_all()
        seen: list[tuple[str, bytes]] = []

        def meddle(sender: object, receiver: object, protocol: str, frame: Frame) -> list[Frame]:
            seen.append((protocol, bytes(frame.header)))
            if sender == B:
                return [frame]
            match frame.header:
                case b"lose":
                    return []
                case b"twice":
                    return [frame, frame]
                case _:
                    return [Frame(b"changed")]

        network.meddler = meddle
        stream = await a.open(B, "/echo/1")
        for word in (b"lose", b"twice", b"other"):
            await stream.send(Frame(word))
        answers = [await stream.receive() for _ in range(3)]
        assert [frame.header for frame in answers if frame] == [b"twice", b"twice", b"changed"]
        assert {protocol for protocol, _ in seen} == {"/echo/1"}
