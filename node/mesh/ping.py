"""``/pyagent/ping/1``: our own measurement of round trips, and the watch over silent peers.

One long-lived stream to each peer carries a number and gets it back.  (libp2p's ``ping`` counts
whole milliseconds, which on a local network is nothing.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Frame
from pyagent_node.node.mesh.connection import Connection

PROTOCOL: Final = "/pyagent/ping/1"
SMOOTHING: Final = 0.25
"""Weight of the newest measurement."""
FIRST_PINGS: Final = 3
"""Measurements made in a row at the start; the best of them is the first value."""

PINGS_A_SECOND: Final = 10.0
"""What a node sends of them at most, however many peers it has."""


def pause(every: float, peers: int) -> float:
    """Return the time between two pings to a peer, ``every`` seconds while peers are few.

    In a large mesh each peer is asked less often, so that a node's load stays the same, as in SWIM
    (Das, Gupta and Motivala, 2002).
    """
    return max(every, peers / PINGS_A_SECOND)


def smoothed(old: float | None, new: float) -> float:
    """Return the exponentially weighted mean of round trips, in milliseconds."""
    return new if old is None else old + SMOOTHING * (new - old)


async def answer_pings(stream: FrameStream) -> None:
    """Serve the protocol: send every frame back."""
    while (frame := await stream.receive()) is not None:
        await stream.send(Frame(frame.header))


async def measure(
    connection: Connection,
    *,
    clock: Callable[[], float],
    every: Callable[[], float],
    silence: float,
) -> None:
    """Keep ``connection.rtt_ms`` current; end the connection when the peer falls silent.

    ``every`` gives the seconds until the next ping.  Returns when the connection or its ping stream
    is gone.
    """
    try:
        stream = await connection.open(PROTOCOL)
    except Unavailable:
        return
    try:
        number = 0
        first: list[float] = []
        while True:
            with trio.move_on_after(silence) as patience:
                started = clock()
                await stream.send(Frame(number.to_bytes(8, "big")))
                answer = await stream.receive()
            if patience.cancelled_caught:
                connection.link.close(f"it answered no ping for {silence:g} seconds")
                return
            if answer is None:
                return
            if answer.header != number.to_bytes(8, "big"):
                raise CorruptData("A peer sent back another ping.", code="malformed_message")
            taken = (clock() - started) * 1000.0
            number += 1
            if number <= FIRST_PINGS:
                first.append(taken)
                connection.rtt_ms = min(first)
            else:
                connection.rtt_ms = smoothed(connection.rtt_ms, taken)
            if number >= FIRST_PINGS:
                await trio.sleep(every())
    except (Unavailable, CorruptData):
        return
    finally:
        await stream.aclose()
