"""Clients of simulated sessions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import SessionId
from pyagent_node.consensus.commands import Checkpoint
from pyagent_node.inference.generation import Generated
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.journal_messages import public_id
from pyagent_node.node.live_session import Reader
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.sessions import (
    N_LAYERS,
    SessionNode,
    SessionWorld,
    open_session_world,
    session_id,
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

    async def _follow(self, opening: AbstractAsyncContextManager[Reader]) -> None:
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


def checkpoint(world: SessionWorld) -> Checkpoint | None:
    return world.nodes[0].consensus.state.checkpoints.get(public_id(S))
