"""Runs the generations of one request side by side and merges their events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.generation import Engine, GenerationEvent, GenerationRequest
from pyagent_node.node.api.errors import as_pyagent_error

_QUEUED_EVENTS: Final = 32
"""Events waiting for a slow reader; then the generations wait too."""

ChoiceEvent = tuple[int, GenerationEvent]


class ChoiceEvents:
    """An asynchronous iterator of ``(choice, event)``; ends when every choice has finished.

    The first error of any choice is raised in its place.
    """

    def __init__(self, source: trio.MemoryReceiveChannel[ChoiceEvent | PyAgentError]) -> None:
        self._source = source

    def __aiter__(self) -> ChoiceEvents:
        return self

    async def __anext__(self) -> ChoiceEvent:
        try:
            item = await self._source.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        if isinstance(item, PyAgentError):
            raise item
        return item


@asynccontextmanager
async def run_choices(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> AsyncIterator[ChoiceEvents]:
    """Generate every request; leaving the context cancels what still runs, on every rank."""
    sending, receiving = trio.open_memory_channel[ChoiceEvent | PyAgentError](_QUEUED_EVENTS)
    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(_run_one, engine, index, request, sending.clone())
        sending.close()
        with receiving:
            yield ChoiceEvents(receiving)
        nursery.cancel_scope.cancel()


async def _run_one(
    engine: Engine,
    index: int,
    request: GenerationRequest,
    sending: trio.MemorySendChannel[ChoiceEvent | PyAgentError],
) -> None:
    with sending:
        try:
            async with engine.generate(request) as events:
                async for event in events:
                    await sending.send((index, event))
        except trio.BrokenResourceError:
            return  # the reader left; its scope is being cancelled
        except Exception as error:
            failure = as_pyagent_error(error)
            try:
                await sending.send(failure)
            except trio.BrokenResourceError:
                return
