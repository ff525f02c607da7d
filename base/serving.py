"""Serves one stream of a protocol of requests: one after the other, within limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError, Unavailable
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame


class StreamCounts:
    """How many streams each peer holds open, at most ``limit`` of ``what``."""

    def __init__(self, limit: int, what: str) -> None:
        self.limit = limit
        self.what = what
        self.open: Counter[PeerId] = Counter()


async def serve_stream(
    stream: FrameStream,
    counts: StreamCounts,
    *,
    idle_seconds: float,
    answer: Callable[[Frame], Awaitable[None]],
    refuse: Callable[[PyAgentError], Awaitable[None]],
) -> None:
    """Have every frame of ``stream`` answered, in order, until it ends or is idle for long.

    A stream too many is refused with ``too_many_streams``.  ``answer`` raises
    :class:`Unavailable` when the peer went away, which ends the stream quietly; any other
    :class:`PyAgentError` is that of a frame that is not of this protocol: the peer is told through
    ``refuse``, and the error is raised.
    """
    peer, held = stream.peer, counts.open
    if held[peer] >= counts.limit:
        await refuse(
            LimitExceeded(
                f"At most {counts.limit} {counts.what} may be open at once.",
                code="too_many_streams",
                limit=counts.limit,
            )
        )
        return
    held[peer] += 1
    try:
        while True:
            with trio.move_on_after(idle_seconds) as idle:
                frame = await stream.receive()
            if idle.cancelled_caught or frame is None:
                return
            await answer(frame)
    except Unavailable:
        return
    except PyAgentError as error:
        await refuse(error)
        raise
    finally:
        held[peer] -= 1
        if not held[peer]:
            del held[peer]
