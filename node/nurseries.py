"""Scopes: a nursery that belongs to a context manager, and deadlines in our own errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from pyagent_node.base.errors import DeadlineExceeded


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


@contextmanager
def deadline(seconds: float, message: str, *, code: str, **facts: str) -> Iterator[None]:
    """Give the block ``seconds``; raises :class:`DeadlineExceeded` with ``message`` after that."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise DeadlineExceeded(message, code=code, remedy=None, seconds=seconds, **facts) from None
