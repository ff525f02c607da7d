"""Journals: what the engine reports of its sessions, and going on from one at another head."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
)
from pyagent_node.base.types import Digest, SessionId
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.pipeline.requests import new_journal, plan_journal
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations.backend import END_TOKEN
from pyagent_node.simulations.pipeline import MODEL, PipelineWorld, open_pipeline_world, peer

from .failover import Journals, drained, expected, prompt, request, stream, timeless, tokens_of

S = SessionId("5" * 32)
RICH = SamplingParams(seed=11, temperature=0.7, logprobs=True, top_logprobs=2)


async def resumed(
    world: PipelineWorld, journal: SessionJournal, after: int, *, node: int = 2
) -> list[GenerationEvent]:
    """Go on with ``journal`` at another head."""
    async with world.pipelines[node].engine.resume(journal, after) as events:
        return [event async for event in events]


async def refused(
    world: PipelineWorld, journal: SessionJournal, kind: type[PyAgentError], *, after: int = 0
) -> PyAgentError:
    """Check that a journal is refused; return the error."""
    with pytest.raises(kind) as caught:
        await resumed(world, journal, after)
    return caught.value


def cut(journal: SessionJournal, n: int) -> SessionJournal:
    """Return the journal as it was after ``n`` tokens."""
    return msgspec.structs.replace(journal, tokens=journal.tokens[:n])


async def test_every_token_is_reported_before_it_is_shown(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(4, latency=0.002, journal=journals) as world:
        world.place((3, 7), (1, 2, 3))
        ask = msgspec.structs.replace(request(prompt(9), 40, session=S), label="chat 7")
        got: list[GenerationEvent] = []
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                got.append(event)
                assert len(journals.open[S].tokens) >= len(tokens_of(got))
                if len(got) == 12:
                    world.place((5,), (3, 2))
        journal, outcome = journals.ended[S]
        assert outcome == "finished"
        assert journal.prompt == prompt(9)
        assert [s.token for s in journal.tokens] == expected(ask) == tokens_of(got)
        assert (journal.model, journal.budget, journal.label) == (MODEL, 40, "chat 7")
        assert journal.sampling == ask.sampling
        assert journal.created > 1e9


async def test_the_journal_hears_how_a_session_ended(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        with trio.move_on_after(0.3):
            await stream(world, request(prompt(3), 1000, session=S))
        assert journals.ended[S][1] == "left"
        async with world.pipelines[0].engine.generate(request(prompt(3), 2, session=S)) as events:
            await anext(events)
            await anext(events)
            await trio.sleep(1)
        assert journals.ended[S][1] == "left"  # its last event was not taken
        unread: dict[SessionId, SessionJournal] = journals.open
        assert unread == {}


async def test_any_cut_of_a_journal_gives_the_same_events_from_any_token_on(
    autojump_clock: MockClock,
) -> None:
    journals = Journals()
    async with open_pipeline_world(4, latency=0.002, journal=journals) as world:
        world.place((3, 7), (1, 2, 3))
        whole = await stream(world, request(prompt(20), 40, sampling=RICH))
        text = "".join(event.text for event in whole)
        for stop, n in (((), 40), ((text[30:33], "zz"), 40), ((), 17)):
            ask = request(prompt(20), n, sampling=RICH, stop=stop, session=S)
            calm = await stream(world, ask)
            journal = journals.ended[S][0]
            count = len(journal.tokens)
            rng = random.Random(n)
            for _ in range(12):
                kept, after = rng.randrange(count + 1), rng.randrange(count + 1)
                world.place((rng.randrange(1, 9),), (rng.randrange(4), rng.randrange(4)))
                got = await resumed(world, cut(journal, kept), after)
                assert timeless(got) == timeless(calm[after:])
                last = got[-1]
                assert isinstance(last, Finished)
                assert last.usage.failovers <= 1
                again, outcome = journals.ended[S]
                assert (again, outcome) == (journal, "finished")
        await drained(world)


async def test_a_resumed_session_survives_its_ranks_too(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(4, latency=0.002, journal=journals) as world:
        world.place((3, 7), (1, 2, 3))
        ask = request(prompt(20), 200, session=S)
        await stream(world, ask)
        half = cut(journals.ended[S][0], 150)
        got: list[GenerationEvent] = []
        async with world.pipelines[0].engine.resume(half, 10) as events:
            async for event in events:
                got.append(event)
                if len(got) in (1, 80, 150):
                    world.place((2 + len(got) % 7,), (1, 3))
                    await trio.sleep(1)
        assert tokens_of(got) == expected(ask)[10:]


async def test_a_resumed_answer_waits_for_its_reader(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        ask = request(prompt(20), 300, session=S)
        await stream(world, ask)
        half = cut(journals.ended[S][0], 200)
        async with world.pipelines[0].engine.resume(half, 0) as events:
            await anext(events)
            await trio.sleep(50)
            (view,) = world.pipelines[0].engine.sessions()
            assert view.completion_tokens == 200
            got = [event async for event in events]
        assert tokens_of(got) == expected(ask)[1:]


async def test_a_reader_that_saw_more_than_was_saved_gets_the_rest(
    autojump_clock: MockClock,
) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        ask = request(prompt(20), 30, session=S)
        calm = await stream(world, ask)
        journal = journals.ended[S][0]
        for after in (11, 29, 30):
            got = await resumed(world, cut(journal, 10), after)
            assert timeless(got) == timeless(calm[after:])
        # An answer may end by itself before its budget.
        short = request(prompt(20), 30, session=S, stop=("".join(e.text for e in calm)[9:12],))
        ended = len(tokens_of(await stream(world, short)))
        assert ended < 20
        error = await refused(world, cut(journals.ended[S][0], 3), LimitExceeded, after=25)
        assert error.code == "beyond_end"
        assert error.facts == {"tokens": ended}
        assert await resumed(world, journals.ended[S][0], ended) != []


async def test_a_session_is_headed_once_on_a_node(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        await stream(world, request(prompt(5), 30, session=S), node=2)
        journal = cut(journals.ended[S][0], 5)
        async with world.pipelines[2].engine.resume(journal, 0) as events:
            await anext(events)
            assert (await refused(world, journal, Conflict)).code == "session_exists"
            with pytest.raises(Conflict):
                await stream(world, request(prompt(5), session=S), node=2)
            rest = [event async for event in events]
        assert isinstance(rest[-1], Finished)


TOKENS = (Sampled(5), Sampled(6))
GOOD = SessionJournal(
    session=S,
    model=MODEL,
    sampling=SamplingParams(temperature=0.0),
    stop=(),
    budget=10,
    ignore_eos=False,
    prompt=(1, 2, 3),
    created=1.0,
)


@pytest.mark.parametrize(
    "change",
    [
        {"session": SessionId("../../etc/passwd")},
        {"session": SessionId("F" * 32)},
        {"prompt": ()},
        {"prompt": (130,)},
        {"prompt": (-1,)},
        {"budget": 0},
        {"budget": -5},
        {"budget": 2**40},
        {"budget": 1, "tokens": TOKENS},
        {"tokens": (Sampled(130),)},
        {"tokens": (Sampled(-1),)},
        {"tokens": (Sampled(1, -0.5, ((4000, -1.0),)),)},
        {"tokens": (Sampled(END_TOKEN), Sampled(1))},
        {"stop": ("",)},
        {"stop": ("x" * 300,)},
        {"stop": ("x",) * 17},
        {"label": "x" * 20_000},
        {"sampling": SamplingParams(top_p=7.0)},
        {"pruning": Pruning(1)},
        {"pruning": Pruning(256), "root": bytes(32)},
    ],
)
async def test_a_broken_journal_is_refused(change: dict[str, object]) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        broken = msgspec.structs.replace(GOOD, **change)
        error = await refused(world, broken, CorruptData)
        assert error.code == "bad_journal"
        assert not journals.ended
        assert not journals.open
        assert world.pipelines[2].engine.sessions() == []


def test_how_many_cells_may_be_held_outlives_a_head() -> None:
    vocabulary = Vocabulary((b"x",) * 130, frozenset())
    for pruning in (None, Pruning(), Pruning(300)):
        journal = msgspec.structs.replace(GOOD, pruning=pruning)
        plan = plan_journal(journal, vocabulary, 0, head=peer(1))
        assert plan.pruning == pruning
        ask = GenerationRequest("toy", tokens=(1, 2, 3), pruning=pruning)
        again = new_journal(plan, np.array([1, 2, 3], np.int32), ask, created=1.0)
        assert again.pruning == pruning
    assert b"pruning" not in msgspec.msgpack.encode(GOOD)  # as old versions wrote it
    data = msgspec.msgpack.encode(msgspec.structs.replace(GOOD, pruning=Pruning(300)))
    assert msgspec.msgpack.decode(data, type=SessionJournal).pruning == Pruning(300)


@pytest.mark.parametrize("after", [-1, 11, 2**60])
async def test_a_start_outside_of_any_answer_is_refused(after: int) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2))
        error = await refused(world, GOOD, InvalidRequest, after=after)
        assert error.facts == {"parameter": "from"}


async def test_a_journal_of_another_model_or_for_a_longer_context_is_refused(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2), n_ctx=32)
        other = msgspec.structs.replace(GOOD, model=Digest("0" * 64))
        assert (await refused(world, other, NotFound)).code == "model_not_found"
        long = msgspec.structs.replace(GOOD, prompt=prompt(40))
        assert (await refused(world, long, LimitExceeded)).code == "context_full"
        await drained(world)


async def test_a_journal_without_tokens_begins_anew(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2))
        got = await resumed(world, GOOD, 0)
        assert all(isinstance(event, Generated) for event in got[:-1])
        ask = request((1, 2, 3), 10, sampling=GOOD.sampling)
        assert tokens_of(got) == expected(ask)
