"""Runs seeds in processes of their own, several at a time.

Each seed gets a fresh interpreter with a fixed ``PYTHONHASHSEED``, so that nothing of another seed
and nothing of the caller can show in its run.  A worker that dies, hangs or answers nonsense is a
failure of its seed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import trio

from pyagent_node.simulations.deterministic import HASH_SEED
from pyagent_node.simulations.jobs import Job, Verdict, unfinished

MAX_ANSWER: Final = 64 << 20
"""Bytes of a verdict, beyond which its worker is ended; one with a trace has some two millions."""
MAX_SAID: Final = 8192
"""Bytes that are kept of what a worker writes to its standard error."""
END_SECONDS: Final = 5.0
"""How long a worker that hangs may take to say where."""

COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "pyagent_node.simulations.worker")
"""How a worker is started."""

ENVIRONMENT: Final = {"PYTHONHASHSEED": HASH_SEED, "OPENBLAS_NUM_THREADS": "1"}
"""What a worker's environment has besides: one thread for small matrices, where more would wait for
each other by spinning, and take the processors from the other workers."""


def default_limit(job: Job) -> float:
    """Return after how many seconds of real time a run counts as hanging.

    A healthy run of seven nodes takes a tenth of its virtual time or less; the work grows with the
    nodes.
    """
    return 120.0 + job.schedule.nodes * job.schedule.duration


def play_all(
    jobs: Sequence[Job],
    *,
    workers: int,
    done: Callable[[Job, Verdict], None],
    limit: float | None = None,
) -> None:
    """Run all ``jobs`` and call ``done`` with each and its verdict as it comes.

    ``limit`` replaces :func:`default_limit`.  Ctrl-C and SIGTERM raise :class:`KeyboardInterrupt`
    when every worker has ended.
    """
    try:
        trio.run(
            _play_all,
            deque(jobs),
            workers,
            done,
            limit,
            restrict_keyboard_interrupt_to_checkpoints=True,
        )
    except BaseExceptionGroup as group:
        raise _first(group) from None


def play(job: Job, *, limit: float | None = None) -> Verdict:
    """Run one job; see :func:`play_all`."""
    verdicts: list[Verdict] = []
    play_all([job], workers=1, done=lambda _, verdict: verdicts.append(verdict), limit=limit)
    return verdicts[0]


def _first(error: BaseException) -> BaseException:
    """Return what went wrong without the groups around it; Ctrl-C goes before all else."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_first(each) for each in error.exceptions]
    return next((leaf for leaf in leaves if isinstance(leaf, KeyboardInterrupt)), leaves[0])


async def _play_all(
    jobs: deque[Job], workers: int, done: Callable[[Job, Verdict], None], limit: float | None
) -> None:
    async def work() -> None:
        while jobs:
            job = jobs.popleft()
            done(job, await _play(job, default_limit(job) if limit is None else limit))

    async with trio.open_nursery() as outer:
        await outer.start(_end_when_told)
        async with trio.open_nursery() as nursery:
            for _ in range(min(workers, len(jobs))):
                nursery.start_soon(work)
        outer.cancel_scope.cancel()


async def _end_when_told(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Treat the signals that end a program as Ctrl-C, whose handler is trio's already."""
    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        task_status.started()
        return
    with trio.open_signal_receiver(*wanted) as signals:
        task_status.started()
        async for _ in signals:
            raise KeyboardInterrupt


async def _play(job: Job, limit: float) -> Verdict:
    began = time.monotonic()
    answer, said = bytearray(), bytearray()
    process = await trio.lowlevel.open_process(
        list(COMMAND),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
    )
    try:
        with trio.move_on_after(limit) as patience:
            await _talk(process, job, answer, said)
        if patience.cancelled_caught:
            await _ask_where(process, said)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    await stream.aclose()
    seconds, text = time.monotonic() - began, said.decode(errors="replace")
    if patience.cancelled_caught:
        return unfinished(job, f"it hangs: no end after {limit:.0f} s", seconds, text)
    try:
        return msgspec.json.decode(bytes(answer), type=Verdict)
    except msgspec.DecodeError:
        return unfinished(job, f"its worker {_ending(process.returncode)}", seconds, text)


async def _talk(process: trio.Process, job: Job, answer: bytearray, said: bytearray) -> None:
    """Give a worker its job and take its answer; its standard input stays open meanwhile."""
    assert process.stdin is not None, "a pipe"
    assert process.stdout is not None, "a pipe"
    assert process.stderr is not None, "a pipe"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tail, process.stderr, said)
        with contextlib.suppress(trio.BrokenResourceError):
            await process.stdin.send_all(msgspec.json.encode(job) + b"\n")
        async for chunk in process.stdout:
            answer += chunk
            if len(answer) > MAX_ANSWER:
                process.kill()
                break
    await process.wait()


async def _tail(stream: trio.abc.ReceiveStream, said: bytearray) -> None:
    async for chunk in stream:
        said += chunk
        del said[:-MAX_SAID]


async def _ask_where(process: trio.Process, said: bytearray) -> None:
    """Let a worker that hangs die of a signal at which it tells where it was."""
    assert process.stderr is not None, "a pipe"
    if hasattr(signal, "SIGABRT") and os.name == "posix":
        process.send_signal(signal.SIGABRT)
        with trio.move_on_after(END_SECONDS):
            await _tail(process.stderr, said)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
    if code:
        return f"ended with code {code}"
    return "gave no answer"
