"""``simulate`` as a user types it: what is refused, what is printed, what a failure tells."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pyagent_node.cli.exits import INTERRUPTED
from pyagent_node.simulations import pool
from pyagent_node.simulations.draws import MIXES
from pyagent_node.simulations.fault_kinds import Crash, Pause, SlowDisk
from pyagent_node.simulations.faults import Schedule, decode_schedule, encode_schedule

from .conftest import Run

BAD_WORKER = Path(__file__).parents[2] / "sim" / "bad_worker.py"
SMALL = ("--nodes", "3", "--duration", "2", "--faults", "none")
SCHEDULE = Schedule(
    3,
    4.0,
    (Pause(1.5, 0.2, 1), Crash(2.0, 2, 0.3), SlowDisk(2.5, 0.5, 0, 0.01), Pause(3.0, 0.2, 0)),
)
KEYS = {"seed", "virtual_seconds", "wall_seconds", "events", "violations", "trace_digest"}


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A file with a schedule in which node 2 dies and comes back."""
    path = tmp_path / "some faults.json"
    path.write_bytes(encode_schedule(SCHEDULE))
    return path


def be_bad(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-P", str(BAD_WORKER), how))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--seeds", "7"), "0..99"),
        (("--seeds", "9..3"), "3..9"),
        (("--seeds", "a..b"), "0..99"),
        (("--seeds", "-3..3"), "0..99"),
        (("--seeds", "\u0663..\u0664"), "0..99"),
        (("--seeds", "0..99999999999999999999"), "largest"),
        (("--seeds", f"0..{'9' * 5000}"), "largest"),
        (("--seeds", "0..100000"), "at most 100000"),
        (("--seed", "-1"), "--seed"),
        (("--seed", "1.5"), "--seed"),
        (("--seed", str(1 << 63)), "--seed"),
        (("--seed", "1", "--seeds", "1..2"), "exclude"),
        (("--seed", "1", "--fresh", "2"), "exclude"),
        (("--fresh", "0"), "--fresh"),
        (("--nodes", "0"), "--nodes"),
        (("--nodes", "257"), "--nodes"),
        (("--duration", "0"), "--duration"),
        (("--duration", "-1"), "--duration"),
        (("--duration", "inf"), "--duration"),
        (("--duration", "nan"), "duration"),
        (("--limit", "0"), "--limit"),
        (("--limit", "nan"), "--limit"),
        (("--jobs", "0"), "--jobs"),
        (("--seeds", "1..2", "--trace", "t"), "--trace"),
        (("--seed", "1", "--trace", "no/such/dir/t"), "cannot be written"),
        (("--seed", "1", "--shrink", "--output", "no/such/dir/t"), "cannot be written"),
        (("--shrink-runs", "0"), "--shrink-runs"),
        (("extra",), "extra"),
    ],
)
def test_a_wrong_command_line_is_refused_with_what_to_do(
    arguments: tuple[str, ...], says: str, run: Run
) -> None:
    outcome = run("simulate", *arguments, "--json")
    assert outcome.status == 2
    assert outcome.out == ""
    error = outcome.error
    assert says in f"{error['message']} {error['remedy']}"
    assert len(outcome.err) < 1000


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (None, 3, "does not exist"),
        (b"", 2, "schedule"),
        (b"[" * 100_000, 2, "schedule"),
        (b"\xff\xfe", 2, "schedule"),
        (b'{"nodes": 3, "duration": 1, "faults": [{"type": "rain", "at": 1}]}', 2, "rain"),
        (b'{"nodes": 0, "duration": 1, "faults": []}', 2, "nodes"),
        (
            b'{"nodes":3,"duration":1,"faults":[{"type":"kill_runner","at":1,"node":3}]}',
            2,
            "no node 3",
        ),
        (b" " * (4 << 20) + b" ", 5, "larger than"),
    ],
)
def test_a_file_of_faults_that_is_none_is_refused(
    content: bytes | None, status: int, says: str, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "faults.json"
    if content is not None:
        path.write_bytes(content)
    outcome = run("simulate", "--seed", "1", "--faults", str(path), "--json")
    assert outcome.status == status
    assert says in str(outcome.error["message"])


def test_what_is_neither_a_mix_nor_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    error = run("simulate", "--faults", "sunshine", "--json").error
    assert "sunshine" in str(error["message"])
    assert "standard" in str(error["remedy"])
    assert run("simulate", "--faults", str(tmp_path)).status == 2


def test_a_file_says_itself_how_many_nodes_there_are(run: Run, faults: Path) -> None:
    outcome = run("simulate", "--faults", str(faults), "--nodes", "5", "--json")
    assert outcome.status == 2
    assert "--nodes" in str(outcome.error["remedy"])


def test_the_mixes_are_listed(run: Run) -> None:
    text = run("simulate", "--list-faults")
    lines = [
        json.loads(line) for line in run("simulate", "--list-faults", "--json").out.split("\n")[:-1]
    ]
    assert {line["mix"] for line in lines if "mix" in line} == set(MIXES)
    for name in MIXES:
        assert name in text.out
    assert "crash" in text.out


@pytest.mark.slow
def test_one_seed_prints_what_is_promised(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    outcome = run("simulate", "--seed", "5", *SMALL, "--json", "--trace", str(trace))
    assert outcome.status == 0
    line = outcome.json
    assert set(line) >= KEYS
    assert line["seed"] == 5
    assert line["violations"] == []
    assert len(str(line["trace_digest"])) == 64
    assert line["replay"] == "pyagent-node simulate --seed 5 --nodes 3 --duration 2 --faults none"
    assert len(trace.read_text().splitlines()) == line["events"]
    again = run(*shlex.split(str(line["replay"]))[1:])
    assert again.status == 0
    assert str(line["trace_digest"]) in again.out


@pytest.mark.slow
def test_several_seeds_print_a_line_each_and_a_table(run: Run) -> None:
    outcome = run("simulate", "--seeds", "1..3", *SMALL, "--jobs", "2", "--json")
    assert sorted(json.loads(line)["seed"] for line in outcome.out.splitlines()) == [1, 2, 3]
    outcome = run("simulate", "--fresh", "2", *SMALL)
    assert outcome.status == 0
    assert "2 seeds, 0 failed" in outcome.out
    assert "2 of 2 seeds" in outcome.err
    assert "\033" not in outcome.out + outcome.err


@pytest.mark.slow
def test_a_failing_seed_tells_its_story_and_how_to_see_it_again(
    run: Run, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_bad(monkeypatch, "lives")
    outcome = run("simulate", "--seed", "5", "--faults", str(faults))
    assert outcome.status == 1
    assert "nobody comes back: node 2 came back" in outcome.out
    for what in ("Crash(at=2.0", "node 2    dies", "node 2    up", "The last of node 2:"):
        assert what in outcome.out, what
    assert len(outcome.out.splitlines()) < 60
    command = f"pyagent-node simulate --seed 5 --faults '{faults}'"
    assert command in outcome.out
    again = run(*shlex.split(command)[1:], "--json")
    assert again.status == 1
    violations = again.json["violations"]
    assert isinstance(violations, list)
    assert violations[0]["invariant"] == "nobody comes back"
    assert "VIOLATION     nobody comes back" in "\n".join(map(str, again.json["story"]))


@pytest.mark.slow
def test_shrinking_leaves_what_matters_in_a_file_that_fails_again(
    run: Run, faults: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_bad(monkeypatch, "lives")
    output = tmp_path / "small.json"
    asked = (
        "simulate",
        "--seed",
        "5",
        "--faults",
        str(faults),
        "--shrink",
        "--output",
        str(output),
    )
    outcome = run(*asked, "--shrink-runs", "12", "--json")
    assert outcome.status == 1
    small = decode_schedule(output.read_bytes())
    assert [type(fault) for fault in small.faults] == [Crash]
    assert outcome.json["faults"] == 1
    runs = outcome.json["runs"]
    assert isinstance(runs, int)
    assert runs <= 12
    again = run(*shlex.split(str(outcome.json["replay"]))[1:])
    assert again.status == 1
    assert "nobody comes back: node 2 came back" in again.out


@pytest.mark.parametrize(
    ("how", "says"), [("dies", "SIGABRT"), ("babbles", "no answer"), ("hangs", "hangs")]
)
@pytest.mark.slow
def test_a_worker_that_breaks_is_a_failure_of_its_seed(
    how: str, says: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_bad(monkeypatch, how)
    limit = ("--limit", "1.5") if how == "hangs" else ()
    outcome = run("simulate", "--seeds", "1..2", *SMALL, *limit)
    assert outcome.status == 1
    assert outcome.out.count("the run ends: it") == 2
    assert says in outcome.out
    assert "2 seeds, 2 failed" in outcome.out
    assert "--seed 2 --nodes 3" in outcome.out
    if how == "dies":
        assert "about to die" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(number: signal.Signals) -> None:
    program = [sys.executable, "-m", "pyagent_node.cli.main", "simulate", "--seeds", "0..999"]
    started = subprocess.Popen(
        [*program, *SMALL, "--jobs", "2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "3"},
    )
    assert started.stdout is not None
    assert json.loads(started.stdout.readline())["violations"] == []
    workers: list[psutil.Process] = []
    while not workers:  # between two seeds there may be none
        assert started.poll() is None
        workers = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(number)
    _, error = started.communicate(timeout=30)
    assert started.returncode == (INTERRUPTED if number != signal.SIGKILL else -number)
    assert "Traceback" not in error
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
