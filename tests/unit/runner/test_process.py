"""The daemon's side of a runner, against children that misbehave in every way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import trio

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, RunnerFailed
from pyagent_node.base.limits import MAX_TAIL
from pyagent_node.base.types import Slice
from pyagent_node.inference import runner_health, runner_process
from pyagent_node.inference.backend import BackendInfo, StepInput
from pyagent_node.inference.runner import Runner, SliceRunner
from pyagent_node.inference.runner_health import MEASURED, death_reason
from pyagent_node.inference.runner_process import (
    STDERR_LINE,
    STDERR_LINES,
    RunnerProcess,
    runner_environment,
    start_process,
)
from pyagent_node.inference.runner_protocol import Ping

pytestmark = pytest.mark.slow

POLITE = """
import os, signal, sys
from pyagent_node.base.wire import Frame, FrameDecoder, frame_prefix
from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.runner_protocol import REPLIES, REQUESTS, Done, Failed
decoder = FrameDecoder()
def send(reply, tail=b""):
    frame = Frame(REPLIES.encode(reply), tail)
    os.write(1, frame_prefix(frame) + frame.header + tail)
count = 0
while data := os.read(0, 1 << 20):
    for frame in decoder.feed(data):
        request = REQUESTS.decode(frame.header)
        count += 1
        ANSWER
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that sets the program which runners of this test run."""

    def use(script: str) -> None:
        monkeypatch.setattr(runner_process, "COMMAND", ("-P", "-c", script))

    return use


def polite(answer: str) -> str:
    return POLITE.replace("ANSWER", answer)


async def failure_of(process: RunnerProcess) -> RunnerFailed:
    with pytest.raises(RunnerFailed) as caught:
        await Runner(process).ping()
    assert process.failed.is_set()
    assert process.failure is not None
    assert caught.value is not process.failure
    assert caught.value.facts == process.failure.facts
    assert caught.value.facts["pid"] == process.pid
    return caught.value


async def test_a_polite_child_is_asked_and_ends_with_the_context(
    child: Callable[[str], None],
) -> None:
    child(polite("send(Done(request.id))"))
    async with start_process("test") as process:
        for _ in range(20):
            await Runner(process).ping()
        assert process.failure is None
    assert process.failure is not None
    assert process.failure.facts["reason"] == "closed"
    assert process.failure.facts["exit_code"] == 0
    with pytest.raises(RunnerFailed, match="closed"):
        await Runner(process).ping()


async def test_errors_of_the_child_arrive_as_they_are_and_it_lives_on(
    child: Callable[[str], None],
) -> None:
    refusal = "InvalidRequest('no', code='because', seq=3).to_info()"
    child(polite(f"send(Failed(request.id, {refusal}) if count == 1 else Done(request.id))"))
    async with start_process("test") as process:
        with pytest.raises(InvalidRequest, match="no") as caught:
            await Runner(process).ping()
        assert (caught.value.code, caught.value.facts) == ("because", {"seq": 3})
        await Runner(process).ping()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("os.write(1, b'garbage garbage garbage')", "broke the protocol"),
        ("os.write(1, (2**31).to_bytes(4, 'big') * 2)", "broke the protocol"),
        ("os.write(1, bytes([0,0,0,2,0,0,0,0]) + b'xx')", "broke the protocol"),
        ("send(Done(request.id + 1))", "answered 2 to request 1"),
        ("os.close(1); os.read(0, 1)", "closed its pipes"),
        ("sys.exit(3)", "exit code 3"),
        ("os._exit(0)", "exit code 0"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("os.abort()", "SIGABRT"),
        ("os.write(1, bytes([0,0,0,9])); os._exit(1)", "exit code 1"),
    ],
)
async def test_a_child_that_breaks_off_fails_with_its_reason(
    child: Callable[[str], None], answer: str, reason: str
) -> None:
    child(polite(answer))
    async with start_process("the test slice") as process:
        error = await failure_of(process)
        assert reason in str(error.facts["reason"])
        assert "the test slice" in error.message
        again = await failure_of(process)
        assert again.facts == error.facts


async def test_everybody_who_waits_is_told(child: Callable[[str], None]) -> None:
    child(polite("os.kill(os.getpid(), 9) if count == 3 else send(Done(request.id))"))
    told: list[str] = []

    async def ask(process: RunnerProcess) -> None:
        try:
            await Runner(process).ping()
        except RunnerFailed as error:
            told.append(str(error.facts["reason"]))

    async with start_process("test") as process, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(ask, process)
    assert told == ["SIGKILL"] * 4


async def test_the_last_words_are_kept_and_bounded(child: Callable[[str], None]) -> None:
    noise = "sys.stderr.write('x' * 100000 + '\\n' + 'line\\n' * 5000 + 'the end'); sys.exit(1)"
    child(polite(noise))
    async with start_process("test") as process:
        error = await failure_of(process)
    words = str(error.facts["stderr"])
    assert words.endswith("the end")
    assert len(words) <= STDERR_LINE
    assert words.count("line") <= STDERR_LINES


async def test_a_child_that_does_not_answer_is_killed(child: Callable[[str], None]) -> None:
    child(polite("import signal; signal.pause()"))
    async with start_process("test") as process:
        with pytest.raises(RunnerFailed, match="no answer within"):
            await process.call(Ping(process.next_id()), seconds=0.05)
        assert (await failure_of(process)).facts["exit_code"] == -signal.SIGKILL


async def test_a_child_that_was_stopped_is_killed_long_before_the_deadline(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_process, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(runner_health, "STALL_SECONDS", 0.3)
    child(polite("count == 2 and os.kill(os.getpid(), signal.SIGSTOP); send(Done(request.id))"))
    async with start_process("test") as process:
        await Runner(process).ping()
        with trio.fail_after(10):
            error = await failure_of(process)
        assert "hangs" in str(error.facts["reason"])
        assert error.facts["exit_code"] == -signal.SIGKILL


async def test_a_child_that_turns_in_a_circle_is_killed_after_many_times_the_usual(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_health, "LEAST_PATIENCE", 0.5)
    monkeypatch.setattr(runner_health, "PATIENCE_FACTOR", 1.0)
    done = "send(Decoded(request.id, (OutputHeader(0, ()),)))"
    child(
        "from pyagent_node.inference.runner_protocol import Decoded, OutputHeader\n"
        + polite(f"while count > {MEASURED}: pass\n        {done}")
    )
    info = BackendInfo(
        "toy", "1", "cpu", Slice(0, 1, False), 4, 8, 64, 1, 1, 0, 0, (1,), kv_portable=True
    )
    async with start_process("test") as process:
        runner = SliceRunner(process, info)
        steps = [StepInput(0, 0, np.zeros(1, np.int32), None, False)]
        for _ in range(MEASURED):
            await runner.decode(steps)
        with trio.fail_after(20), pytest.raises(RunnerFailed, match="no answer within"):
            await runner.decode(steps)


async def test_a_child_that_is_slow_or_loads_is_left_alone(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_process, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(runner_health, "STALL_SECONDS", 0.3)
    busy = "end = time.monotonic() + 0.8\n        while time.monotonic() < end: pass"
    child(polite(f"import time\n        {busy}\n        send(Done(request.id))"))
    async with start_process("test") as process:
        await Runner(process).ping()
    child(polite("import select; select.select([], [], [], 0.8); send(Done(request.id))"))
    async with start_process("test") as process:
        await process.call(Ping(process.next_id()), watched=False)


async def test_a_child_that_does_not_read_is_killed(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_process, "SEND_SECONDS", 0.05)
    child("import signal; signal.pause()")
    async with start_process("test") as process:
        with pytest.raises(RunnerFailed, match="did not read"):
            await process.call(Ping(process.next_id()), bytes(MAX_TAIL))


async def test_a_child_that_ignores_the_end_of_its_input_is_killed(
    child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_process, "CLOSE_SECONDS", 0.05)
    child("import signal\nwhile True: signal.pause()")
    async with start_process("test") as process:
        pass
    assert process.failure is not None
    assert process.failure.facts["exit_code"] == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
async def test_a_cancelled_call_leaves_the_pipe_usable(
    child: Callable[[str], None], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    child(
        polite(f"count == 1 and open({str(gate)!r}).read(); send(Done(request.id), b'x' * 300000)")
    )
    async with start_process("test") as process:
        with trio.move_on_after(0.05) as scope:
            await Runner(process).ping()
        assert scope.cancelled_caught
        await trio.to_thread.run_sync(gate.write_text, "go")
        for _ in range(3):
            await Runner(process).ping()


async def test_an_oversized_request_is_refused_before_it_is_sent(
    child: Callable[[str], None],
) -> None:
    child(polite("send(Done(request.id))"))
    async with start_process("test") as process:
        with pytest.raises(LimitExceeded) as caught:
            await process.call(Ping(process.next_id()), bytes(MAX_TAIL + 1))
        assert caught.value.code == "frame_too_large"
        await Runner(process).ping()


async def test_errors_inside_the_context_come_out_as_they_are(
    child: Callable[[str], None],
) -> None:
    child(polite("send(Done(request.id))"))
    with pytest.raises(ZeroDivisionError):
        async with start_process("test"):
            _ = 1 // 0
    with trio.move_on_after(0) as scope:
        async with start_process("test"):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_program_that_cannot_be_started_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(RunnerFailed, match="could not be started"):
        async with start_process("test"):
            pass


def test_the_environment_has_no_settings_of_ours() -> None:
    env = runner_environment({"PATH": "/bin", "PYAGENT_TOKEN": "secret", "GOMP_SPINCOUNT": "5"})
    assert "PYAGENT_TOKEN" not in env
    assert (env["PATH"], env["GOMP_SPINCOUNT"]) == ("/bin", "5")
    assert runner_environment({})["GOMP_SPINCOUNT"].isdigit()


def test_reasons_have_names() -> None:
    assert death_reason(7, oom=True) == "exit code 7"
    assert death_reason(-signal.SIGSEGV, oom=True) == "SIGSEGV"
    assert death_reason(-signal.SIGKILL, oom=False) == "SIGKILL"
    assert death_reason(-signal.SIGKILL, oom=True) == "out of memory (SIGKILL)"
    assert death_reason(-250, oom=False) == "signal 250"
