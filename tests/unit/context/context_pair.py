"""Nodes that hold contexts together, on a simulated network, with a log that tests write."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import ContextId, ContextPolicy
from pyagent_node.consensus.state import State
from pyagent_node.node.context_mesh import ContextService
from pyagent_node.sharding.context.owners import owner_table
from pyagent_node.simulations.contexts import (
    ENCODER,
    MemoryContextStore,
    open_simulated_contexts,
)
from pyagent_node.simulations.mesh import open_network
from pyagent_node.simulations.pipeline import peer
from tests.unit.kv.kv_kit import Log

A, B, C = (peer(number) for number in range(3))
SHELF = ContextInfo("shelf", ContextId(b"s" * 16), ContextPolicy(), ENCODER, 1)
OTHER = ContextId(b"o" * 16)
TABLE = owner_table({A: 1.0, B: 1.0})


def state(**changes: object) -> State:
    plain = State(index=1, contexts={"shelf": SHELF}, buckets=TABLE, bucket_epoch=3)
    return msgspec.structs.replace(plain, **changes)


class Pair:
    """Two nodes that hold contexts, and a third one that only speaks the protocol."""

    def __init__(self, log: Log, services: list[ContextService], stores: list[MemoryContextStore]):
        self.log, self.services, self.stores = log, services, stores

    async def refusal(self, message: msgspec.Struct, reply: type, tail: bytes = b"") -> str:
        """Ask the first node as the third one; returns the code of its refusal."""
        with pytest.raises(PyAgentError) as caught:
            await self.services[2].rpc.call(A, message, reply, tail=tail)
        return caught.value.code


@asynccontextmanager
async def pair(role: str = "voter") -> AsyncIterator[Pair]:
    log = Log(state())
    log.leads = False  # type: ignore[attr-defined]
    async with open_network() as network, trio.open_nursery() as nursery:
        services: list[ContextService] = []
        stores = [MemoryContextStore() for _ in range(3)]
        opened = trio.Event()

        async def run(number: int) -> None:
            mesh = network.node(peer(number), role=role if number == 2 else "voter")
            async with open_simulated_contexts(
                mesh,
                log,  # type: ignore[arg-type]
                stores[number],
                rng=random.Random(number),
            ) as service:
                services.append(service)
                if len(services) == 3:
                    opened.set()
                await trio.sleep_forever()

        for number in range(3):
            nursery.start_soon(run, number)
        await opened.wait()
        services.sort(key=lambda each: [A, B, C].index(each.peer_id))
        await network.connect_all()
        yield Pair(log, services, stores)
        nursery.cancel_scope.cancel()
