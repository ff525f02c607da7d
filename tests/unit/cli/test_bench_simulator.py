"""``bench simulator`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Run


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nodes", ""), "10,50,200"),
        (("--nodes", "a"), "10,50,200"),
        (("--nodes", "2"), "from 3"),
        (("--nodes", "10,251"), "250"),
        (("--nodes", "9" * 5000), "250"),
        (("--nodes", "3,4,5,6,7,8,9,10,11"), "up to 8"),
        (("--seed", "-1"), "--seed"),
        (("--seed", str(1 << 63)), "--seed"),
        (("--plot", "no/such/directory/plot.svg"), "cannot be written"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    arguments: tuple[str, ...], says: str, run: Run
) -> None:
    outcome = run("bench", "simulator", *arguments, "--json")
    assert outcome.status == 2
    assert outcome.out == ""
    assert says in f"{outcome.error['message']} {outcome.error['remedy']}"
    assert len(outcome.err) < 1000


@pytest.mark.slow
def test_figures_are_printed_stored_and_drawn(run: Run, tmp_path: Path) -> None:
    stored, drawn = tmp_path / "figures.json", tmp_path / "plot.svg"
    outcome = run(
        *("bench", "simulator", "--nodes", "4,3", "--json"),
        *("--output", str(stored), "--plot", str(drawn)),
    )
    assert outcome.status == 0
    sizes = outcome.json["sizes"]
    assert isinstance(sizes, list)
    assert [size["nodes"] for size in sizes] == [3, 4]
    assert [size["violations"] for size in sizes] == [[], []]
    assert [p["phase"] for p in sizes[0]["periods"]] == ["join", "quiet", "faults"]
    assert json.loads(stored.read_text()) == outcome.json
    assert drawn.read_text().startswith("<svg")
