"""What a decision costs, and what the death of the leader costs, with real processes and disks.

Voters run in processes of their own on loopback, each with a log on disk, every commit synced.
A commit is timed at the leader and at a follower; the rate with many changes at once.  Then the
leader is killed as by ``kill -9``, again and again; the time from the kill to the next change that
a survivor gets committed is the failover.  A plain ``write`` and ``fsync`` of as many bytes on the
same disk, in the same run, is what there is to compare with.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, TypeVar

import msgspec

from pyagent_node.base.errors import DeadlineExceeded, RunnerFailed
from pyagent_node.base.files import sync_file
from pyagent_node.benchmarks.consensus_node import (
    Commit,
    CommitOne,
    Connect,
    Done,
    EngineName,
    Look,
    Order,
    Timing,
    Vote,
    timing,
)
from pyagent_node.node.identity import NodeKey

START_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 120.0
FAILOVER_SECONDS: Final = 60.0
ENTRY_BYTES: Final = 160
"""About what one entry of the benchmark takes in the log."""

Say = Callable[[str], None]
T = TypeVar("T")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    engine: EngineName
    voters: int = 3
    commits: int = 300
    commits_at_once: int = 3000
    at_once: int = 64
    kills: int = 8


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; see the module."""

    commit_ms_p50: float
    commit_ms_p99: float
    follower_commit_ms_p50: float
    commits_per_second: float
    failover_ms_p50: float
    failover_ms_max: float
    failovers_ms: list[float]
    election_timeout: Timing
    fsync_ms_p50: float
    plan: Plan


class Voter:
    """One voter's process."""

    def __init__(self, plan: Plan, number: int, root: Path) -> None:
        self.peer_id = NodeKey(bytes([number + 1]) * 32).peer_id
        self._command = [
            *(sys.executable, "-m", "pyagent_node.benchmarks.consensus_node"),
            *("--engine", plan.engine, "--seed", str(number + 1)),
            *("--directory", str(root / f"voter{number}")),
        ]
        self._first = number == 0
        self._log = root / f"voter{number}.stderr"
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""

    def start(self) -> None:
        """Start the process and learn its address."""
        command = self._command + (["--founder"] if self._first else [])
        self._first = False
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self.address = msgspec.json.decode(self._line(START_SECONDS), type=str)

    def tell(self, order: Order) -> None:
        """Give an order."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Done:
        """Wait for the answer to the order; raises :class:`RunnerFailed` (``bench_failed``)."""
        done = msgspec.json.decode(self._line(ANSWER_SECONDS), type=Done)
        if done.problem is not None:
            raise RunnerFailed(f"A voter failed: {done.problem}", code="bench_failed")
        return done

    def ask(self, order: Order) -> Done:
        """Give an order and wait for the answer."""
        self.tell(order)
        return self.answer()

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            tail = self._log.read_text(errors="replace")[-1500:]
            raise RunnerFailed(f"A voter died or hung: {tail}", code="bench_failed")
        return line

    def kill(self) -> None:
        """End the process as a power cut would (of the process, not of the disk)."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


class Group:
    """All voters of a run; a context manager."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.voters = [Voter(plan, number, root) for number in range(plan.voters)]

    def __enter__(self) -> Group:
        try:
            self._form()
        except BaseException:
            self.close()
            raise
        return self

    def _form(self) -> None:
        for voter in self.voters:
            voter.start()
            self.connect(voter)
        _eventually(
            lambda: self.voters[0].ask(Vote([voter.peer_id for voter in self.voters])).voters,
            "the voters were not agreed on",
        )
        for voter in self.voters:
            voter.ask(CommitOne(FAILOVER_SECONDS))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process."""
        for voter in self.voters:
            voter.kill()

    def connect(self, voter: Voter) -> None:
        """Connect a voter with all others that run."""
        others = [each.address for each in self.voters if each is not voter and each.address]
        voter.ask(Connect(others))

    def leader(self) -> Voter:
        """Wait until every voter names the same leader."""

        def agreed() -> Voter | None:
            named = {voter.ask(Look()).leader for voter in self.voters}
            return next((v for v in self.voters if {v.peer_id} == named), None)

        return _eventually(agreed, "no leader was elected")


def _eventually(look: Callable[[], T | None], problem: str) -> T:
    deadline = time.monotonic() + FAILOVER_SECONDS
    while time.monotonic() < deadline:
        try:
            found = look()
        except RunnerFailed as error:
            problem = str(error)
        else:
            if found:
                return found
        time.sleep(0.05)
    raise DeadlineExceeded(f"{problem}.", code="bench_failed")


def measure(plan: Plan, *, say: Say = lambda _: None) -> Figures:
    """Run the benchmark in a temporary directory; raises :class:`RunnerFailed`."""
    with tempfile.TemporaryDirectory(prefix="pyagent-consensus-") as name:
        root = Path(name)
        say(f"Starting {plan.voters} voters of the engine {plan.engine} ...")
        with Group(plan, root) as group:
            leader = group.leader()
            follower = next(voter for voter in group.voters if voter is not leader)
            leader.ask(Commit(plan.commits // 3))  # warm
            baseline = fsync_ms(root, plan.commits)
            at_leader = leader.ask(Commit(plan.commits)).milliseconds
            at_follower = follower.ask(Commit(plan.commits)).milliseconds
            baseline += fsync_ms(root, plan.commits)
            say("Many changes at once ...")
            before = leader.ask(Look()).index
            many = leader.ask(Commit(plan.commits_at_once, plan.at_once))
            made = leader.ask(Look()).index - before
            if made < plan.commits_at_once:
                raise RunnerFailed(f"Only {made} entries were made.", code="bench_failed")
            failovers = []
            for turn in range(plan.kills):
                took = failover(group)
                say(f"Leader killed ({turn + 1} of {plan.kills}): {took:.0f} ms.")
                failovers.append(took)
    return Figures(
        commit_ms_p50=quantile(at_leader, 0.5),
        commit_ms_p99=quantile(at_leader, 0.99),
        follower_commit_ms_p50=quantile(at_follower, 0.5),
        commits_per_second=round(len(many.milliseconds) / many.seconds, 1),
        failover_ms_p50=quantile(failovers, 0.5),
        failover_ms_max=quantile(failovers, 1.0),
        failovers_ms=[round(each, 1) for each in failovers],
        election_timeout=timing(),
        fsync_ms_p50=quantile(baseline, 0.5),
        plan=plan,
    )


def failover(group: Group) -> float:
    """Kill the leader; return the milliseconds to the next commit; bring it back."""
    leader = group.leader()
    survivor = next(voter for voter in group.voters if voter is not leader)
    began = time.perf_counter()
    leader.kill()
    survivor.ask(CommitOne(FAILOVER_SECONDS))
    took = (time.perf_counter() - began) * 1000
    leader.start()
    group.connect(leader)
    leader.ask(CommitOne(FAILOVER_SECONDS))
    return took


def fsync_ms(root: Path, count: int) -> list[float]:
    """Return the milliseconds of a plain append with a sync, so many times."""
    took = []
    with _appending(root / "plain") as fd:
        for _ in range(count):
            began = time.perf_counter()
            os.write(fd, bytes(ENTRY_BYTES))
            sync_file(fd)
            took.append((time.perf_counter() - began) * 1000)
    return took


@contextmanager
def _appending(path: Path) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the values lie, to a microsecond."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 3)
