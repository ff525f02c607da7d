"""Generations and their readers, with an engine that tells what is done to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from pyagent_node.base.errors import Conflict, PyAgentError, RunnerFailed
from pyagent_node.base.types import Digest, Placement, SessionId
from pyagent_node.inference.generation import (
    ChatMessage,
    Finished,
    Generated,
    GenerationEvent,
    GenerationRequest,
    Usage,
)
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.live_session import READ_AHEAD, Reader
from pyagent_node.node.live_sessions import (
    MAX_UNREAD,
    LiveSessions,
    Recovered,
    open_live_sessions,
)
from pyagent_node.node.session_recovery import session_not_found

PLACEMENT = Placement(Digest("ab" * 32), 1, (), 10, 1)


class Engine:
    """Counts up to ``max_tokens``, a token whenever it is let."""

    def __init__(self) -> None:
        self.made = 0
        self.running = 0
        self.limit = 10**9
        self.fail_at: int | None = None
        self.failed: list[tuple[SessionId, str]] = []
        self._let = trio.Event()

    def let(self, n: int) -> None:
        self.limit = n
        self._let.set()
        self._let = trio.Event()

    def models(self):
        return []

    def sessions(self):
        return []

    async def tokenize(self, model: str, text: str) -> list[int]:
        return []

    async def chat(self, model: str, messages: Sequence[ChatMessage]) -> list[int]:
        return []

    def fail(self, session: SessionId, error: PyAgentError) -> bool:
        self.failed.append((session, error.code))
        return True

    @asynccontextmanager
    async def generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        assert request.max_tokens is not None
        async with self._count(request.max_tokens) as events:
            yield events

    @asynccontextmanager
    async def resume(
        self, journal: SessionJournal, after: int
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        assert after == 0
        async with self._count(journal.budget) as events:
            yield events

    @asynccontextmanager
    async def _count(self, n: int) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        async def events() -> AsyncGenerator[GenerationEvent, None]:
            for token in range(n):
                while token >= self.limit:
                    await self._let.wait()
                if token == self.fail_at:
                    raise RunnerFailed("It broke.", reason="test")
                await trio.lowlevel.checkpoint()
                self.made += 1
                yield Generated(token, str(token), b"")
            yield Finished("length", "", Usage(1, n, 0.0, 0.0), PLACEMENT)

        self.running += 1
        stream = events()
        try:
            yield stream
        finally:
            await stream.aclose()
            self.running -= 1


class Journals:
    def __init__(self) -> None:
        self.held: dict[SessionId, int] = {}
        self.done: list[SessionId] = []
        self.known: dict[SessionId, Recovered] = {}
        self.recovered = 0
        self.gate: trio.Event | None = None

    def retain(self, session: SessionId, claim: int = 1) -> None:
        self.held[session] = claim

    def release(self, session: SessionId) -> None:
        del self.held[session]
        self.done.append(session)

    async def recover(self, session: SessionId) -> Recovered:
        self.recovered += 1
        if self.gate is not None:
            await self.gate.wait()
        if session not in self.known:
            raise session_not_found(session)
        return self.known[session]


class World:
    def __init__(self, engine: Engine, journals: Journals, live: LiveSessions) -> None:
        self.engine = engine
        self.journals = journals
        self.live = live


@asynccontextmanager
async def opened() -> AsyncIterator[World]:
    engine, journals = Engine(), Journals()
    async with open_live_sessions(engine, journals, journals.recover) as live:
        yield World(engine, journals, live)


def request(n: int, number: int = 1) -> GenerationRequest:
    session = SessionId(f"{number:032x}")
    return GenerationRequest("m", prompt="x", max_tokens=n, session=session, label="l")


S = SessionId(f"{1:032x}")


async def tokens(reader: Reader) -> list[int]:
    return [event.token async for event in reader if isinstance(event, Generated)]


async def test_an_answer_is_read_to_its_end_and_forgotten():
    async with opened() as world:
        async with world.live.generate(request(5)) as reader:
            assert world.journals.held == {S: 1}
            assert await tokens(reader) == [0, 1, 2, 3, 4]
            with pytest.raises(StopAsyncIteration):
                await reader.__anext__()
        assert world.journals.done == [S]
        assert len(world.live) == 0


async def test_a_slow_reader_holds_the_generation_up():
    async with opened() as world:
        async with world.live.generate(request(1000)) as reader:
            await trio.testing.wait_all_tasks_blocked()
            assert world.engine.made == READ_AHEAD
            for _ in range(10):
                await reader.__anext__()
            await trio.testing.wait_all_tasks_blocked()
            assert world.engine.made == READ_AHEAD + 10
        assert world.engine.running == 0


async def test_leaving_ends_it_unless_it_was_asked_to_wait(autojump_clock):
    async with opened() as world:
        async with world.live.generate(request(1000)) as reader:
            await reader.__anext__()
        assert world.engine.running == 0
        assert len(world.live) == 0
        async with world.live.generate(request(1000), resume_seconds=5) as reader:
            await reader.__anext__()
        await trio.sleep(4.9)
        assert len(world.live) == 1
        assert world.engine.made >= 1000, "nobody reads, so nothing holds it up"
        async with world.live.attach(S, 990) as reader:
            await trio.sleep(100)
            assert await reader.__anext__() == Generated(990, "990", b"")
            assert len(reader.skipped) == 990
        await trio.sleep(4.9)
        assert len(world.live) == 1
        await trio.sleep(0.2)
        assert len(world.live) == 0
        assert world.journals.done == [S, S]


async def test_the_last_reader_to_come_gets_the_answer(autojump_clock):
    async with opened() as world:
        world.engine.let(3)
        async with world.live.generate(request(6)) as first:
            for _ in range(3):
                await first.__anext__()
            async with world.live.attach(S, 1) as second:
                with pytest.raises(Conflict) as caught:
                    await first.__anext__()
                assert caught.value.code == "session_read_elsewhere"
                world.engine.let(9)
                assert await tokens(second) == [1, 2, 3, 4, 5]
        assert world.journals.done == [S]


async def test_errors_reach_the_reader_after_what_came_before(autojump_clock):
    async with opened() as world:
        world.engine.fail_at = 3
        async with world.live.generate(request(6), resume_seconds=60) as reader:
            for token in range(3):
                assert (await reader.__anext__()).token == token
        async with world.live.attach(S, 2) as reader:
            assert (await reader.__anext__()).token == 2
            with pytest.raises(RunnerFailed):
                await reader.__anext__()
        assert len(world.live) == 0, "its end was told"


async def test_beyond_the_end(autojump_clock):
    async with opened() as world:
        async with world.live.generate(request(6), resume_seconds=60):
            pass
        async with world.live.attach(S, 7) as reader:
            with pytest.raises(PyAgentError) as caught:
                await reader.__anext__()
            assert caught.value.code == "beyond_end"
            assert caught.value.http_status == 400
        async with world.live.attach(S, 6) as reader:
            assert isinstance(await reader.__anext__(), Finished)


async def test_what_was_sent_need_not_have_arrived(autojump_clock):
    async with opened() as world:
        for _ in range(2):
            async with world.live.generate(request(6), resume_seconds=60) as reader:
                assert len(await tokens(reader)) == 6
            await trio.sleep(29)
            async with world.live.attach(S, 4) as reader:
                assert await tokens(reader) == [4, 5]
            await trio.sleep(31)
            assert len(world.live) == 0


async def test_whole_answers_make_room_for_running_ones(autojump_clock):
    async with opened() as world:
        for number in range(1, MAX_UNREAD + 5):
            async with world.live.generate(request(3, number), resume_seconds=60) as reader:
                await tokens(reader)
        assert len(world.live) == MAX_UNREAD
        async with world.live.attach(SessionId(f"{MAX_UNREAD + 4:032x}"), 0) as reader:
            assert await tokens(reader) == [0, 1, 2]
        with pytest.raises(PyAgentError):
            async with world.live.attach(SessionId(f"{1:032x}"), 0):
                raise AssertionError("the oldest is gone")


async def test_sessions_of_others_are_taken_over_once(autojump_clock, nursery):
    async with opened() as world:
        journal = SessionJournal(S, PLACEMENT.model, SamplingParams(), (), 5, False, (1,), 0.0, "l")
        world.journals.known[S] = Recovered(journal, 3)
        world.journals.gate = trio.Event()
        ended: list[object] = []

        async def read() -> None:
            try:
                async with world.live.attach(S, 0) as reader:
                    ended.append(await tokens(reader))
            except PyAgentError as error:
                ended.append(error.code)

        for _ in range(3):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        world.journals.gate.set()
        await trio.sleep(1)
        assert world.journals.recovered == 1
        assert ended.count([0, 1, 2, 3, 4]) == 1
        assert ended.count("session_read_elsewhere") == 2
        assert world.live.taken_over == 1
        await trio.sleep(30)
        assert world.journals.done == [S]


async def test_a_session_that_cannot_be_found_can_be_asked_for_again(autojump_clock):
    async with opened() as world:
        for _ in range(2):
            with pytest.raises(PyAgentError) as caught:
                async with world.live.attach(S, 0):
                    raise AssertionError("there is none")
            assert caught.value.code == "session_not_found"
        assert world.live._coming == {}


async def test_a_session_taken_over_waits_for_its_reader(autojump_clock):
    async with opened() as world:
        journal = SessionJournal(
            S, PLACEMENT.model, SamplingParams(), (), 500, False, (1,), 0.0, "l"
        )
        world.journals.known[S] = Recovered(journal, 2)
        async with world.live.attach(S, 0) as reader:
            await reader.__anext__()
        await trio.sleep(29)
        assert len(world.live) == 1
        await trio.sleep(2)
        assert len(world.live) == 0


async def test_only_so_many_go_on_without_a_reader(autojump_clock):
    async with opened() as world:
        for number in range(1, MAX_UNREAD + 5):
            async with world.live.generate(request(10**6, number), resume_seconds=60):
                await trio.lowlevel.checkpoint()
        assert len(world.live) == MAX_UNREAD
        world.engine.let(0)


async def test_a_session_that_was_claimed_is_failed():
    async with opened() as world:
        world.live.claimed(S, Conflict("Taken.", code="session_claimed"))
        assert world.engine.failed == [(S, "session_claimed")]


async def test_one_id_is_one_session():
    async with opened() as world, world.live.generate(request(5)):
        with pytest.raises(Conflict) as caught:
            async with world.live.generate(request(5)):
                raise AssertionError("there is one already")
        assert caught.value.code == "session_exists"
