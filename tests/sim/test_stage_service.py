"""Runners are kept when placements change: one stage after the other, or at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    LimitExceeded,
    PyAgentError,
    RunnerFailed,
)
from pyagent_node.base.types import SessionId, Slice
from pyagent_node.inference.backend import (
    CellAttention,
    KvRange,
    OpenSequence,
    PruneSequence,
    SequenceOp,
    StepInput,
    StepOutput,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.port import NullShelf, Rest
from pyagent_node.inference.pipeline.frames import OpenSession, Step, pack_tail
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_blocks import Parting
from pyagent_node.inference.pipeline.stage_service import WIPE_SECONDS, StageService
from pyagent_node.inference.pipeline.stage_shelf import ShelfWork
from pyagent_node.inference.pipeline.stage_types import StageSpec
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import N_EMBD, N_VOCAB, ToyRunner
from pyagent_node.simulations.pipeline import MODEL, open_pipeline_world, peer

from .failover import drained, expected, prompt, request, stream, tokens_of

PART = Slice(0, 5, False)


def spec(epoch: int, rank: int = 0) -> StageSpec:
    """Return a stage of the first five layers."""
    return StageSpec(
        model=MODEL,
        epoch=epoch,
        rank=rank,
        peer_id=peer(0),
        slice=PART,
        upstream=peer(1) if rank else None,
        downstream=peer(2),
        n_embd=N_EMBD,
        n_vocab=N_VOCAB,
        n_ctx=128,
        n_seq=4,
    )


class Serving:
    """Calls of ``serve`` and how they ended."""

    def __init__(self, service: StageService, nursery: trio.Nursery) -> None:
        self.service = service
        self.ended: list[tuple[int, int, str]] = []
        self.scopes: list[trio.CancelScope] = []
        self._nursery = nursery

    async def serve(self, stage: StageSpec, runner: ToyRunner) -> None:
        """Begin to serve, and let it happen."""
        scope = trio.CancelScope()
        self.scopes.append(scope)

        async def run() -> None:
            try:
                with scope:
                    failure = await self.service.serve(stage, runner)
            except Conflict as error:
                self.ended.append((stage.epoch, stage.rank, error.code))
            else:
                if not scope.cancelled_caught:
                    self.ended.append((stage.epoch, stage.rank, failure.code))

        self._nursery.start_soon(run)
        await trio.sleep(0.1)

    @property
    def serves(self) -> list[tuple[int, int]]:
        """Epochs and ranks that are served now."""
        return [(view.epoch, view.rank) for view in self.service.views()]


@asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    """Run a service."""
    async with trio.open_nursery() as nursery:
        yield Serving(StageService(peer(0)), nursery)
        nursery.cancel_scope.cancel()


async def test_a_stage_finds_its_runner_empty(autojump_clock: MockClock) -> None:
    async with serving() as one:
        runner = ToyRunner(PART)
        await runner.apply([OpenSequence(0), OpenSequence(3)])
        await one.serve(spec(1), runner)
        assert runner.open_slots == 0


async def test_a_runner_that_serves_no_more_is_left_empty(autojump_clock: MockClock) -> None:
    """It may go on as a standby, for as long as nothing fails."""
    async with serving() as one:
        runner = ToyRunner(PART, seconds=0.5)
        await one.serve(spec(1), runner)
        await runner.apply([OpenSequence(0), OpenSequence(3)])
        one.scopes[-1].cancel()
        await trio.sleep(0.01)
        assert one.serves == []
        assert runner.open_slots == 0


class _Picky(ToyRunner):
    """Refuses a batch with activations that are no numbers, as the real one does."""

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Look at all steps before the first is computed."""
        rows = [step.activations for step in steps if step.activations is not None]
        if not all(np.isfinite(each).all() for each in rows):
            raise CorruptData("not all finite", code="not_finite")
        return await super().decode(steps)


