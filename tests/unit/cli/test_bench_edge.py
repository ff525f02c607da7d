"""``bench edge``: what it refuses before anything is started."""

from __future__ import annotations

import pytest

from .conftest import Run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--clients", "0"), "1 to 32"),
        (("--clients", "1,33"), "1 to 32"),
        (("--clients", "9" * 5000), "1 to 32"),
        (("--clients", "many"), "1,4,16"),
        (("--clients", ""), "1,4,16"),
        (("--prompts", "poems"), "code"),
        (("--prompts", ""), "code"),
        (("--rtt-ms", "-1"), "--rtt-ms"),
        (("--edges", "9"), "--edges"),
        (("--tokens", "7"), "--tokens"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    arguments: tuple[str, ...], says: str, run: Run
) -> None:
    outcome = run("bench", "edge", *arguments, "--json")
    assert outcome.status == 2
    assert outcome.out == ""
    assert says in f"{outcome.error['message']} {outcome.error['remedy']}"
    assert len(outcome.err) < 1000
