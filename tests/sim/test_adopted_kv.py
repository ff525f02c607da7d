"""A failover to another exactness class goes on from the KV of before, and says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from trio.testing import MockClock

from pyagent_node.simulations.pipeline import PipelineWorld
from pyagent_node.simulations.shelf import ToyShelves

from .test_kv_blocks import Answer, answer_with, left, unending, world_of

A, B = "toy/a", "toy/b"
LENGTH, TOKENS = 600, 140


def anew(world: PipelineWorld, classes: Sequence[str], nodes: Sequence[int]) -> Callable[[], None]:
    """Return what places the ranks anew, on runners of these classes."""

    def act() -> None:
        world.place((3, 7), nodes, classes=classes)

    return act


async def answered(
    world: PipelineWorld, events: dict[int, tuple[str, str, str]], **options: object
) -> Answer:
    """Begin on ranks of class A and change them after so many tokens; the answer is the toy's."""
    world.place((3, 7), (1, 2, 3), classes=(A, A, A))
    acts: dict[int, object] = {
        after: anew(world, classes, (1, 2, 3)) for after, classes in events.items()
    }
    return await answer_with(world, unending(LENGTH, TOKENS), TOKENS, acts, **options)


async def test_a_rank_of_another_class_goes_on_from_the_blocks(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        usage = (await answered(world, {100: (A, B, A)})).finished.usage
        assert usage.failovers == 1
        assert usage.recomputed_tokens <= 64
        # what the last rank computes now is its own class's no more, either
        assert usage.classes == (A, f"{A}+kv", f"{B}+kv")
        await left(world, shelves)


async def test_the_names_of_before_may_depend_on_another_cut(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3), classes=(A, B, A), prefill_cuts=(64, 512, 64))
        acts: dict[int, object] = {100: anew(world, (A, A, A), (1, 2, 3))}
        answer = await answer_with(world, unending(LENGTH, TOKENS), TOKENS, acts)
        usage = answer.finished.usage
        assert usage.recomputed_tokens <= 64
        assert usage.classes == (A, B, f"{A}+kv")
        await left(world, shelves)


async def test_the_first_rank_may_be_the_one(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        usage = (await answered(world, {100: (B, A, A)})).finished.usage
        assert usage.recomputed_tokens <= 64
        assert usage.classes == (A, f"{A}+kv", f"{B}+kv")
        await left(world, shelves)


async def test_within_a_class_nothing_changes(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        usage = (await answered(world, {100: (A, A, A)})).finished.usage
        assert usage.recomputed_tokens <= 64
        assert usage.classes == (A,)
        await left(world, shelves)


async def test_what_was_adopted_is_adopted_again(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        usage = (
            await answered(world, {40: (A, B, A), 80: (A, A, A), 120: (A, B, B)})
        ).finished.usage
        assert usage.failovers == 3
        assert usage.recomputed_tokens <= 127 + 64 + 64  # none beyond the prompt the first time
        assert set(usage.classes) == {A, f"{A}+kv", f"{B}+kv"}
        await left(world, shelves)


@pytest.mark.parametrize("option", [{"cache_fetch": "never"}, {"prompt_cache": False}])
async def test_who_wants_none_of_others_has_all_computed_again(
    option: dict[str, object], autojump_clock: MockClock
) -> None:
    async with world_of() as (world, shelves):
        usage = (await answered(world, {100: (A, B, A)}, **option)).finished.usage
        assert usage.failovers == 1
        assert usage.recomputed_tokens >= LENGTH + 90
        assert usage.classes == (A, B)
        await left(world, shelves)


async def test_nobody_else_finds_blocks_on_top_of_adopted_ones(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        await answered(world, {40: (A, B, A)})
        again = await world.ask(0, unending(LENGTH, TOKENS), max_tokens=4)
        assert again.finished.usage.cached_tokens == 0
        assert again.finished.usage.classes == (A, B)
        _names_differ(shelves)
        await left(world, shelves)


def _names_differ(shelves: ToyShelves) -> None:
    """Check that ranks 1 and 2 have blocks under more than one root: none was overwritten."""
    names = {name for shelf in shelves.shelves.values() for name in shelf.held}
    counts = {layer: len({n[2] for n in names if n[1] == layer}) for layer in (0, 3, 7)}
    assert counts[3] > counts[0]
    assert counts[7] > counts[0]


async def test_a_rank_that_joins_two_of_other_classes_computes_all(
    autojump_clock: MockClock,
) -> None:
    """Its layers lie under two names: no block of it can be asked for."""
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3), classes=(A, B, A))

        def joined() -> None:
            world.place((3,), (1, 2), classes=(A, B))

        answer = await answer_with(world, unending(LENGTH, TOKENS), TOKENS, {100: joined})
        usage = answer.finished.usage
        assert usage.recomputed_tokens >= LENGTH
        assert usage.classes == (A, B)
        await left(world, shelves)