async def test_one_that_sends_what_cannot_be_computed_harms_nobody_in_its_batch(
    autojump_clock: MockClock,
) -> None:
    async with serving() as one:
        runner = _Picky(PART, seconds=0.1)
        await one.serve(spec(1), runner)
        ids = [SessionId(str(i) * 32) for i in range(3)]
        for name in ids:
            one.service.receive(
                peer(1), OpenSession(name, MODEL, 1, 0, peer(1), 40, 1, SamplingParams()), b""
            )
        for step in range(2):
            for name in ids:
                bad = step == 1 and name == ids[1]
                rows = np.full((1, N_EMBD), np.nan if bad else 1.0, np.float32)
                tail = pack_tail(np.array([5], np.int32), rows)
                message = Step(name, MODEL, 1, 0, step, step, 1, True)
                one.service.receive(peer(1), message, tail)
            await trio.sleep(1.0)
        assert sorted(each.session for each in one.service.sessions()) == [ids[0], ids[2]]
        assert runner.widths[-2:] == [[1], [1]]
        (view,) = one.service.views()
        assert view.tokens == 5


class _Pruning(ToyRunner):
    """Says that it prunes; ``fault`` is raised instead of what it is for."""

    def __init__(self, fault: type[SequenceOp], error: PyAgentError) -> None:
        super().__init__(PART)
        self.info = msgspec.structs.replace(self.info, prunes=True)
        self._fault = fault
        self._error = error

    async def attention(self, seq: int) -> CellAttention:
        """Return that all cells are alike."""
        n = len(self._slots[seq].history)
        one = np.ones(n, np.float32)
        return CellAttention(
            np.arange(n, dtype=np.int32), one[None], one, np.ones(n, np.int32), one[:1], 1
        )

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Do what comes before the fault."""
        for op in ops:
            if isinstance(op, self._fault):
                raise self._error
            if not isinstance(op, PruneSequence | WatchSequence):
                await super().apply([op])


async def _answer(one: Serving, names: Sequence[SessionId], runner: ToyRunner) -> list[str]:
    """Begin pruned sessions of 512 tokens, take a step more, and go back; returns who is left."""
    await one.serve(msgspec.structs.replace(spec(1), n_ctx=1024), runner)
    for name in names:
        opening = OpenSession(name, MODEL, 1, 0, peer(1), 600, 512, SamplingParams())
        opening = msgspec.structs.replace(opening, pruning=Pruning(256))
        one.service.receive(peer(1), opening, b"")
    for step, (position, n) in enumerate([(0, 256), (256, 256), (512, 1), (513, 1), (513, 1)]):
        for name in names:
            tail = pack_tail(np.full(n, 5, np.int32), np.ones((n, N_EMBD), np.float32))
            one.service.receive(peer(1), Step(name, MODEL, 1, 0, step, position, n, True), tail)
        await trio.sleep(0.1)
    return sorted(each.session for each in one.service.sessions())


async def test_a_prune_that_fails_half_way_gives_the_session_up(autojump_clock: MockClock) -> None:
    async with serving() as one:
        names = [SessionId(str(i) * 32) for i in range(2)]
        runner = _Pruning(PruneSequence, LimitExceeded("no memory", code="no_memory"))
        assert await _answer(one, names, runner) == []
        assert one.serves == [(1, 0)]
        assert runner.open_slots == 0


async def test_a_step_that_the_runner_cannot_go_back_for_ends_no_stage(
    autojump_clock: MockClock,
) -> None:
    async with serving() as one:
        names = [SessionId(str(i) * 32) for i in range(2)]
        runner = _Pruning(TrimSequence, Conflict("gone", code="kv_pruned"))
        assert await _answer(one, names, runner) == []
        assert one.serves == [(1, 0)]
        assert runner.open_slots == 0


class _Sluggish(ToyRunner):
    """Takes its time over operations."""

    pause = 0.0

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Begin, wait, and do it."""
        await trio.sleep(self.pause)
        await super().apply(ops)


async def test_a_runner_is_not_emptied_under_its_next_stage(autojump_clock: MockClock) -> None:
    async with serving() as one:
        runner = _Sluggish(PART)
        await one.serve(spec(1), runner)
        runner.pause = 1.0
        one.scopes[-1].cancel()
        await trio.sleep(0.01)
        runner.pause = 0.0
        await one.serve(spec(2), runner)
        opening = OpenSession(SessionId("5" * 32), MODEL, 2, 0, peer(1), 10, 5, SamplingParams())
        one.service.receive(peer(1), opening, b"")
        await trio.sleep(0.5)
        assert runner.open_slots == 0  # still waiting for the wipe
        await trio.sleep(1.0)
        assert runner.open_slots == 1


