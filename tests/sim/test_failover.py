"""Generations outlive the ranks that compute them: no token is lost, doubled or changed."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    LimitExceeded,
    PyAgentError,
    RunnerFailed,
    Unavailable,
)
from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend import PREFILL_CHUNK, StepInput, StepOutput
from pyagent_node.inference.generation import (
    Finished,
    GenerationEvent,
    GenerationRequest,
    Usage,
)
from pyagent_node.inference.pipeline.recovery import MAX_DEATHS, RECOVERY_SECONDS
from pyagent_node.inference.pipeline.stage_types import StageLimits
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import ToyRunner
from pyagent_node.simulations.pipeline import MODEL, PipelineWorld, open_pipeline_world, peer

from .failover import (
    LAYERS,
    Journals,
    drained,
    expected,
    prompt,
    request,
    stream,
    timeless,
    tokens_of,
)

Fault = Callable[[PipelineWorld], None]


def usage_of(events: list[GenerationEvent]) -> Usage:
    """Return the usage of a whole stream."""
    last = events[-1]
    assert isinstance(last, Finished)
    return last.usage


async def ended(
    world: PipelineWorld,
    ask: GenerationRequest,
    then: Callable[[int], object],
    kind: type[PyAgentError],
    match: str = ".",
) -> tuple[PyAgentError, list[int]]:
    """Call ``then`` with the number of events after each, until the answer ends in an error.

    Returns the error, and the tokens before it.
    """
    got: list[GenerationEvent] = []

    async def read() -> None:
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                got.append(event)
                then(len(got))

    with pytest.raises(kind, match=match) as caught:
        await read()
    return caught.value, tokens_of(got)


async def disturbed(
    world: PipelineWorld, fault: Callable[[], object], *, at: float, n: int = 30, length: int = 40
) -> Usage:
    """Check that an answer is right though there is a ``fault`` after a time; return its usage."""
    ask = request(prompt(length), n)
    got: list[GenerationEvent] = []
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            await stream(world, ask, got=got)

        nursery.start_soon(read)
        await trio.sleep(at)
        fault()
    assert tokens_of(got) == expected(ask)
    return usage_of(got)


# ---- one fault, at any moment ----------------------------------------------------------------


def kill(rank: int) -> Fault:
    """Return a fault that kills a runner, which is started again a second later."""

    def fault(world: PipelineWorld) -> None:
        world.runners[rank].kill()

        async def bring_back() -> None:
            await trio.sleep(1)
            world.restart(rank)

        world.start_soon(bring_back)

    return fault


def flap(*ends: int) -> Fault:
    """Return a fault that cuts two nodes, or one from all, for a moment."""

    def fault(world: PipelineWorld) -> None:
        network = world.network
        peers = [peer(end) for end in ends]

        async def mend() -> None:
            await trio.sleep(0.3)
            if len(peers) == 1:
                network.rejoin(peers[0])
            else:
                network.heal(peers[0], peers[1])

        if len(peers) == 1:
            network.isolate(peers[0])
        else:
            network.cut(peers[0], peers[1])
        world.start_soon(mend)

    return fault


FAULTS: dict[str, Fault] = {
    "first runner": kill(0),
    "middle runner": kill(1),
    "tail runner": kill(2),
    "first node": flap(1),
    "middle node": flap(2),
    "tail node": flap(3),
    "link between ranks": flap(2, 3),
    "link to the first": flap(0, 1),
    "link from the tail": flap(0, 3),
    "other cut": lambda world: void(world.place((5,), (4, 2))),
    "moved rank": lambda world: void(world.place((3, 7), (1, 4, 3))),
    "one node for all": lambda world: void(world.place((), (4,))),
    "same ranks, new epoch": lambda world: void(world.place((3, 7), (1, 2, 3), keep=True)),
}


def void(_: object) -> None:
    """Make a statement of an expression."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("length", "moments"), [(5, 12), (530, 5)])
async def test_one_fault_at_any_moment_changes_no_token(
    fault: str, length: int, moments: int, autojump_clock: MockClock
) -> None:
    for moment in range(moments):
        async with open_pipeline_world(5, latency=0.003) as world:
            world.place((3, 7), (1, 2, 3), seconds=0.02)
            at = 0.0123 + moment * 1.6 / moments
            strike = functools.partial(FAULTS[fault], world)
            await disturbed(world, strike, at=at, n=20, length=length)
            await trio.sleep(1.5)
            await drained(world)


async def test_the_usage_tells_what_a_failover_cost(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4, latency=0.003) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.02)
        ask = request(prompt(600), 40)
        calm = usage_of(await stream(world, ask))
        assert (calm.failovers, calm.recomputed_tokens) == (0, 0)
        assert 0.05 < calm.stall_seconds < 0.1
        usage = await disturbed(world, lambda: kill(1)(world), at=1.0, n=40, length=600)
        assert usage.failovers == 1
        assert 600 < usage.recomputed_tokens < 640
        assert 1.0 < usage.stall_seconds < 2.0
        assert (usage.prompt_tokens, usage.completion_tokens) == (600, 40)


