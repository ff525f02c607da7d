"""``demo`` and ``bench pipeline`` as a user runs them: real daemons, the real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pyagent_node.benchmarks.single import Job, SingleProcess

pytestmark = [pytest.mark.daemons, pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

PROMPT = "Name three rivers."


@pytest.fixture
def environment(tmp_path: Path, bundled_model: Path) -> dict[str, str]:
    """Return an environment in which temporary files and the home are the test's own."""
    (tmp_path / "tmp").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYAGENT_")}
    return {**kept, "PYAGENT_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pyagent_node.cli.main", *arguments]


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Check that no temporary home and no daemon of it is left."""
    yield
    assert list((tmp_path / "tmp").iterdir()) == []
    left = [p for p in psutil.process_iter(["environ"]) if _is_ours(p, str(tmp_path))]
    assert not left


def _is_ours(process: psutil.Process, root: str) -> bool:
    found = process.info["environ"] or {}
    return process.pid != os.getpid() and str(found.get("PYAGENT_HOME", "")).startswith(root)


@pytest.mark.parametrize(
    ("nodes", "layers", "temperature", "seed"),
    [(3, None, 0.8, 7), (2, "7", 0.0, 0)],
)
def test_demo_equals_one_process(
    nodes: int,
    layers: str | None,
    temperature: float,
    seed: int,
    environment: dict[str, str],
    bundled_model: Path,
    nothing_left: None,
) -> None:
    arguments = ["demo", "--nodes", str(nodes), "--prompt", PROMPT, "--max-tokens", "48"]
    arguments += ["--seed", str(seed), "--temperature", str(temperature), "--json"]
    arguments += ["--model", str(bundled_model)]
    arguments += ["--layers", layers] if layers else []
    done = subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    job = Job(
        path=str(bundled_model), prompt=PROMPT, max_tokens=48, seed=seed, temperature=temperature
    )
    with SingleProcess() as single:
        reference = single.generate(job)
    assert tuple(result["token_ids"]) == reference.token_ids
    assert result["text"] == reference.text
    assert result["identical_to_single_process"] is True
    assert result["tokens_per_second"] > 0
    assert result["ttft_seconds"] > 0
    cuts = [rank["layers"] for rank in result["ranks"]]
    assert cuts == ([[0, 7], [7, 30]] if layers else [[0, 10], [10, 20], [20, 30]])
    assert [rank["rank"] for rank in result["ranks"]] == list(range(nodes))
    assert len({rank["peer_id"] for rank in result["ranks"]}) == nodes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(
    number: signal.Signals, environment: dict[str, str], bundled_model: Path, nothing_left: None
) -> None:
    arguments = ("demo", "--nodes", "2", "--max-tokens", "1000", "--model", str(bundled_model))
    with subprocess.Popen(
        command(*arguments),
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("> "):
                process.send_signal(number)
                break
        process.stdout.read()
        assert process.wait() == 130


def test_a_demo_that_cannot_work_says_so(
    environment: dict[str, str], tmp_path: Path, nothing_left: None
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    done = subprocess.run(
        command("demo", "--nodes", "1", "--model", str(bad), "--json"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, 70)
    assert done.stdout == ""
    assert json.loads(done.stderr.splitlines()[-1])["error"]["remedy"] is not None


def test_bench_pipeline(
    environment: dict[str, str], tmp_path: Path, bundled_model: Path, nothing_left: None
) -> None:
    output = tmp_path / "figures.json"
    arguments = ["bench", "pipeline", "--ranks", "1,2", "--tokens", "8", "--rounds", "1"]
    arguments += ["--model", str(bundled_model), "--output", str(output), "--json"]
    done = subprocess.run(
        command(*arguments), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert [arm["ranks"] for arm in result["arms"]] == [1, 2]
    for arm in result["arms"]:
        assert arm["identical"] is True
        assert arm["hop_ms"]["p50"] <= arm["hop_ms"]["p99"]
        assert 0 < arm["compute_ms"]["mean"] < arm["step_ms"]["mean"]
        assert arm["tokens_per_second"] > 0
    assert result["idle_daemon_bytes"] > 10_000_000
