"""A runner process and its pipes: requests in, replies out, and the truth about its death.

The process is started, watched and ended here.  Whoever waits for a reply when it dies, and whoever
asks afterwards, gets :class:`RunnerFailed` with the facts ``pid`` and ``reason``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError, RunnerFailed, error_from_info
from pyagent_node.base.limits import KIB
from pyagent_node.base.wire import Frame, FrameDecoder, frame_prefix
from pyagent_node.inference.runner_health import (
    LOOK_SECONDS,
    STALL_SECONDS,
    Vigil,
    death_reason,
    oom_kills,
    processor_seconds,
)
from pyagent_node.inference.runner_protocol import (
    REPLIES,
    REQUESTS,
    AnyReply,
    AnyRequest,
    Failed,
    Tail,
)

log = logging.getLogger("pyagent_node.runner")

CLOSE_SECONDS: Final = 2.0
"""How long a runner may take to end by itself after its input was closed."""
KILL_SECONDS: Final = 5.0
"""How long the system may take to end it after a kill."""
CALL_SECONDS: Final = 300.0
"""Longest time for one request; a runner that takes longer is taken for hung and killed."""
SEND_SECONDS: Final = 20.0
"""Longest time to hand over a request."""
LOAD_SECONDS: Final = 900.0
"""Longest time for loading."""

STDERR_LINES: Final = 12
"""Last lines of standard error that explain a death."""
STDERR_LINE: Final = 400
"""Characters kept of each."""
MAX_LOGGED_LINES: Final = 2000
"""Lines of one runner that go to our log; the rest is counted."""

_READ_BYTES: Final = 1 << 16  # above 128 KiB the allocator maps memory anew for each read
_JOIN_BYTES: Final = 64 * KIB
_PIPE_BYTES: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031

COMMAND: Final = ("-P", "-X", "faulthandler", "-m", "pyagent_node.inference.runner_main")
"""Arguments for the interpreter; ``-P`` keeps modules of the working directory out."""


def runner_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a runner: the daemon's, without its settings and secrets.

    OpenMP threads spin between two steps of a computation for ``GOMP_SPINCOUNT`` rounds and then
    sleep.  libgomp's own choice, 300,000 rounds, keeps the processor from the next rank when
    several runners share a machine: three runners of two threads on two processors needed 20 ms a
    token instead of 6.5 ms; without spinning it was 14 ms (``benchmarks/runner_threads.py``).
    """
    env = {name: value for name, value in environ.items() if not name.startswith("PYAGENT_")}
    env.setdefault("GOMP_SPINCOUNT", "1000")
    env["PYTHONUNBUFFERED"] = "1"
    return env


