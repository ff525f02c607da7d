"""Waiting until something has come about, with a deadline and a word on what did not."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import trio
import trio.testing

from pyagent_node.base.errors import PyAgentError
from pyagent_node.node.client import Client

SECONDS = 60.0
"""Longest wait; a swarm in good order needs a few seconds."""

T = TypeVar("T")


def until(client: Client, found: Callable[[], T], why: str = "", *, seconds: float = SECONDS) -> T:
    """Return the first true value of ``found``; errors of a swarm in motion count as none.

    ``client`` is that of a daemon that lives on: it sets the pace.
    """
    deadline = time.monotonic() + seconds
    last: object = None
    for _ in client.events(0.1):
        try:
            last = found()
            if last:
                return last
        except PyAgentError as error:
            last = error
        assert time.monotonic() < deadline, f"it did not come about: {why} {last!r}"
    raise AssertionError("the daemon that was asked ended")


async def eventually(
    condition: Callable[[], bool], why: str = "", *, seconds: float = SECONDS
) -> None:
    """Wait for a condition that no event tells of."""
    with trio.move_on_after(seconds):
        while not condition():
            with trio.move_on_after(0.05):  # unless the tasks never rest
                await trio.testing.wait_all_tasks_blocked(0.005)
        return
    raise AssertionError(f"it did not come about: {why}")


def votes_settled(client: Client, voters: int) -> bool:
    """Whether this many nodes vote, one of them leads, and no change of voters is under way.

    Before that it is left to chance whose death costs the quorum.
    """
    consensus = client.status().consensus
    return (
        consensus is not None
        and len(consensus.voters) == voters
        and not consensus.joint
        and consensus.leader is not None
    )
