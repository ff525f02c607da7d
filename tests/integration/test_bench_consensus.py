"""The consensus benchmark with real processes: small, but the whole of it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest
from click.testing import CliRunner

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.benchmarks.consensus import Group, Plan, Voter, measure, quantile
from pyagent_node.benchmarks.consensus_node import ENGINES, EngineName, Vote
from pyagent_node.cli import bench_consensus
from pyagent_node.cli.main import cli

pytestmark = pytest.mark.alone


@pytest.mark.slow
@pytest.mark.parametrize("engine", get_args(EngineName))
def test_commits_and_a_failover(engine: EngineName) -> None:
    said: list[str] = []
    plan = Plan(engine=engine, commits=20, commits_at_once=100, kills=1)
    figures = measure(plan, say=said.append)
    assert 0 < figures.commit_ms_p50 <= figures.commit_ms_p99
    assert figures.follower_commit_ms_p50 > 0
    assert figures.commits_per_second > 0
    assert figures.fsync_ms_p50 > 0
    assert figures.failover_ms_p50 == figures.failover_ms_max > 0
    assert figures.election_timeout.high_ms == 2 * figures.election_timeout.low_ms
    assert len(said) == 3


@pytest.mark.slow
def test_a_voter_that_fails_says_why(tmp_path: Path) -> None:
    plan = Plan(engine="raft-rs", voters=1)
    with Group(plan, tmp_path) as group:
        with pytest.raises(RunnerFailed, match="must be a voter"):
            group.voters[0].ask(Vote([]))
        assert group.leader() is group.voters[0]
    (tmp_path / "blocked").touch()
    broken = Voter(plan, 0, tmp_path / "blocked")
    broken._log = tmp_path / "broken.stderr"
    with pytest.raises(RunnerFailed, match="died or hung"):
        broken.start()
    broken.kill()


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0], 0.99) == quantile([1.0], 1.0) == 1.0
    assert set(get_args(EngineName)) == set(ENGINES)


def test_what_the_verb_refuses() -> None:
    for arguments in (["--engine", "single"], ["--voters", "2"], ["--kills", "0"]):
        done = CliRunner().invoke(cli, ["bench", "consensus", *arguments])
        assert done.exit_code == 2
    fields = {field.name for field in msgspec.structs.fields(bench_consensus.Report)}
    assert {"commit_ms_p50", "commit_ms_p99", "commits_per_second"} <= fields
    assert {"failover_ms_p50", "failover_ms_max", "election_timeout_ms"} <= fields