class RunnerProcess:
    """One child process that answers one request at a time; callers queue up in order."""

    def __init__(self, process: trio.Process, label: str) -> None:
        assert process.stdin is not None, "started with pipes"
        assert process.stdout is not None, "started with pipes"
        self.label = label
        self.pid = process.pid
        self.failed = trio.Event()
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._stdin_fd = _descriptor(process.stdin)
        self._stdout_fd = _descriptor(process.stdout)
        self._failure: RunnerFailed | None = None
        self._reason: str | None = None
        self._lock = trio.Lock()
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        self._last_id = 0
        self._owes: int | None = None
        """The request that the runner works on, while somebody watches that it does."""
        self._unread = 0
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._stderr_done = trio.Event()
        self._oom_kills = oom_kills()

    @property
    def failure(self) -> RunnerFailed | None:
        """Why the process is gone; ``None`` while it lives."""
        return self._failure

    def next_id(self) -> int:
        """Return the number for the next request."""
        self._last_id += 1
        return self._last_id

    async def call(
        self,
        request: AnyRequest,
        tail: Tail = b"",
        *,
        seconds: float = CALL_SECONDS,
        watched: bool = True,
    ) -> tuple[AnyReply, bytes | bytearray | memoryview]:
        """Send a request and return its reply.

        While it is ``watched``, a runner that stops working on it is killed within seconds.
        Cancelling the wait is safe: the runner finishes what it does, and its reply is dropped.
        Raises the error that the runner answers with, :class:`LimitExceeded` (``frame_too_large``)
        before anything is sent, and :class:`RunnerFailed`.
        """
        frame = Frame(REQUESTS.encode(request), tail)
        prefix = frame_prefix(frame)
        try:
            self._lock.acquire_nowait()  # acquire() gives other tasks a turn first
        except trio.WouldBlock:
            await self._lock.acquire()
        try:
            with trio.move_on_after(seconds):
                try:
                    await self._drain()
                    self._check_alive()
                    await self._send(prefix, frame)
                    self._owes = request.id if watched else None
                    reply, data = await self._receive()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    raise await self._death() from None
                if reply.id != request.id:
                    raise await self._condemn(f"answered {reply.id} to request {request.id}")
                if isinstance(reply, Failed):
                    raise error_from_info(reply.error)
                return reply, data
            raise await self._condemn(f"gave no answer within {seconds:g} seconds")
        finally:
            self._owes = None
            self._lock.release()

    async def _send(self, prefix: bytes, frame: Frame) -> None:
        # A frame cut short would leave the pipe useless, so this is not cancelled; it does not
        # take long, since the runner has answered everything before and waits.
        tail = memoryview(frame.tail)
        with trio.move_on_after(SEND_SECONDS, shield=True):
            self._unread += 1
            if tail.nbytes <= _JOIN_BYTES:
                await self._write(b"".join((prefix, frame.header, tail)))
            else:
                await self._write(prefix + frame.header)
                await self._stdin.send_all(tail)
            return
        raise await self._condemn(f"did not read for {SEND_SECONDS:g} seconds")

    async def _write(self, data: bytes) -> None:
        """Write at once what fits the pipe, and wait only for the rest.

        This and :meth:`_read` are on the path of every token: trio's streams give other tasks a
        turn before each attempt, which made a call take 81 us instead of 47.
        """
        sent = 0
        if self._stdin_fd is not None:
            try:
                sent = os.write(self._stdin_fd(), data)
            except BlockingIOError:
                pass
            except OSError as error:
                raise trio.BrokenResourceError from error
        if sent < len(data):
            await self._stdin.send_all(memoryview(data)[sent:])

    async def _read(self) -> bytes | bytearray:
        if self._stdout_fd is None:
            return await self._stdout.receive_some(_READ_BYTES)
        while True:
            if (fd := self._stdout_fd()) < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(fd)
            try:
                return os.read(self._stdout_fd(), _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:
                raise trio.BrokenResourceError from error

    async def _drain(self) -> None:
        """Read the replies that nobody waited for."""
        while self._unread:
            await self._receive()

    async def _receive(self) -> tuple[AnyReply, bytes | bytearray | memoryview]:
        try:
            while not self._frames:
                data = await self._read()
                if not data:
                    raise await self._death()
                self._frames.extend(self._decoder.feed(data))
            frame = self._frames.popleft()
            self._unread -= 1
            return REPLIES.decode(frame.header), frame.tail
        except RunnerFailed:
            raise
        except PyAgentError as error:
            raise await self._condemn(f"broke the protocol: {error.message}") from None

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._again(self._failure)

    async def _condemn(self, reason: str) -> RunnerFailed:
        """Kill the process for a reason of ours and return the error for it."""
        self._reason = self._reason or reason
        self._process.kill()
        return await self._death()

    async def _death(self) -> RunnerFailed:
        """Wait until the end of the process was noticed and return the error for it."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(CLOSE_SECONDS):
                await self.failed.wait()
            if self._failure is None:
                # its pipes are closed, but it lives: it cannot be used any more
                self._reason = self._reason or "closed its pipes"
                self._process.kill()
                with trio.move_on_after(KILL_SECONDS):
                    await self.failed.wait()
        return self._again(self._failure or self._obituary(None, self._reason or "unknown"))

    def _obituary(self, code: int | None, reason: str) -> RunnerFailed:
        last = " | ".join(self._stderr)[-STDERR_LINE:]
        return RunnerFailed(
            f"The runner of {self.label} (process {self.pid}) ended: {reason}.",
            remedy="Its last words are in the log of this node." if last else None,
            pid=self.pid,
            reason=reason,
            exit_code=-1 if code is None else code,
            stderr=last,
        )

    def _again(self, failure: RunnerFailed) -> RunnerFailed:
        """Return an error equal to ``failure``; each waiter gets an object of its own."""
        return RunnerFailed(
            failure.message, code=failure.code, remedy=failure.remedy, **failure.facts
        )

    # ---- life and death --------------------------------------------------------------------

    async def watch(self) -> None:
        """Wait for the end of the process and say why it ended; run as a task."""
        code = await self._process.wait()
        with trio.move_on_after(1.0):
            await self._stderr_done.wait()
        reason = self._reason or death_reason(code, oom=oom_kills() > self._oom_kills)
        self._failure = self._obituary(code, reason)
        if self._reason != "closed":
            log.warning("%s %s", self._failure.message, self._failure.facts["stderr"])
        self.failed.set()

    async def keep_vigil(self) -> None:
        """Kill the process when it hangs; run as a task."""
        vigil = Vigil()
        while not self.failed.is_set():
            await trio.sleep(LOOK_SECONDS)
            used = processor_seconds(self.pid) if self._owes is not None else None
            if vigil.look(trio.current_time(), self._owes, used):
                await self._condemn(f"hangs: it used no processor for {STALL_SECONDS:g} seconds")

    async def read_stderr(self) -> None:
        """Pass the lines of standard error to the log, bounded; run as a task."""
        stream = self._process.stderr
        assert stream is not None, "started with pipes"
        pending = b""
        logged = 0
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in stream:
                *lines, pending = (pending + data).split(b"\n")
                pending = pending[:STDERR_LINE]
                for raw in lines:
                    line = raw[:STDERR_LINE].decode("utf-8", "replace").strip()
                    if not line:
                        continue
                    self._stderr.append(line)
                    logged += 1
                    if logged <= MAX_LOGGED_LINES:
                        log.info("runner %d: %s", self.pid, line)
        if pending.strip():
            self._stderr.append(pending.decode("utf-8", "replace").strip())
        if logged > MAX_LOGGED_LINES:
            log.info("runner %d: %d more lines", self.pid, logged - MAX_LOGGED_LINES)
        self._stderr_done.set()

    async def close(self) -> None:
        """End the process: close its input, wait, then kill.  Never longer than the deadlines."""
        self._reason = self._reason or "closed"
        with trio.CancelScope(shield=True):
            await self._stdin.aclose()
            # Not ``failed``: the task that sets it may have been cancelled before us.
            with trio.move_on_after(CLOSE_SECONDS):
                await self._process.wait()
            if self._process.returncode is None:
                log.warning("The runner %d did not end by itself and is killed.", self.pid)
                self._process.kill()
                with trio.move_on_after(KILL_SECONDS):
                    await self._process.wait()
            await self._stdout.aclose()


@contextlib.asynccontextmanager
async def start_process(label: str) -> AsyncIterator[RunnerProcess]:
    """Run a runner process for the time of the context; an error inside is raised as it is.

    Raises :class:`RunnerFailed` when it cannot be started.
    """
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, *COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=runner_environment(os.environ),
        )
    except OSError as error:
        raise RunnerFailed(
            f"The runner of {label} could not be started: {error}.", pid=0, reason=str(error)
        ) from error
    runner = RunnerProcess(process, label)
    failure: Exception | None = None
    # A cancelled owner must not stop those who wait for the process to end in good order.
    tending = trio.CancelScope(shield=True)

    async def tend() -> None:
        with tending:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runner.watch)
                nursery.start_soon(runner.read_stderr)
                nursery.start_soon(runner.keep_vigil)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tend)
        try:
            _widen(process)
            yield runner
        except Exception as error:
            failure = error  # raised below, or the nursery would wrap it in a group
        finally:
            await runner.close()
            tending.cancel()
    if failure is not None:
        raise failure


def _descriptor(stream: object) -> Callable[[], int] | None:
    """Return what tells the descriptor of a pipe (-1 once closed), where pipes do not block.

    trio has made those of POSIX non-blocking; on Windows there are no such pipes.
    """
    return None if sys.platform == "win32" else getattr(stream, "fileno", None)


def _widen(process: trio.Process) -> None:
    """Ask Linux for larger pipes, so that a chunk of activations passes in few pieces."""
    if sys.platform != "linux":
        return
    import fcntl  # noqa: PLC0415 - not there on Windows

    for stream in (process.stdin, process.stdout):
        fileno = getattr(stream, "fileno", None)
        if fileno is not None:
            with contextlib.suppress(OSError):
                fcntl.fcntl(fileno(), _F_SETPIPE_SZ, _PIPE_BYTES)
