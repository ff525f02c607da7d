"""Runner processes with the real model: the same results as inside, and every way to die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio
import trio.testing

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, RunnerFailed
from pyagent_node.base.types import Slice
from pyagent_node.inference import runner as runner_module
from pyagent_node.inference.backend import (
    CopySequence,
    FreeSequence,
    KvRange,
    OpenSequence,
    StepInput,
    TrimSequence,
)
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.runner import RunnerSpec, SliceRunner, open_slice_runner
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.sharding.kv_codec import KvShape

pytestmark = [pytest.mark.slow, pytest.mark.model]

MIDDLE = Slice(10, 13, head=False)
TAIL = Slice(28, 30, head=True)
N_CTX = 1100
N_EMBD = 576
ROWS = np.random.default_rng(2).standard_normal((N_CTX, N_EMBD)).astype(np.float32)
TOKENS = np.arange(100, 100 + N_CTX, dtype=np.int32)

SpecOf = Callable[[Slice], RunnerSpec]


@pytest.fixture(scope="module")
def spec_of(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SpecOf:
    folder = tmp_path_factory.mktemp("slices")

    def make(part: Slice) -> RunnerSpec:
        path = folder / f"{part}.gguf"
        if not path.exists():
            write_slice(bundled_model, part, path)
        return RunnerSpec(str(path), part, n_ctx=N_CTX, n_seq=3, threads=1)

    return make


def step(seq: int, start: int, stop: int, *, sample: bool = False) -> StepInput:
    return StepInput(seq, start, TOKENS[start:stop], ROWS[start:stop], sample)


def backend_for(spec: RunnerSpec) -> LlamaBackend:
    assert spec.slice is not None
    return LlamaBackend(Path(spec.path), spec.slice, n_ctx=spec.n_ctx, n_seq=spec.n_seq, threads=1)


async def test_a_runner_answers_like_the_backend_inside_it(spec_of: SpecOf) -> None:
    spec = spec_of(MIDDLE)
    async with open_slice_runner(spec) as runner:
        with closing(backend_for(spec)) as inside:
            ours, theirs = runner.info, inside.info
            assert (ours.slice, ours.n_embd, ours.n_seq) == (MIDDLE, N_EMBD, 3)
            assert ours.kv_bytes_per_token == theirs.kv_bytes_per_token == 3 * 768
            assert ours.batch_invariant
            assert ours.kv_portable
            assert ours.kv_shape == theirs.kv_shape == KvShape(3, 64, 100_000.0)
            for op in (OpenSequence(0), OpenSequence(1)):
                inside.apply(op)
                await runner.apply([op])
            for steps in (
                [step(0, 0, 1030), step(1, 0, 5)],
                [step(1, 5, 6), step(0, 1030, 1031)],
            ):
                expected = inside.decode(steps)
                got = await runner.decode(steps)
                for a, b in zip(expected, got, strict=True):
                    assert a.activations is not None
                    assert b.activations is not None
                    assert np.array_equal(a.activations, b.activations)
            assert await runner.decode([]) == []


async def test_a_tail_samples_and_refusals_arrive_with_their_class(spec_of: SpecOf) -> None:
    spec = spec_of(TAIL)
    params = SamplingParams(seed=3, temperature=0.8, logprobs=True, top_logprobs=20)
    async with open_slice_runner(spec) as runner:
        with closing(backend_for(spec)) as inside:
            inside.apply(OpenSequence(0, params))
            await runner.apply([OpenSequence(0, params)])
            expected = inside.decode([step(0, 0, 600, sample=True)])
            assert await runner.decode([step(0, 0, 600, sample=True)]) == expected
            assert len(expected[0].sampled[0].top) == 20
        with pytest.raises(InvalidRequest, match="begins at 5") as caught:
            await runner.decode([step(0, 5, 6)])
        assert (caught.value.code, caught.value.facts["seq"]) == ("bad_step", 0)
        with pytest.raises(LimitExceeded):
            await runner.decode([StepInput(0, 600, TOKENS[:501], ROWS[:501], False)])
        bias = dict.fromkeys(range(1024), 1.0)
        await runner.apply([OpenSequence(seq, SamplingParams(logit_bias=bias)) for seq in (1, 2)])
        with pytest.raises(InvalidRequest):
            await runner.apply([FreeSequence(1), FreeSequence(1), FreeSequence(2)])
        with pytest.raises(InvalidRequest):
            await runner.apply([FreeSequence(1)])
        await runner.apply([FreeSequence(2)])


async def test_kv_travels_in_pieces(spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_slice_runner(spec_of(MIDDLE)) as runner:
        await runner.apply([OpenSequence(0), OpenSequence(1), OpenSequence(2)])
        await runner.decode([step(0, 0, 700)])
        whole = await runner.export_kv(0, 10, 700)
        monkeypatch.setattr(runner_module, "KV_PIECE_BYTES", 100_000)
        assert await runner.export_kv(0, 10, 700) == whole
        await runner.apply([CopySequence(1, 0, 0, 10)])
        await runner.import_kv(1, whole, TOKENS[10:700])
        first, second = await runner.decode([step(0, 700, 701), step(1, 700, 701)])
        assert first.activations is not None
        assert second.activations is not None
        assert np.array_equal(first.activations, second.activations)
        broken = KvRange(whole.codec, 0, 7, whole.layers)
        with pytest.raises(CorruptData):
            await runner.import_kv(2, broken, TOKENS[:7])
        with pytest.raises(InvalidRequest):
            await runner.export_kv(0, 5, 5)


async def test_two_callers_at_once_take_turns(spec_of: SpecOf) -> None:
    async with open_slice_runner(spec_of(MIDDLE)) as runner:
        await runner.apply([OpenSequence(0), OpenSequence(1)])
        rows: dict[int, list[np.ndarray]] = {0: [], 1: []}

        async def run(seq: int) -> None:
            for position in range(20):
                (output,) = await runner.decode([step(seq, position, position + 1)])
                assert output.activations is not None
                rows[seq].append(output.activations)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, 0)
            nursery.start_soon(run, 1)
        assert np.array_equal(np.concatenate(rows[0]), np.concatenate(rows[1]))


async def test_a_cancelled_prefill_ends_between_chunks_and_the_runner_goes_on(
    spec_of: SpecOf,
) -> None:
    async with open_slice_runner(spec_of(MIDDLE)) as runner:
        await runner.apply([OpenSequence(0)])
        (expected,) = await runner.decode([step(0, 0, 20)])
        await runner.apply([TrimSequence(0, 0)])
        with trio.move_on_after(0.02) as scope:
            await runner.decode([step(0, 0, N_CTX)])
        assert scope.cancelled_caught
        await runner.apply([TrimSequence(0, 0)])
        (again,) = await runner.decode([step(0, 0, 20)])
        assert expected.activations is not None
        assert again.activations is not None
        assert np.array_equal(expected.activations, again.activations)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
async def test_a_killed_runner_fails_those_who_wait_and_those_who_come(
    spec_of: SpecOf, number: signal.Signals
) -> None:
    told: list[RunnerFailed] = []

    async def work(runner: SliceRunner) -> None:
        try:
            while True:
                await runner.decode([step(0, 0, 512)])
                await runner.apply([TrimSequence(0, 0)])
        except RunnerFailed as error:
            told.append(error)

    async with open_slice_runner(spec_of(MIDDLE)) as runner:
        await runner.apply([OpenSequence(0)])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, runner)
            nursery.start_soon(runner.failed.wait)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(runner.pid, number)
        with pytest.raises(RunnerFailed):
            await runner.ping()
        assert runner.failure is not None
        assert runner.failure.facts["reason"] == number.name
    assert told[0].facts["pid"] == runner.pid
    assert told[0].facts["reason"] == number.name
    assert not psutil.pid_exists(runner.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_meant_for_the_daemon_do_not_end_a_runner(
    spec_of: SpecOf, number: signal.Signals
) -> None:
    async with open_slice_runner(spec_of(MIDDLE)) as runner:
        os.kill(runner.pid, number)
        await runner.ping()
    assert runner.failure is not None
    assert runner.failure.facts["reason"] == "closed"


async def test_a_file_that_cannot_be_loaded_is_an_error_and_no_process_is_left(
    spec_of: SpecOf, tmp_path: Path
) -> None:
    spec = spec_of(MIDDLE)
    path = tmp_path / "cut.gguf"
    await trio.Path(path).write_bytes((await trio.Path(spec.path).read_bytes())[:100_000])
    with pytest.raises(CorruptData) as caught:
        async with open_slice_runner(RunnerSpec(str(path), MIDDLE, 64, 1, 1)):
            pass
    assert caught.value.code == "gguf_truncated"


PARENT = """
import sys, trio, numpy as np
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import OpenSequence, StepInput
from pyagent_node.inference.runner import RunnerSpec, open_slice_runner
async def main():
    spec = RunnerSpec(sys.argv[1], Slice(10, 13, False), 1100, 1, 1)
    async with open_slice_runner(spec) as runner:
        await runner.apply([OpenSequence(0)])
        print(runner.pid, flush=True)
        step = StepInput(0, 0, np.ones(512, np.int32), np.ones((512, 576), np.float32), False)
        if sys.argv[2] == "busy":
            await runner.decode([step])
        await trio.sleep_forever()
trio.run(main)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
async def test_no_runner_outlives_a_daemon_that_was_killed(spec_of: SpecOf, state: str) -> None:
    parent = await trio.lowlevel.open_process(
        [sys.executable, "-c", PARENT, spec_of(MIDDLE).path, state], stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.receive_some(100))
    orphan = psutil.Process(pid)
    assert orphan.is_running()
    parent.kill()
    await parent.wait()
    with trio.fail_after(20):
        gone, alive = await trio.to_thread.run_sync(lambda: psutil.wait_procs([orphan], timeout=10))
    assert (len(gone), alive) == (1, [])
    await parent.stdout.aclose()
