"""The failover benchmark with real daemons: small, but the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli.main import cli

pytestmark = pytest.mark.daemons


@pytest.mark.slow
@pytest.mark.model
def test_a_hot_standby_takes_over(tmp_path: Path, bundled_model: Path) -> None:
    output = tmp_path / "figures.json"
    options = ("--kinds", "hot", "--tokens", "48", "--model", str(bundled_model))
    done = CliRunner().invoke(
        cli, ["--json", "bench", "failover", *options, "--output", str(output)]
    )
    assert done.exit_code == 0, done.output
    (recovery,) = json.loads(output.read_text())["recoveries"]
    assert recovery["kind"] == "hot"
    assert recovery["identical"] is True
    assert recovery["failovers"] == 1
    assert recovery["recomputed_tokens"] > 0
    assert recovery["stall_ms"] > recovery["plain_ms"] > 0


@pytest.mark.parametrize("kinds", ["warm", "hot,,", "hot,warm"])
def test_unknown_deaths_are_refused(kinds: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "failover", "--kinds", kinds])
    assert isinstance(done.exception, InvalidRequest)
    assert "hot,cold,missing" in str(done.exception.remedy)


@pytest.mark.parametrize("arguments", [["--tokens", "1"], ["--rounds", "0"]])
def test_numbers_out_of_range_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", "failover", *arguments]).exit_code == 2
