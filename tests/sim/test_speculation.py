"""Guessing changes how soon tokens come, and none of them."""

from __future__ import annotations

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.generation import Finished, GenerationEvent, GenerationRequest
from pyagent_node.inference.pipeline.proposals import DRAFT_SECONDS
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import END_TOKEN
from pyagent_node.simulations.drafters import KINDS
from pyagent_node.simulations.pipeline import open_pipeline_world

from .drafters import oracles
from .failover import Journals, drained, expected, prompt, request, stream, timeless, tokens_of

SOUND = ("quick", "slow", "prompt", "reading")
BAD = ("illiterate", "stalling", "late", "dying", "buggy", "lying", "nonsense")


def guessing(
    ask: GenerationRequest, name: str, length: int | None = None, depth: int | None = None
) -> GenerationRequest:
    """Return ``ask`` with a drafter."""
    return msgspec.structs.replace(ask, speculation=name, draft_length=length, draft_depth=depth)


def usage(events: list[GenerationEvent]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last


@pytest.mark.parametrize("boundaries", [(), (3, 7)])
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
async def test_tokens_are_those_of_plain_decoding(
    boundaries: tuple[int, ...], name: str, wrong: float, autojump_clock: MockClock
) -> None:
    speculators, factories = oracles(wrong)
    journals = Journals()
    async with open_pipeline_world(
        4, latency=0.01, speculators=speculators, journal=journals
    ) as world:
        world.place(boundaries, range(1, len(boundaries) + 2))
        for seed, (length, depth) in enumerate([(5, 1), (31, 1), (2, 6)]):
            sampling = SamplingParams(
                seed=seed,
                temperature=0.8 * (seed % 2),
                repetition_penalty=1.1,
                frequency_penalty=0.2,
                logprobs=True,
                top_logprobs=2,
            )
            plain = request(prompt(20, seed), 40, sampling=sampling)
            ask = guessing(plain, name, length, depth)
            events = await stream(world, ask)
            assert tokens_of(events) == expected(plain)
            assert timeless(events) == timeless(await stream(world, plain))
            n = len(expected(plain))
            counts = usage(events).usage.speculation
            assert counts is not None
            assert counts.passes <= n
            assert 0 <= counts.accepted <= counts.drafted
            if wrong == 0.0 and depth == 1 and n == 40 and name != "reading":
                assert counts.accepted == counts.drafted
                assert counts.passes <= 1 + 39 // (length + 1) + 1
        await drained(world)
        assert all(d.closed == 1 for d in factories[name].made)
        assert all(o == "finished" for _, o in journals.ended.values())


async def test_guesses_save_trips_and_so_time(autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.0)
    async with open_pipeline_world(4, latency=0.05, speculators=speculators) as world:
        world.place((3, 7), (1, 2, 3), seconds=0.001)
        ask = request(prompt(20, 8), 60, sampling=SamplingParams(temperature=0.0))
        plain = usage(await stream(world, ask)).usage
        waiting = usage(await stream(world, guessing(ask, "quick", 3, 1))).usage
        flowing = usage(await stream(world, guessing(ask, "quick", 3, 4))).usage
        assert waiting.tokens_per_second > 3.5 * plain.tokens_per_second
        assert flowing.tokens_per_second > 2.5 * waiting.tokens_per_second
        chosen = usage(await stream(world, guessing(ask, "auto"))).usage
        assert chosen.tokens_per_second > 2 * plain.tokens_per_second


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("depth", [1, 3])
async def test_a_bad_drafter_costs_guesses_only(
    name: str, depth: int, autojump_clock: MockClock
) -> None:
    speculators, factories = oracles(0.1)
    async with open_pipeline_world(3, latency=0.01, speculators=speculators) as world:
        world.place((3, 7), (0, 1, 2))
        plain = request(prompt(20, 1), 60)
        for ask in (guessing(plain, name, 4, depth), guessing(plain, name)):
            events = await stream(world, ask)
            without = await stream(world, plain)
            assert timeless(events) == timeless(without)
            # one that does not answer is waited for once
            waited = DRAFT_SECONDS if name in ("stalling", "late") else 0.0
            limit = 1.05 * usage(without).usage.seconds + waited
            assert usage(events).usage.seconds < limit
        await drained(world)
        assert all(d.closed == 1 for d in factories[name].made)


@pytest.mark.parametrize("name", SOUND)
async def test_stop_strings_and_budgets_end_an_answer_within_a_run_of_right_guesses(
    name: str, autojump_clock: MockClock
) -> None:
    speculators, _ = oracles(0.0)
    async with open_pipeline_world(2, latency=0.01, speculators=speculators) as world:
        world.place((5,), (0, 1))
        whole = await stream(world, request(prompt(20, 2), 60))
        text = "".join(event.text for event in whole)
        for n in (1, 2, 3, 7, 30):
            plain = request(prompt(20, 2), n)
            ask = guessing(plain, name, 8, 3)
            assert timeless(await stream(world, ask)) == timeless(await stream(world, plain))
        for at in (3, 9, 20):
            plain = request(prompt(20, 2), 60, stop=(text[at : at + 2],))
            ask = guessing(plain, name, 8, 3)
            assert timeless(await stream(world, ask)) == timeless(await stream(world, plain))
        await drained(world)


async def test_an_end_token_within_a_run_ends_the_answer(autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.0)
    ended = 0
    async with open_pipeline_world(2, latency=0.01, speculators=speculators) as world:
        world.place((5,), (0, 1))
        for seed in range(6):
            sampling = SamplingParams(seed=seed, logit_bias={END_TOKEN: 4.5})
            plain = request(prompt(9, seed), 100, sampling=sampling)
            for depth in (1, 3):
                events = await stream(world, guessing(plain, "quick", 7, depth))
                assert timeless(events) == timeless(await stream(world, plain))
                ended += usage(events).reason == "stop"
        await drained(world)
    assert ended > 4


async def test_the_context_may_be_full_to_the_last_cell(autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.0)
    async with open_pipeline_world(2, speculators=speculators) as world:
        world.place((5,), (0, 1), n_ctx=64)
        for depth in (1, 4):
            plain = request(prompt(40, 1), 50, sampling=SamplingParams(temperature=0.0))
            events = await stream(world, guessing(plain, "quick", 31, depth))
            assert timeless(events) == timeless(await stream(world, plain))
        await drained(world)


async def test_a_slow_reader_holds_the_session_back_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    speculators, _ = oracles(0.1)
    async with open_pipeline_world(2, speculators=speculators) as world:
        world.place((5,), (0, 1))
        plain = request(
            prompt(20, 3), 250, sampling=SamplingParams(seed=1, logit_bias={END_TOKEN: -99})
        )
        for name in SOUND:
            events = await stream(world, guessing(plain, name, 6, 3), pause=30.0)
            assert tokens_of(events) == expected(plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quick", "slow"])
async def test_eight_sessions_at_once(name: str, autojump_clock: MockClock) -> None:
    speculators, _ = oracles(0.25)
    async with open_pipeline_world(4, latency=0.004, speculators=speculators) as world:
        world.place((3, 7), (1, 2, 3), n_seq=6)

        async def one(index: int) -> None:
            sampling = SamplingParams(seed=index, temperature=0.9 if index % 3 else 0.0)
            plain = request(prompt(5 + 200 * index, index), 50, sampling=sampling)
            ask = guessing(plain, name, index, 1 + index % 4) if index else plain
            assert tokens_of(await stream(world, ask, node=index % 4)) == expected(plain)

        async with trio.open_nursery() as nursery:
            for index in range(8):
                nursery.start_soon(one, index)
        await drained(world)


@pytest.mark.parametrize(
    ("choice", "parameter"),
    [
        ({"speculation": "crystal ball"}, "speculation"),
        ({"speculation": ""}, "speculation"),
        ({"speculation": "quick", "draft_length": -1}, "draft_length"),
        ({"speculation": "quick", "draft_length": 32}, "draft_length"),
        ({"speculation": "quick", "draft_depth": 0}, "draft_depth"),
        ({"speculation": "quick", "draft_depth": 9}, "draft_depth"),
    ],
)
async def test_a_choice_that_there_is_not_is_refused(
    choice: dict[str, object], parameter: str
) -> None:
    speculators, _ = oracles()
    async with open_pipeline_world(1, speculators=speculators) as world:
        world.place((), (0,))
        with pytest.raises(InvalidRequest) as caught:
            await stream(world, msgspec.structs.replace(request(prompt(3)), **choice))
        assert caught.value.facts["parameter"] == parameter


async def test_a_request_that_does_not_say_is_served_as_the_node_is_set(
    autojump_clock: MockClock,
) -> None:
    for default, drafter in (("none", None), ("auto", "quick")):
        speculators, _ = oracles()
        speculators.default = default
        async with open_pipeline_world(1, speculators=speculators) as world:
            world.place((), (0,))
            for ask, wanted in (
                (request(prompt(3)), drafter),
                (guessing(request(prompt(3)), "none"), None),
                (guessing(request(prompt(3)), "slow"), "slow"),
            ):
                told = usage(await stream(world, ask)).usage.speculation
                assert (told and told.drafter) == wanted


def test_there_is_a_test_for_every_kind() -> None:
    trees = {"growing", "quick growing", "weeds"}  # see test_trees
    assert {*SOUND, *BAD} == set(KINDS) - trees