async def test_a_newer_placement_takes_running_sessions_over_at_once(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(5, latency=0.003) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.02)
        usage = await disturbed(world, lambda: world.place((5,), (4, 2)), at=1.0)
        assert usage.failovers == 1
        assert usage.stall_seconds < 0.4


async def test_the_journal_is_fed_in_the_same_chunks_and_then_in_short_steps(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4) as world:
        world.place((3, 7), (0, 1, 2))
        ask = request(prompt(PREFILL_CHUNK + 3), 60)
        got: list[GenerationEvent] = []
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                got.append(event)
                if len(got) == 30:
                    world.place((5,), (3, 1))
        assert tokens_of(got) == expected(ask)
        for runner in world.runners:
            assert runner.widths[:2] == [[PREFILL_CHUNK], [3]]
            replayed = [width for (width,) in runner.widths[2:] if width > 1]
            assert 3 <= len(replayed) <= 5
            assert max(replayed) <= 8
            assert sum(map(sum, runner.widths)) == PREFILL_CHUNK + 3 + 59


# ---- texts, readers, ends --------------------------------------------------------------------


async def test_texts_stops_and_logprobs_are_those_of_an_undisturbed_answer(
    autojump_clock: MockClock,
) -> None:
    sampling = SamplingParams(seed=11, temperature=0.7, logprobs=True, top_logprobs=3)
    async with open_pipeline_world(5, latency=0.002) as world:
        world.place((3, 7), (1, 2, 3))
        whole = await stream(world, request(prompt(9), 60, sampling=sampling))
        text = "".join(event.text for event in whole)
        stop = (text[40:44], "never\x00there")
        ask = request(prompt(9), 60, sampling=sampling, stop=stop)
        calm = await stream(world, ask)
        assert "".join(event.text for event in calm) == text[: text.index(stop[0])]
        got: list[GenerationEvent] = []
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                got.append(event)
                if len(got) in (1, 7, 20, 38):
                    world.place((len(got) % 9 + 1,), (1 + len(got) % 4, 2))
        assert timeless(got) == timeless(calm)
        assert usage_of(got).failovers == 4
        await drained(world)


@pytest.mark.parametrize("back_after", [5.0, 400.0])
async def test_a_session_held_by_its_reader_moves_too(
    back_after: float, autojump_clock: MockClock
) -> None:
    limits = StageLimits(idle_seconds=2000)
    async with open_pipeline_world(4, latency=0.002, limits=limits) as world:
        world.place((3, 7), (1, 2, 3))
        ask = request(prompt(20), 200)
        got: list[GenerationEvent] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await stream(world, ask, pause=back_after, got=got)

            nursery.start_soon(read)
            await trio.sleep(back_after / 2)
            for _ in range(2):
                kill(1)(world)
                await trio.sleep(back_after)
        assert tokens_of(got) == expected(ask)
        assert usage_of(got).failovers == 2
        assert usage_of(got).stall_seconds < 3
        await trio.sleep(2)
        await drained(world)


@pytest.mark.slow
async def test_many_faults_in_a_row_are_survived_in_mid_replay_too(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4, latency=0.002) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.02)
        ask = request(prompt(1500), 60)
        got: list[GenerationEvent] = []
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                await stream(world, ask, got=got)

            nursery.start_soon(read)
            await trio.sleep(2.0)
            for turn in range(30):  # a replay takes longer than the time between two of these
                await trio.sleep(0.1)
                world.place((2 + turn % 5,), (1 + turn % 3, 1 + (turn + 1) % 3), seconds=0.02)
        assert tokens_of(got) == expected(ask)
        assert usage_of(got).failovers >= 10


async def test_an_unloaded_model_ends_its_sessions(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        placement = world.place((5,), (1, 2), seconds=0.1)
        engine = world.pipelines[0].engine

        def unload(_: int) -> None:
            engine.forget(MODEL)

        def unload_suspended(_: int) -> None:
            engine.withdraw(MODEL, placement.epoch)
            (view,) = engine.sessions()
            assert view.suspended
            engine.forget(MODEL)

        ask = request(prompt(5), 100)
        for then in (unload, unload_suspended):
            error, _ = await ended(world, ask, then, Conflict, "toy was unloaded while it")
            assert error.code == "model_unloaded"
        await drained(world)


async def test_a_head_that_loses_its_parts_for_a_while_goes_on_later(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(3) as world:
        placement = world.place((5,), (1, 2))
        engine = world.pipelines[0].engine

        async def bring_back() -> None:
            await trio.sleep(100)
            world.offer(placement)

        def lose() -> None:
            engine.withdraw(MODEL, placement.epoch)
            world.start_soon(bring_back)

        usage = await disturbed(world, lose, at=0.2)
        assert 100 < usage.stall_seconds < 101


async def test_a_request_that_kills_every_runner_is_given_up(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2))
        killed = 0

        async def keep_alive() -> None:
            nonlocal killed
            while True:
                await world.runners[1].failed.wait()
                killed += 1
                await trio.sleep(0.5)
                world.restart(1)
                poison(world.runners[1])

        world.start_soon(keep_alive)
        poison(world.runners[1])
        with pytest.raises(RunnerFailed, match="made no progress in 6 attempts"):
            await stream(world, request(prompt(40), 30))
        assert killed == MAX_DEATHS + 1
        await trio.sleep(1)
        assert world.sessions == 0


def poison(runner: ToyRunner) -> None:
    """Let a runner die of position 50."""
    compute = runner.decode

    async def decode(steps: list[StepInput]) -> list[StepOutput]:
        if any(step.position + len(step.tokens) > 50 for step in steps):
            runner.kill("SIGSEGV")
        return await compute(steps)

    runner.decode = decode  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("n_ctx", [100, 30])
async def test_a_context_too_short_for_the_rest_is_told(
    n_ctx: int, autojump_clock: MockClock
) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2))
        ask = request(prompt(40), 100)

        def shrink(count: int) -> None:
            if count == 9:
                world.place((5,), (1, 2), n_ctx=n_ctx)

        error, tokens = await ended(world, ask, shrink, LimitExceeded)
        assert error.code == "context_full"
        assert error.facts == {"n_ctx": n_ctx}
        assert len(tokens) >= max(9, n_ctx - 40)
        assert tokens == expected(ask)[: len(tokens)]
        await drained(world)


