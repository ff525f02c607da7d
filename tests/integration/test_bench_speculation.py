"""The speculation benchmark with real daemons: small, but the whole of it."""

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
def test_three_daemons_guess_what_they_would_have_said(tmp_path: Path, bundled_model: Path) -> None:
    output = tmp_path / "figures.json"
    size = ("--tokens", "12", "--texts", "1", "--prompts", "copy", "--rtt-ms", "20")
    options = ("--pipelining", "--model", str(bundled_model), "--output", str(output))
    done = CliRunner().invoke(cli, ["--json", "bench", "speculation", *size, *options])
    assert done.exit_code == 0, done.output
    figures = json.loads(output.read_text())
    (run,) = figures["runs"]
    assert (run["rtt_ms"], run["prompts"], run["drafter"]) == (20, "copy", "suffix")
    assert run["identical"] is True
    assert run["speedup"] == pytest.approx(
        run["tokens_per_second"] / run["plain_tokens_per_second"], rel=1e-3
    )
    assert run["plain_tokens_per_second"] < 1 / 0.030  # a token travels 30 ms
    assert run["predicted_plain_tokens_per_second"] > 0
    assert [piped["depth"] for piped in figures["pipelining"]] == [1, 2, 4]
    assert all(piped["identical"] for piped in figures["pipelining"])
    assert json.loads(done.stdout)["runs"] == figures["runs"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rtt-ms", "0,x"], "Write milliseconds"),
        (["--rtt-ms", "-1"], "Write milliseconds"),
        (["--rtt-ms", "nan"], "Write milliseconds"),
        (["--rtt-ms", "9999"], "Write milliseconds"),
        (["--prompts", "code,verse"], "code,prose,copy"),
        (["--prompts", ","], "code,prose,copy"),
        (["--drafter", "suffix,,"], "a model's name"),
        (["--drafter", "some-model"], "--drafter-model"),
    ],
)
def test_what_is_not_there_is_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["bench", "speculation", *arguments])
    assert isinstance(done.exception, InvalidRequest)
    assert said in str(done.exception.remedy)


@pytest.mark.parametrize("arguments", [["--tokens", "1"], ["--texts", "4"], ["--rounds", "0"]])
def test_numbers_out_of_range_are_refused(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, ["bench", "speculation", *arguments]).exit_code == 2
