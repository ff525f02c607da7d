"""Sessions that begin from blocks say what sessions that compute everything would say."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pyagent_node.base.types import Placement, Rank, SessionId, Slice
from pyagent_node.base.wire import Frame
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.pipeline import restoring
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    PIPE_PROTOCOL,
    Restore,
    Restored,
    pack_tail,
)
from pyagent_node.inference.pipeline.journal import JournalSink, Outcome, SessionJournal
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.pipeline.stage_blocks import Load, StageBlocks
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.deterministic import run_deterministic
from pyagent_node.simulations.pipeline import (
    MODEL,
    NAME,
    Answer,
    PipelineWorld,
    open_pipeline_world,
    peer,
)
from pyagent_node.simulations.shelf import ShelfFaults, ToyShelves

from .drafters import oracles

LAYERS = 10
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(seed=5, temperature=0.8)


def text(length: int, seed: int = 0) -> list[int]:
    """Return a prompt."""
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(length)]


@asynccontextmanager
async def world_of(
    nodes: int = 4,
    faults: ShelfFaults | None = None,
    journal: JournalSink | None = None,
    speculators: Speculators | None = None,
) -> AsyncIterator[tuple[PipelineWorld, ToyShelves]]:
    """Run nodes whose shelves all reach each other."""
    shelves = ToyShelves(random.Random(1), faults)
    async with open_pipeline_world(
        nodes, latency=0.002, shelves=shelves, journal=journal, speculators=speculators
    ) as world:
        yield world, shelves


def computed(world: PipelineWorld) -> int:
    """Return the tokens that rank 0 has computed."""
    return world.runners[0].tokens_done


def checked(answer: Answer, tokens: list[int], n: int, params: SamplingParams) -> Answer:
    """Return an answer that is the right one."""
    assert answer.tokens == toy_generate(LAYERS, tokens, n, params)
    return answer


async def left(world: PipelineWorld, shelves: ToyShelves) -> None:
    """Check that nothing is left of the sessions."""
    await trio.sleep(1)
    assert world.sessions == world.open_slots == 0
    assert all(not shelf.sessions for shelf in shelves.shelves.values())


# ---- reuse of a prefix -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "cached", "boundaries", "params"),
    [
        (1, 0, (), SEEDED),
        (64, 0, (3, 7), SEEDED),
        (65, 0, (3, 7), GREEDY),
        (127, 0, (), GREEDY),
        (128, 64, (3, 7), SEEDED),
        (129, 64, (), SEEDED),
        (500, 384, (3, 7), SEEDED),
        (512, 448, (3, 7), GREEDY),
        (513, 512, (), SEEDED),
        (575, 512, (3, 7), SEEDED),
        (576, 512, (3, 7), SEEDED),
        (1000, 896, (3, 7), SEEDED),
    ],
)
async def test_the_second_request_begins_from_the_blocks_of_the_first(
    length: int,
    cached: int,
    boundaries: tuple[int, ...],
    params: SamplingParams,
    autojump_clock: MockClock,
) -> None:
    async with world_of() as (world, shelves):
        world.place(boundaries, (1, 2, 3)[: len(boundaries) + 1])
        tokens = text(length)
        first = checked(await world.ask(0, tokens, sampling=params), tokens, 20, params)
        assert first.finished.usage.cached_tokens == 0
        await trio.sleep(1)
        before = computed(world)
        second = checked(await world.ask(0, tokens, sampling=params), tokens, 20, params)
        assert second.finished.usage.cached_tokens == cached
        assert second.finished.usage.recomputed_tokens == 0
        assert computed(world) - before == length - cached + len(second.tokens) - 1 + (
            len(second.tokens) < 20
        )
        await left(world, shelves)


@pytest.mark.slow
@given(
    shared=st.integers(0, 600),
    lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    cuts=st.lists(st.integers(1, LAYERS - 1), max_size=3, unique=True),
    temperature=st.sampled_from([0.0, 0.8]),
)
@settings(max_examples=8, deadline=None)
def test_a_shared_prefix_of_any_length_changes_no_token(
    shared: int, lengths: tuple[int, int], cuts: list[int], temperature: float
) -> None:
    async def program() -> None:
        async with world_of() as (world, _):
            world.place(sorted(cuts), (0, 1, 2, 3)[: len(cuts) + 1])
            for seed, length in enumerate(lengths, start=1):
                tokens = text(shared, 9) + text(length, seed)
                params = SamplingParams(seed=seed, temperature=temperature)
                answer = await world.ask(0, tokens, max_tokens=5, sampling=params)
                checked(answer, tokens, 5, params)
                await trio.sleep(1)

    run_deterministic(program, 0)


@pytest.mark.parametrize("length", [100, 520])
async def test_the_toy_would_show_a_rule_that_is_wrong(
    length: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def naive(*, journal_tokens: int, blocks: int, **_: int) -> int:
        return min(blocks, (journal_tokens - 1) // 64)

    monkeypatch.setattr(restoring, "reusable", naive)
    async with world_of() as (world, _):
        world.place((3, 7), (1, 2, 3))
        tokens = text(length)
        await world.ask(0, tokens)
        await trio.sleep(1)
        again = await world.ask(0, tokens)
        wrong = length < 512  # from 512 on, the piece that is left is a plain process's own
        assert (again.tokens != toy_generate(LAYERS, tokens, 20, GREEDY)) is wrong


async def test_who_asks_with_another_salt_or_without_cache_gets_nothing(
    autojump_clock: MockClock,
) -> None:
    async with world_of() as (world, shelves):
        world.place((5,), (1, 2))
        tokens = text(300)
        await world.ask(0, tokens, cache_salt="a")
        await trio.sleep(1)
        kept = shelves.counts["kept"]
        for salt, cache in (("b", True), ("", True), ("a", False)):
            answer = await world.ask(0, tokens, cache_salt=salt, prompt_cache=cache)
            assert checked(answer, tokens, 20, GREEDY).finished.usage.cached_tokens == 0
            await trio.sleep(1)
        assert shelves.counts["kept"] == 3 * kept
        answer = await world.ask(3, tokens, cache_salt="a")
        assert answer.finished.usage.cached_tokens == 192
        await left(world, shelves)


async def test_an_answer_is_not_reused_in_the_next_turn(autojump_clock: MockClock) -> None:
    async with world_of() as (world, _):
        world.place((5,), (1, 2))
        tokens = text(130)
        first = await world.ask(0, tokens, max_tokens=100, sampling=SEEDED)
        await trio.sleep(1)
        turn = [*tokens, *first.tokens, *text(40, 3)]
        second = checked(await world.ask(0, turn), turn, 20, GREEDY)
        assert second.finished.usage.cached_tokens == 128


# ---- failover --------------------------------------------------------------------------------


class Keeper:
    """A journal sink that keeps what a session had come to when its answer was half done."""

    def __init__(self, tokens: int) -> None:
        self.journal: SessionJournal | None = None
        self._tokens = tokens

    def begin(self, journal: SessionJournal) -> None:
        """Note a session."""
        self.journal = journal

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """Note its tokens."""
        assert self.journal is not None
        if start + len(tokens) <= self._tokens:
            self.journal = msgspec.structs.replace(
                self.journal, tokens=(*self.journal.tokens, *tokens)
            )

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """Take no notice."""


async def answer_with(
    world: PipelineWorld, tokens: list[int], n: int, events: dict[int, object], **options: object
) -> Answer:
    """Ask node 0 and call ``events[i]`` when token number i has come."""
    request = GenerationRequest(NAME, tokens=tuple(tokens), max_tokens=n, sampling=SEEDED)
    request = msgspec.structs.replace(request, **options)
    got: list[int] = []
    async with world.pipelines[0].engine.generate(request) as stream:
        async for event in stream:
            if isinstance(event, Generated):
                got.append(event.token)
                action = events.get(len(got))
                if callable(action):
                    action()
            else:
                return checked(Answer(got, "", event), tokens, n, SEEDED)
    raise AssertionError("an answer ends")


def lose(world: PipelineWorld, rank: int) -> None:
    """Kill the runner of a rank, and start another one when its end was noticed."""
    world.runners[rank].kill()

    async def again() -> None:
        await trio.sleep(0.1)
        world.restart(rank)

    world.start_soon(again)


def unending(length: int, n: int) -> list[int]:
    """Return a prompt whose answer has ``n`` tokens."""
    for seed in range(1000):
        tokens = text(length, seed)
        if len(toy_generate(LAYERS, tokens, n, SEEDED)) == n:
            return tokens
    raise AssertionError("some answer is long enough")


@pytest.mark.parametrize(("length", "after"), [(10, 1), (10, 100), (128, 30), (600, 1), (600, 100)])
async def test_a_failover_computes_less_than_a_block_again(
    length: int, after: int, autojump_clock: MockClock
) -> None:
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = unending(length, 140)

        answer = await answer_with(world, tokens, 140, {after: lambda: lose(world, 1)})
        usage = answer.finished.usage
        assert usage.failovers == 1
        assert usage.cached_tokens == 0
        most = 64 + (length % 512 if after < 64 else 0)
        assert usage.recomputed_tokens <= most, usage
        await left(world, shelves)


async def test_ranks_cut_anew_import_the_layers_of_several(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = unending(600, 200)
        answer = await answer_with(
            world,
            tokens,
            200,
            {
                40: lambda: world.place((6,), (0, 3)),
                90: lambda: world.place((), (2,)),
                150: lambda: world.place((1, 2, 9), (3, 2, 1, 0)),
            },
        )
        usage = answer.finished.usage
        assert usage.failovers == 3
        assert usage.recomputed_tokens <= 127 + 63 + 63  # the first has no block beyond the prompt
        await left(world, shelves)


async def test_another_head_goes_on_from_the_blocks(autojump_clock: MockClock) -> None:
    keeper = Keeper(100)
    async with world_of(journal=keeper) as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = unending(600, 140)
        await answer_with(world, tokens, 140, {})
        journal = keeper.journal
        assert journal is not None
        got: list[int] = []
        async with world.pipelines[1].engine.resume(journal, 0) as stream:
            async for event in stream:
                if isinstance(event, Generated):
                    got.append(event.token)
                else:
                    assert event.usage.recomputed_tokens <= 64
                    assert event.usage.cached_tokens == 0
        assert got == toy_generate(LAYERS, tokens, 140, SEEDED)
        await left(world, shelves)


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "depth", "tree"), [("quick", 1, True), ("quick", 4, False)])
async def test_guesses_are_no_part_of_blocks(
    drafter: str, depth: int, tree: bool, autojump_clock: MockClock
) -> None:
    speculators, _ = oracles(0.3)
    async with world_of(speculators=speculators) as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = unending(100, 200)
        answer = await answer_with(
            world,
            tokens,
            200,
            {90: lambda: lose(world, 1), 160: lambda: world.place((5,), (0, 1))},
            speculation=drafter,
            draft_length=6,
            draft_depth=depth,
            draft_tree=tree,
        )
        usage = answer.finished.usage
        assert usage.failovers == 2
        assert usage.recomputed_tokens < 2 * (64 + 32 * depth)
        assert usage.speculation is not None
        assert usage.speculation.accepted
        await left(world, shelves)


# ---- strangers, and ranks that say nothing ---------------------------------------------------


async def test_strangers_restore_nothing_and_are_not_believed(autojump_clock: MockClock) -> None:
    async with world_of() as (world, shelves):
        placement = world.place((3, 7), (0, 1, 2))
        tokens = unending(200, 140)
        await answer_with(world, tokens, 140, {})
        await trio.sleep(1)
        mallory = world.meshes[3]

        async def lie() -> None:
            (view,) = world.pipelines[1].engine.sessions()
            tail = pack_tail(np.zeros(64, np.int32), None)
            for rank in range(3):
                stream = await mallory.open(peer(rank), PIPE_PROTOCOL)
                for message in (
                    Restore(view.session, MODEL, placement.epoch, rank, 64),
                    Restored(view.session, MODEL, placement.epoch, rank, 3, 64),
                ):
                    data = tail if isinstance(message, Restore) else b""
                    await stream.send(Frame(PIPE_CODEC.encode(message), data))

        answer = await answer_with(world, tokens, 140, {5: lambda: world.start_soon(lie)})
        assert answer.finished.usage.cached_tokens == 128
        assert world.pipelines[0].engine.refused == {"wrong_sender": 1}
        assert all(view.refused for p in world.pipelines[:3] for view in p.stages.views())
        await left(world, shelves)


async def test_a_rank_that_says_nothing_is_waited_for_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(self: StageBlocks, load: Load) -> list[Outgoing]:
        return []

    async with world_of() as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = text(300)
        await world.ask(0, tokens)
        await trio.sleep(1)
        monkeypatch.setattr(StageBlocks, "loaded", silent)
        answer = checked(await world.ask(0, tokens), tokens, 20, GREEDY)
        assert answer.finished.usage.cached_tokens == 0
        waited = answer.finished.usage.ttft_seconds
        assert restoring.RESTORE_SECONDS <= waited < restoring.RESTORE_SECONDS + 1
        await left(world, shelves)


# ---- shelves that fail -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        ShelfFaults(lost=0.3),
        ShelfFaults(broken=0.3),
        ShelfFaults(foreign=0.3),
        ShelfFaults(slow=0.5, seconds=0.02),
        ShelfFaults(slow=1.0, seconds=1.0),
    ],
    ids=["lost", "broken", "foreign", "slow", "hanging"],
)
async def test_a_bad_shelf_costs_blocks_but_no_token(
    faults: ShelfFaults, autojump_clock: MockClock
) -> None:
    async with world_of(faults=faults) as (world, shelves):
        world.place((3, 7), (1, 2, 3))
        tokens = unending(300, 140)
        for _ in range(2):
            answer = await answer_with(world, tokens, 140, {100: lambda: lose(world, 1)})
            assert answer.finished.usage.failovers == 1
        await left(world, shelves)
        assert len(world.failures) == 2  # those that were killed


def test_the_peers_named_as_sources_are_few() -> None:
    ranks = tuple(Rank(r, Slice(r, r + 1, r == 19), peer(r)) for r in range(20))
    placement = Placement(MODEL, 1, ranks, 64, 1)
    assert restoring.holders(placement, [peer(30)], 16) == tuple(peer(r) for r in range(16))
    few = msgspec.structs.replace(placement, ranks=ranks[:2])
    assert restoring.holders(few, [peer(1), peer(30)], 16) == (peer(0), peer(1), peer(30))
