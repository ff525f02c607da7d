"""Whole pipelines of the toy model on the simulated mesh and clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    RunnerFailed,
    Unavailable,
)
from pyagent_node.base.limits import DIAL_SECONDS, MAX_SESSIONS_PER_PEER, STEP_SECONDS
from pyagent_node.inference.generation import (
    ChatMessage,
    Finished,
    Generated,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.links import CLOSE_AGAIN_SECONDS
from pyagent_node.inference.pipeline.recovery import READY_SECONDS, RECOVERY_SECONDS
from pyagent_node.inference.pipeline.stage_types import StageLimits
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import ToyRunner, toy_generate
from pyagent_node.simulations.pipeline import NAME, PipelineWorld, open_pipeline_world, peer

LAYERS = 10


def prompt(length: int, seed: int = 0) -> list[int]:
    """Return a prompt of ``length`` characters."""
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(length)]


def request(tokens: list[int], **kwargs: object) -> GenerationRequest:
    """Return a request for the toy."""
    defaults: dict[str, object] = {"sampling": SamplingParams(temperature=0.0)}
    return GenerationRequest(NAME, tokens=tuple(tokens), **(defaults | kwargs))  # type: ignore[arg-type]


async def read(
    world: PipelineWorld,
    ask: GenerationRequest,
    then: Callable[[], object],
    *,
    after: int = 1,
    pause: float = 0.0,
) -> None:
    """Ask node 0, do ``then`` after some tokens and pause, and read on to the end."""
    async with world.pipelines[0].engine.generate(ask) as events:
        seen = 0
        async for event in events:
            seen += isinstance(event, Generated)
            if seen == after and isinstance(event, Generated):
                then()
                await trio.sleep(pause)


async def drained(world: PipelineWorld) -> None:
    """Give closings a second to arrive, and check that nothing is left anywhere."""
    await trio.sleep(1)
    assert world.sessions == 0
    assert world.open_slots == 0
    assert all(view.queued == 0 for p in world.pipelines for view in p.stages.views())
    assert all(p.engine.sessions() == [] for p in world.pipelines)


# ---- the same tokens, however it is cut ------------------------------------------------------


@pytest.mark.parametrize(
    ("boundaries", "nodes"),
    [
        ((), (0,)),
        ((), (1,)),
        ((5,), (0, 1)),
        ((1,), (1, 0)),
        ((3, 7), (1, 2, 3)),
        ((1, 9), (0, 1, 0)),
        ((3, 7), (0, 0, 0)),
        ((2, 4, 6, 8), (3, 1, 0, 2, 1)),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_any_cut_gives_the_tokens_of_the_whole_model(
    boundaries: tuple[int, ...],
    nodes: tuple[int, ...],
    temperature: float,
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4, latency=0.005) as world:
        world.place(boundaries, nodes)
        for seed in (1, 2):
            sampling = SamplingParams(
                seed=seed, temperature=temperature, repetition_penalty=1.1, top_k=40
            )
            tokens = prompt(30, seed)
            answer = await world.ask(0, tokens, max_tokens=25, sampling=sampling)
            assert answer.tokens == toy_generate(LAYERS, tokens, 25, sampling)
        await drained(world)


async def test_concurrent_sessions_of_several_heads_do_not_touch_each_other(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4, latency=0.003) as world:
        world.place((3, 7), (1, 2, 3), n_seq=4)

        async def one(index: int) -> None:
            sampling = SamplingParams(seed=index, temperature=0.9)
            tokens = prompt(5 + 130 * index, index)
            answer = await world.ask(index % 4, tokens, max_tokens=15, sampling=sampling)
            assert answer.tokens == toy_generate(LAYERS, tokens, 15, sampling)

        async with trio.open_nursery() as nursery:
            for index in range(12):
                nursery.start_soon(one, index)
        await drained(world)


async def test_waiting_steps_share_a_batch_and_a_prefill_runs_alone(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(2) as world:
        for nodes, width in (((0,), 6), ((0, 1), 2)):
            world.place((5,)[: len(nodes) - 1], nodes, seconds=0.05)
            async with trio.open_nursery() as nursery:
                for index in range(6):
                    nursery.start_soon(world.ask, 0, prompt(600, index))
            for runner in world.runners:
                assert any(len(widths) >= width for widths in runner.widths)
                for widths in runner.widths:
                    assert len(widths) == 1 or set(widths) == {1}
                    assert max(widths) <= 512


async def test_every_rank_works_on_another_chunk_of_a_long_prompt(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(3) as world:
        world.place((3, 7), (0, 1, 2), seconds=1.0)
        answer = await world.ask(0, prompt(512 * 6), max_tokens=1)
        # Six chunks through three ranks: eight seconds in a pipeline, eighteen in a row.
        assert 8.0 <= answer.finished.usage.ttft_seconds < 9.0


# ---- requests --------------------------------------------------------------------------------


async def test_text_prompts_and_chats_are_tokenised_by_the_head(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1))
        engine = world.pipelines[1].engine
        assert await engine.tokenize(NAME, "hi") == [104, 105]
        params = SamplingParams(temperature=0.0)
        for ask, tokens in (
            (GenerationRequest(NAME, prompt="hi", max_tokens=5, sampling=params), [128, 104, 105]),
            (
                GenerationRequest(
                    NAME, messages=(ChatMessage("user", "x"),), max_tokens=5, sampling=params
                ),
                [ord(c) for c in "user:x\n"],
            ),
        ):
            async with engine.generate(ask) as events:
                got = [e.token async for e in events if isinstance(e, Generated)]
            assert got == toy_generate(LAYERS, tokens, 5, params)


async def test_the_context_bounds_prompt_and_answer(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1), n_ctx=64)
        with pytest.raises(InvalidRequest) as caught:
            await world.ask(0, prompt(64))
        assert caught.value.code == "prompt_too_long"
        assert caught.value.facts == {"prompt_tokens": 64, "n_ctx": 64}
        answer = await world.ask(0, prompt(60), max_tokens=50)
        assert answer.finished.reason == "length"
        assert len(answer.tokens) == 4
        engine = world.pipelines[0].engine
        async with engine.generate(request(prompt(63), ignore_eos=True)) as events:
            assert [type(e) async for e in events] == [Generated, Finished]
        await drained(world)


@pytest.mark.parametrize(
    ("bad", "parameter"),
    [
        (GenerationRequest(NAME), "prompt"),
        (GenerationRequest(NAME, prompt="a", tokens=(1,)), "prompt"),
        (GenerationRequest(NAME, tokens=()), "prompt"),
        (GenerationRequest(NAME, messages=()), "messages"),
        (GenerationRequest(NAME, tokens=(130,)), "tokens"),
        (GenerationRequest(NAME, tokens=(-1,)), "tokens"),
        (GenerationRequest(NAME, prompt="a", max_tokens=0), "max_tokens"),
        (GenerationRequest(NAME, prompt="a", stop=("",)), "stop"),
        (GenerationRequest(NAME, prompt="a", stop=("x" * 257,)), "stop"),
        (GenerationRequest(NAME, prompt="a", stop=("x",) * 17), "stop"),
        (GenerationRequest(NAME, prompt="a", sampling=SamplingParams(top_p=2.0)), "top_p"),
        (
            GenerationRequest(NAME, prompt="a", sampling=SamplingParams(logit_bias={130: 1.0})),
            "logit_bias",
        ),
    ],
)
async def test_bad_parameters_are_named(bad: GenerationRequest, parameter: str) -> None:
    async with open_pipeline_world(1) as world:
        world.place((), (0,))
        with pytest.raises(InvalidRequest) as caught:
            async with world.pipelines[0].engine.generate(bad):
                pass
        assert caught.value.code == "bad_parameter"
        assert caught.value.facts["parameter"] == parameter
        assert world.pipelines[0].engine.sessions() == []


async def test_an_unknown_model_is_refused() -> None:
    async with open_pipeline_world(1) as world:
        world.place((), (0,))
        with pytest.raises(NotFound, match=r"'gpt-9' is not loaded; loaded are: toy\.") as caught:
            async with world.pipelines[0].engine.generate(GenerationRequest("gpt-9", prompt="a")):
                pass
        assert caught.value.code == "model_not_found"


async def test_models_and_sessions_are_listed(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        placement = world.place((5,), (0, 1), seconds=0.1)
        for pipeline in world.pipelines:
            (model,) = pipeline.engine.models()
            assert (model.name, model.placement) == (NAME, placement)
        async with world.pipelines[2].engine.generate(request(prompt(9))) as events:
            for _ in range(4):
                await anext(events)
            views = [p.engine.sessions() for p in world.pipelines]
        for (view,) in views:
            assert (view.model, view.head, view.prompt_tokens) == (NAME, peer(2), 9)
            assert 3 <= view.completion_tokens <= 6
            assert 4 < view.tokens_per_second < 12
        assert len({view.session[:16] for (view,) in views}) == 1


async def test_more_requests_than_slots_wait_and_more_than_the_limit_are_refused(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1), n_seq=1, seconds=0.01)
        outcomes: list[str] = []

        async def one(index: int) -> None:
            try:
                await world.ask(0, prompt(4, index), max_tokens=3)
            except LimitExceeded as error:
                outcomes.append(error.code)
            else:
                outcomes.append("answered")

        async with trio.open_nursery() as nursery:
            for index in range(MAX_SESSIONS_PER_PEER + 3):
                nursery.start_soon(one, index)
        assert sorted(outcomes) == ["answered"] * MAX_SESSIONS_PER_PEER + ["too_many_sessions"] * 3
        await drained(world)


async def test_a_slow_reader_holds_the_session_back_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1))
        ask = request(prompt(5), max_tokens=200, ignore_eos=True)
        got: list[int] = []
        async with world.pipelines[0].engine.generate(ask) as events:
            async for event in events:
                if isinstance(event, Generated):
                    got.append(event.token)
                if len(got) == 1:
                    await trio.sleep(100)
                    (session,) = world.pipelines[0].engine.sessions()
                    assert session.completion_tokens < 70
        assert len(got) == 200


# ---- leaving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.0, 0.02, 0.5, 1.7, 3.0])
async def test_a_cancelled_request_is_gone_from_every_rank_within_a_second(
    after: float, autojump_clock: MockClock
) -> None:
    async with open_pipeline_world(4, latency=0.01) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.2)
        with trio.move_on_after(after) as scope:
            await world.ask(0, prompt(2000), max_tokens=1000)
        assert scope.cancelled_caught
        await drained(world)
        assert (await world.ask(0, prompt(3), max_tokens=2)).finished.reason == "length"


async def test_leaving_after_some_tokens_closes_the_session(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        world.place((3, 7), (0, 1, 2), seconds=0.05)
        async with world.pipelines[0].engine.generate(request(prompt(8))) as events:
            for _ in range(5):
                await anext(events)
        await drained(world)
        tokens_then = [r.tokens_done for r in world.runners]
        await trio.sleep(5)
        assert [r.tokens_done for r in world.runners] == tokens_then


async def test_a_stop_string_ends_the_work_too(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1))
        whole = (await world.ask(0, prompt(8), max_tokens=30)).text
        stop = whole[10:13]
        ask = request(prompt(8), max_tokens=30, stop=(stop,))
        async with world.pipelines[0].engine.generate(ask) as events:
            text = "".join([event.text async for event in events])
        assert text == whole[: whole.index(stop)]
        await drained(world)


# ---- failures --------------------------------------------------------------------------------


async def test_a_killed_runner_is_named_when_nothing_replaces_it(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(3) as world:
        placement = world.place((3, 7), (0, 1, 2), seconds=0.05)
        with pytest.raises(RunnerFailed, match="Nothing could take over in time") as caught:
            await read(world, request(prompt(8)), world.runners[1].kill, after=3)
        assert caught.value.facts == {"rank": 1, "peer_id": peer(1), "reason": "SIGKILL"}
        assert RECOVERY_SECONDS <= trio.current_time() < RECOVERY_SECONDS + 2
        assert [f.facts["reason"] for f in world.failures] == ["SIGKILL"]
        await trio.sleep(1)
        assert world.sessions == 0

        async def bring_back() -> None:
            await trio.sleep(5)
            world.runners[1] = ToyRunner(placement.ranks[1].slice, n_ctx=4096, n_seq=8)
            world.start_rank(placement, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bring_back)
            sampling = SamplingParams(temperature=0.0)
            answer = await world.ask(0, prompt(8), max_tokens=5, sampling=sampling)
        assert answer.tokens == toy_generate(LAYERS, prompt(8), 5, sampling)


async def test_a_rank_that_does_not_come_back_is_named(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        world.place((3, 7), (0, 1, 2))
        world.runners[2].kill()
        await trio.sleep(1)
        start = trio.current_time()
        with pytest.raises(Unavailable) as caught:
            await world.ask(0, prompt(8))
        assert caught.value.code == "stage_not_ready"
        assert caught.value.facts == {"rank": 2, "peer_id": peer(2)}
        assert READY_SECONDS <= trio.current_time() - start < READY_SECONDS + 1
        world.unplace()


@pytest.mark.parametrize("lost", [1, 2, 3])
async def test_a_lost_node_is_named_and_frees_the_other_ranks(
    lost: int, autojump_clock: MockClock
) -> None:
    async with open_pipeline_world(4, latency=0.005) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.05)
        with pytest.raises(Unavailable) as caught:
            await read(world, request(prompt(8)), lambda: world.network.isolate(peer(lost)))
        assert caught.value.code == "peer_lost"
        assert caught.value.facts["peer_id"] == peer(lost)
        await drained(world)
        world.network.rejoin(peer(lost))
        await trio.sleep(1)
        assert (await world.ask(0, prompt(8), max_tokens=4)).finished.reason == "length"


async def test_a_lost_head_frees_its_sessions_on_every_rank(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(4) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.05)

        def lose() -> None:
            assert world.sessions == 3
            world.network.isolate(peer(0))

        with pytest.raises(Unavailable):
            await read(world, request(prompt(8)), lose)
        await drained(world)


async def test_a_cut_between_two_ranks_alone_ends_the_session_with_the_far_rank_named(
    autojump_clock: MockClock,
) -> None:
    async with open_pipeline_world(4) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.05)
        with pytest.raises(Unavailable) as caught:
            await read(world, request(prompt(8)), lambda: world.network.cut(peer(2), peer(3)))
        assert caught.value.code == "peer_lost"
        assert caught.value.facts["rank"] in (1, 2)
        await drained(world)


async def test_a_head_with_an_old_placement_is_fenced_off(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3) as world:
        old = world.place((3, 7), (0, 1, 2))
        new = world.place((5, 8), (0, 1, 2))
        world.offer(old)
        got: list[PyAgentError] = []

        async def ask() -> None:
            try:
                await world.ask(0, prompt(8), max_tokens=4)
            except PyAgentError as error:
                got.append(error)

        await ask()
        (error,) = got
        assert error.code == "stale_epoch"
        assert error.facts["epoch"] == new.epoch
        assert all(r.tokens_done == 0 for r in world.runners)

        # A head that learns of the new placement while it tries again is served.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(3)
            world.offer(new)
        assert len(got) == 1
        await drained(world)


@pytest.mark.parametrize("begin", [0.0, *(n / 8.1 for n in range(64, 80))])
async def test_a_rank_that_hangs_is_given_up_at_the_deadline(
    begin: float, autojump_clock: MockClock
) -> None:
    """At any time: the deadline must have passed for whoever was woken by it, to the last bit."""
    await trio.sleep(begin)
    async with open_pipeline_world(2) as world:
        world.place((5,), (0, 1), seconds=10 * STEP_SECONDS)
        with pytest.raises(DeadlineExceeded) as caught:
            await world.ask(0, prompt(8))
        assert caught.value.code == "step_deadline"
        assert trio.current_time() >= STEP_SECONDS
        await trio.sleep(20 * STEP_SECONDS)
        await drained(world)


async def test_a_session_that_its_head_forgot_is_freed(autojump_clock: MockClock) -> None:
    async with open_pipeline_world(3, limits=StageLimits(idle_seconds=20)) as world:
        world.place((3, 7), (0, 1, 2))
        ask = request(prompt(8), max_tokens=1000, ignore_eos=True)
        with pytest.raises(DeadlineExceeded) as caught:
            await read(world, ask, lambda: None, pause=40)
        assert caught.value.code == "session_idle"
        await drained(world)


async def test_a_session_is_closed_when_its_closing_was_lost_on_the_way(
    autojump_clock: MockClock,
) -> None:
    """The head cannot open its stream to the tail, which reaches the head all the same."""
    async with open_pipeline_world(4) as world:
        world.place((3, 7), nodes=(1, 2, 3))
        asked = request(prompt(5), max_tokens=3)
        await read(world, asked, lambda: world.network.hold(peer(0), peer(3)))
        await trio.sleep(DIAL_SECONDS + 2)  # by now the stream has been given up
        assert world.sessions == 1
        world.network.release(peer(0), peer(3))
        await trio.sleep(CLOSE_AGAIN_SECONDS)
        await drained(world)
        assert world.open_slots == 0
