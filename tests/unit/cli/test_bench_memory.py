"""``bench context --part memory``: what it refuses, and how it tells what it measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pyagent_node.benchmarks import context_memory
from pyagent_node.benchmarks.context_memory_types import (
    ARMS,
    MemoryJob,
    MemoryReport,
    MemoryResult,
    MemoryRow,
)

from .conftest import Run

PART = ("bench", "context", "--part", "memory")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--lengths", "0"), "--lengths"),
        (("--lengths", "256,many"), "--lengths"),
        (("--lengths", ",".join(map(str, range(256, 280)))), "--lengths"),
        (("--kv-budget", "off"), "--kv-budget"),
        (("--kv-budget", "12"), "kv_budget"),
        (("--plot", "no/such/directory/plot.svg"), "cannot be written"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], says: str, run: Run) -> None:
    outcome = run(*PART, *arguments, "--json")
    assert outcome.status != 0
    assert outcome.out == ""
    assert says in outcome.error["message"]


def test_what_was_measured_is_shown_stored_and_drawn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[MemoryJob] = []

    def measured(job: MemoryJob) -> MemoryResult:
        asked.append(job)
        rows = [
            MemoryRow(
                tokens=length,
                arm=arm,
                cells=256,
                bytes=1 << 22,
                resident=0,
                most=768,
                most_bytes=3 << 22,
                perplexity=9.5,
                divergence=0.02,
                facts=4,
                later=0.25,
                later_loss=3.0,
            )
            for length in job.lengths
            for arm in ARMS
        ]
        return MemoryResult(rows=tuple(rows), sampled=64, seconds=2.0)

    monkeypatch.setattr(context_memory, "measure_apart", measured)
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    stored, drawn = tmp_path / "figures.json", tmp_path / "plot.svg"
    options = ("--model", str(model), "--output", str(stored), "--plot", str(drawn))
    outcome = run(*PART, "--lengths", "512,256", "--kv-budget", "300", *options)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[1].startswith("| ------: | ")  # a table in Markdown
    assert [line.split("|")[1:3] for line in lines[2:10:4]] == [
        ["     256 ", " off     "],
        ["     512 ", " off     "],
    ]
    assert {len(line) for line in lines[:10]} == {len(lines[0])}
    assert "1 of 4" in lines[2]
    assert (asked[0].lengths, asked[0].cells) == ((256, 512), 300)
    report = msgspec.json.decode(stored.read_bytes(), type=MemoryReport)
    assert [row.tokens for row in report.result.rows] == [256] * 4 + [512] * 4
    assert drawn.read_text().startswith("<svg")
