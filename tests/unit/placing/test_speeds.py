"""What slices are measured to do: a short run, what sessions show, and the file of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.backend import (
    BackendInfo,
    ResetSequences,
    SequenceOp,
    StepInput,
    StepOutput,
)
from pyagent_node.inference.call_times import CallTimes
from pyagent_node.inference.machine import MeasuredSpeed
from pyagent_node.inference.pipeline.plan_types import Work
from pyagent_node.inference.slice_speed import PIECE, measure_slice
from pyagent_node.node.speed_records import MAX_RECORDS, SpeedRecord, read_speeds
from pyagent_node.node.speeds import SpeedBook

MODEL = Digest("m" * 64)


class Fake:
    """A slice whose tokens take a second each, a piece's a tenth, and the head two more."""

    def __init__(self, part: Slice, *, n_ctx: int = 64, scale: float = 1.0) -> None:
        self.info = BackendInfo(
            "llama.cpp", "1", "cpu", part, 8, 100, n_ctx, 1, 4, 1, 1, (1,), True
        )
        self.scale = scale
        self.times = CallTimes()
        self.ops: list[SequenceOp] = []
        self.steps: list[StepInput] = []

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        await trio.lowlevel.checkpoint()
        self.ops += ops

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        self.steps += steps
        (step,) = steps
        rows = len(step.tokens)
        assert step.position + rows <= self.info.n_ctx
        seconds = (1.0 if rows == 1 else 0.1 * rows) + 2.0 * step.sample
        await trio.sleep(seconds * self.scale)
        return [StepOutput()]


async def test_a_short_run_tells_layers_head_and_prompts(autojump_clock: MockClock) -> None:
    fake = Fake(Slice(3, 9, True), scale=0.001)
    times = await measure_slice(fake)
    assert times.token == pytest.approx(0.003)
    assert times.layers == pytest.approx(0.001)
    assert times.prompt == pytest.approx((0.0032 + 0.002) / PIECE)
    assert isinstance(fake.ops[-1], ResetSequences)
    assert all(step.activations is not None for step in fake.steps)


async def test_a_slow_slice_is_measured_by_few_tokens(autojump_clock: MockClock) -> None:
    fake = Fake(Slice(0, 9, False))
    times = await measure_slice(fake)
    assert (times.token, times.layers, times.prompt) == (1.0, 1.0, None)
    assert len(fake.steps) == 1
    short = Fake(Slice(0, 9, False), n_ctx=3, scale=0.001)
    assert (await measure_slice(short)).prompt is None
    assert len(short.steps) == 3


async def test_a_cancelled_run_leaves_the_slice_empty(autojump_clock: MockClock) -> None:
    fake = Fake(Slice(0, 9, False))
    with trio.move_on_after(0.5):
        await measure_slice(fake)
    assert isinstance(fake.ops[-1], ResetSequences)


def record(number: int = 0, **changes: object) -> SpeedRecord:
    part = Slice(number, number + 1, False)
    made = SpeedRecord(MODEL, "llama.cpp", "1", 4, part, 5.0, 0.0, 7.0, "loading", float(number))
    return msgspec.structs.replace(made, **changes)


def test_a_damaged_file_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    assert read_speeds(path) == {}
    for text in ("", "{", '{"version": 2, "records": []}', '{"version":1,"records":[{}]}', "\0"):
        path.write_text(text)
        assert read_speeds(path) == {}
    path.write_bytes(b" " * (1 << 19))
    assert read_speeds(path) == {}
    many = [record(n, decode=-1.0 if n == 2 else 5.0) for n in range(2 * MAX_RECORDS)]
    path.write_bytes(msgspec.json.encode({"version": 1, "records": many}))
    assert len(read_speeds(path)) == MAX_RECORDS - 1


def test_a_model_is_told_by_its_own_records_else_by_those_of_others(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    records = [record(1), record(2, threads=2), record(3, backend="torch", model=Digest("o"))]
    path.write_bytes(msgspec.json.encode({"version": 1, "records": records}))
    book = SpeedBook(path)
    assert book.speeds(MODEL, 4) == (
        MeasuredSpeed("llama.cpp", 4, 5.0, 7.0, "loading", Slice(1, 2, False)),
        MeasuredSpeed("torch", 4, 5.0, 7.0, "others", Slice(3, 4, False)),
    )
    assert {each.source for each in book.speeds(Digest("new"), 4)} == {"others"}
    assert book.speeds(MODEL, 3) == ()


async def test_sessions_correct_what_loading_showed_and_it_is_kept(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    path = tmp_path / "speeds.json"
    book = SpeedBook(path, clock=lambda: 1000.0 + trio.current_time())
    fake = Fake(Slice(0, 9, True), scale=0.001)
    work = Work(1000, 200, 5000, 300)
    async with book.followed(MODEL, Slice(0, 9, True), work, fake):
        (told,) = book.speeds(MODEL, 4)
        assert told.source == "loading"
        assert told.decode == pytest.approx(1000 / 0.001)
        assert told.head == pytest.approx(200 / 0.002)
        for _ in range(20):
            fake.times.took(1, 0.006)  # twice as long as alone
        (told,) = book.speeds(MODEL, 4)
        assert told.source == "sessions"
        assert told.decode == pytest.approx(1000 / 0.002)
        assert told.head == pytest.approx(200 / 0.004)
    steps = len(fake.steps)
    again = SpeedBook(path)
    assert again.speeds(MODEL, 4) == (told,)
    async with again.followed(MODEL, Slice(0, 9, True), work, fake):
        assert len(fake.steps) == steps, "what is known is not measured again"
    other = Fake(Slice(3, 7, False), scale=0.001)
    async with again.followed(MODEL, Slice(3, 7, False), Work(400, 0, 2000, 0), other):
        assert not other.steps, "nor is another slice of the same model"
        for _ in range(20):
            other.times.took(1, 0.0004)
        best = next(each for each in again.speeds(MODEL, 4) if each.slice == Slice(3, 7, False))
        assert best.decode == pytest.approx(400 / 0.0004)


async def test_the_output_head_is_measured_once_too(autojump_clock: MockClock) -> None:
    book = SpeedBook(clock=trio.current_time)
    body, tail = Slice(0, 4, False), Slice(4, 9, True)
    for part, measured in ((body, True), (tail, True), (Slice(2, 9, True), False)):
        fake = Fake(part, scale=0.001)
        async with book.followed(MODEL, part, Work(1000, 200 * part.head, 5000, 0), fake):
            assert bool(fake.steps) is measured
