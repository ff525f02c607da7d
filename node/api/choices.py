"""Reads the generations of one request side by side and merges their events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.generation import GenerationEvent, GenerationRequest
from pyagent_node.node.api.errors import as_pyagent_error

_QUEUED_EVENTS: Final = 32
"""Events waiting for a slow reader; then the generations wait too."""

ChoiceEvent = tuple[int, GenerationEvent]
Generate = Callable[
    [GenerationRequest], AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]
]


@asynccontextmanager
async def run_choices(
    generate: Generate, requests: Sequence[GenerationRequest]
) -> AsyncIterator[AsyncIterator[ChoiceEvent]]:
    """Generate every request and give ``(choice, event)``, until every choice has finished.

    The first error of any choice is raised in its place.  Leaving the context leaves every
    generation.
    """
    if len(requests) == 1:
        async with generate(requests[0]) as events:
            yield _Only(events)
        return
    sending, receiving = trio.open_memory_channel[ChoiceEvent | PyAgentError](_QUEUED_EVENTS)
    async with trio.open_nursery() as nursery:
        for index, request in enumerate(requests):
            nursery.start_soon(_run_one, generate, index, request, sending.clone())
        sending.close()
        with receiving:
            yield _Merged(receiving)
        nursery.cancel_scope.cancel()


class _Only:
    """The events of one choice: no task in between."""

    def __init__(self, events: AsyncIterator[GenerationEvent]) -> None:
        self._events = events

    def __aiter__(self) -> _Only:
        return self

    async def __anext__(self) -> ChoiceEvent:
        return 0, await self._events.__anext__()


class _Merged:
    """The events of several."""

    def __init__(self, source: trio.MemoryReceiveChannel[ChoiceEvent | PyAgentError]) -> None:
        self._source = source

    def __aiter__(self) -> _Merged:
        return self

    async def __anext__(self) -> ChoiceEvent:
        try:
            item = await self._source.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        if isinstance(item, PyAgentError):
            raise item
        return item


async def _run_one(
    generate: Generate,
    index: int,
    request: GenerationRequest,
    sending: trio.MemorySendChannel[ChoiceEvent | PyAgentError],
) -> None:
    with sending:
        try:
            async with generate(request) as events:
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