async def test_an_operator_or_a_new_head_can_end_a_session(autojump_clock: MockClock) -> None:
    journals = Journals()
    async with open_pipeline_world(3, journal=journals) as world:
        world.place((5,), (1, 2))
        engine = world.pipelines[0].engine
        stable = SessionId("5" * 32)
        fenced = Conflict("Another node heads it now.", code="session_claimed")
        assert not engine.fail(stable, fenced)
        ask = request(prompt(5), session=stable)
        error, _ = await ended(world, ask, lambda _: engine.fail(stable, fenced), Conflict)
        assert error is fenced
        assert journals.ended[stable][1] == "failed"
        await drained(world)


async def test_a_session_that_nothing_takes_over_leaves_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4) as world:
        world.place((3, 7), (1, 2, 3))
        start = trio.current_time()

        def isolate(count: int) -> None:
            if count == 3:
                world.network.isolate(peer(2))

        match = "Nothing could take over in time"
        error, _ = await ended(world, request(prompt(5)), isolate, Unavailable, match)
        assert error.code == "peer_lost"
        assert error.facts == {"rank": 1, "peer_id": peer(2)}
        assert RECOVERY_SECONDS < trio.current_time() - start < RECOVERY_SECONDS + 3
        await drained(world)


# ---- everything at once ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_random_faults_change_no_token(seed: int, autojump_clock: MockClock) -> None:
    rng = random.Random(seed)
    numbers = {peer(number): number for number in range(6)}
    async with open_pipeline_world(6, latency=0.003) as world:
        world.place((3, 7), (1, 2, 3), n_seq=4)
        left = 5

        async def ask(number: int) -> None:
            nonlocal left
            dice = random.Random(1000 * seed + number)
            sampling = SamplingParams(
                seed=number, temperature=dice.choice([0.0, 0.9]), repetition_penalty=1.1
            )
            one = request(prompt(dice.choice([1, 30, 520]), number), 150, sampling=sampling)
            await trio.sleep(dice.uniform(0, 3))
            pause = dice.choice([0.0, 0.0, 2.0])
            got = await stream(world, one, node=dice.choice([0, 4, 5]), pause=pause)
            assert tokens_of(got) == expected(one)
            left -= 1

        async with trio.open_nursery() as nursery:
            for number in range(left):
                nursery.start_soon(ask, number)
            while left:
                await trio.sleep(rng.expovariate(1.5))
                ranks = len(world.runners)
                match rng.randrange(5):
                    case 0:
                        kill_if_alive(world, rng.randrange(ranks))
                    case 1:
                        flap(rng.choice([1, 2, 3]))(world)
                    case 2:
                        flap(*rng.sample(range(6), 2))(world)
                    case 3:
                        cuts = sorted(rng.sample(range(1, LAYERS), rng.randrange(3)))
                        on = rng.choices([1, 2, 3], k=len(cuts) + 1)
                        world.place(cuts, on, n_seq=4)
                    case 4:
                        if all(runner.failure is None for runner in world.runners):
                            slices = [rank.slice.first for rank in world.placement.ranks[1:]]
                            on = [numbers[rank.peer_id] for rank in world.placement.ranks]
                            world.place(slices, on, n_seq=4, keep=True)
        await trio.sleep(400)
        await drained(world)


def kill_if_alive(world: PipelineWorld, rank: int) -> None:
    """Kill a runner and start it again after a second, unless it was replaced by then."""
    runner, epoch = world.runners[rank], world.placement.epoch
    if runner.failure is not None:
        return
    runner.kill()

    async def bring_back() -> None:
        await trio.sleep(1)
        if world.placement.epoch == epoch:
            world.restart(rank)

    world.start_soon(bring_back)