async def test_a_runner_that_hangs_holds_up_nobody_for_long(autojump_clock: MockClock) -> None:
    async with serving() as one:
        runner = _Sluggish(PART)
        await one.serve(spec(1), runner)
        runner.pause = 1e6
        one.scopes[-1].cancel()
        await trio.sleep(WIPE_SECONDS + 0.1)
        runner.pause = 0.0
        await one.serve(spec(2), runner)
        assert one.serves == [(2, 0)]


async def test_a_newer_epoch_ends_the_older_one_at_once(autojump_clock: MockClock) -> None:
    async with serving() as one:
        runner = ToyRunner(PART)
        for epoch in (1, 2, 5, 9):
            await one.serve(spec(epoch), runner)
            assert one.serves == [(epoch, 0)]
        assert one.ended == [(1, 0, "stale_epoch"), (2, 0, "stale_epoch"), (5, 0, "stale_epoch")]


async def test_an_older_or_equal_epoch_is_refused(autojump_clock: MockClock) -> None:
    async with serving() as one:
        runner = ToyRunner(PART)
        await one.serve(spec(4), runner)
        for epoch in (4, 3):
            await one.serve(spec(epoch), ToyRunner(PART))
        assert one.ended == [(4, 0, "stale_epoch"), (3, 0, "stale_epoch")]
        assert one.serves == [(4, 0)]


async def test_a_runner_that_becomes_another_rank_leaves_the_one_it_was(
    autojump_clock: MockClock,
) -> None:
    async with serving() as one:
        runner = ToyRunner(PART)
        await one.serve(spec(1, 0), runner)
        await one.serve(spec(2, 1), runner)
        assert one.serves == [(2, 1)]
        assert one.ended == [(1, 0, "stale_epoch")]
        await one.serve(spec(1, 0), runner)
        assert one.serves == [(2, 1)]


async def test_a_dead_runner_is_reported_by_the_stage_that_has_it(
    autojump_clock: MockClock,
) -> None:
    async with serving() as one:
        runner = ToyRunner(PART)
        await one.serve(spec(1), runner)
        await one.serve(spec(2), runner)
        runner.kill()
        await trio.sleep(0.1)
        assert one.ended == [(1, 0, "stale_epoch"), (2, 0, "runner_failed")]
        assert one.serves == []
        await one.serve(spec(2), runner)
        assert one.ended[-1] == (2, 0, "runner_failed")


@pytest.mark.parametrize("pause", [0.0, 0.013, 0.2])
async def test_epochs_may_follow_each_other_faster_than_a_decode(
    pause: float, autojump_clock: MockClock
) -> None:
    async with open_pipeline_world(3) as world:
        world.place((5,), (1, 2), seconds=0.05)
        asks = [request(prompt(300 * number + 2, number), 12) for number in range(3)]
        answers: dict[int, list[int]] = {}

        async def ask(number: int) -> None:
            answers[number] = tokens_of(await stream(world, asks[number]))

        async with trio.open_nursery() as nursery:
            for number in range(len(asks)):
                nursery.start_soon(ask, number)
            for _ in range(25):
                await trio.sleep(pause)
                world.place((5,), (1, 2), keep=True)
        assert answers == {number: expected(one) for number, one in enumerate(asks)}
        assert world.placement.epoch == 26
        await drained(world)


class _Half(ToyRunner):
    """Gives away the cells of odd slots only, and dies when it is asked for the last."""

    async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Say so."""
        if seq == 5:
            raise RunnerFailed("gone", reason="SIGKILL")
        if not seq % 2:
            raise Conflict("pruned", code="kv_pruned")
        return KvRange("toy", start, stop, ())


class _Given(NullShelf):
    """Notes which rests it is given."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def hand_over(self, rest: Rest, kv: KvRange) -> None:
        """Note one."""
        self.starts.append(rest.start)


async def test_a_rest_that_cannot_be_had_keeps_no_other_back() -> None:
    shelf, stage = _Given(), spec(1)
    work = ShelfWork(StageCore(stage), _Half(PART), shelf, lambda _: None, lambda: None)
    await work.hand_over(
        [
            Parting(seq, Rest(SessionId("s"), MODEL, 1, "toy", b"", (b"",), seq, 0, 5))
            for seq in (0, 1, 2, 3, 5, 7)
        ]
    )
    assert shelf.starts == [1, 3]
