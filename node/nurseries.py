"""A nursery that belongs to a context manager, without wrapping its user's exceptions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for background tasks; leaving the block cancels them.

    An exception of the block leaves as it is, not inside an ``ExceptionGroup``; one of a
    background task (a defect: they guard themselves) cancels the block and leaves in a group.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as error:  # raised again below, outside of the nursery
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
