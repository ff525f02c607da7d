"""Asks the single-process reference, which runs in a child process (see ``reference``)."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import TracebackType

import msgspec

from pyagent_node.base.errors import RunnerFailed

REPLY_SECONDS = 600.0
STOP_SECONDS = 10.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One generation; ``prompt`` is one user turn with ``chat``, plain text without.

    ``threads`` 0 means llama-cpp-python's own default, half the processors.  Beyond 256 tokens of
    context llama.cpp's results depend on the number of threads; ours are those of one.
    """

    path: str
    prompt: str
    max_tokens: int
    seed: int
    temperature: float
    n_ctx: int = 2048
    threads: int = 0
    chat: bool = True
    ignore_eos: bool = False


class SingleAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What one process answers; times in seconds, ``tokens_per_second`` without the first token."""

    prompt_tokens: int
    token_ids: tuple[int, ...]
    text: str
    ttft_seconds: float
    tokens_per_second: float


class SingleProcess:
    """A child process that runs the whole model; use it as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyagent_node.benchmarks.reference"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def generate(self, job: Job) -> SingleAnswer:
        """Answer ``job``; raises :class:`RunnerFailed` when the child dies or takes too long."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        timer = threading.Timer(REPLY_SECONDS, self._process.kill)
        timer.start()
        try:
            stdin.write(msgspec.json.encode(job) + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            status = self._process.wait()
            raise RunnerFailed(
                f"The single-process reference died (status {status}).",
                code="reference_failed",
                remedy="`pyagent-node doctor` checks llama.cpp.",
                status=status,
            )
        return msgspec.json.decode(line, type=SingleAnswer)

    def __enter__(self) -> SingleProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the child."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if kind is not None:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
