"""Growth of contexts: rows of stored runs, the index alone, the drawing."""

from pathlib import Path

import msgspec
import pytest

from pyagent_node.base.errors import CorruptData
from pyagent_node.benchmarks.context_growth import (
    GrowthReport,
    SwarmFigures,
    index_alone,
    joined,
    plot,
    row_of,
    rows_in,
)


def figures(tokens: int, recall: float = 0.9) -> SwarmFigures:
    return SwarmFigures(
        tokens=tokens,
        nodes=4,
        windows=tokens // 30,
        index_bytes=tokens,
        chunk_bytes=50 * tokens,
        tokens_per_second=5000.0,
        query_ms_p50=50.0,
        query_ms_p99=90.0,
        recall_at_8=recall,
        exact_recall_at_8=0.9,
    )


def test_rows_of_runs_and_of_their_files(tmp_path: Path) -> None:
    one = row_of(figures(1000))
    assert (one.index_bytes_per_token, one.chunk_bytes_per_token) == (1.0, 50.0)
    run, growth, odd = (tmp_path / name for name in ("run.json", "growth.json", "odd.json"))
    run.write_bytes(msgspec.json.encode(figures(1000)))
    assert rows_in(run) == [one]
    other = index_alone(20_000)
    report = GrowthReport(bench="context-growth", time=0.0, machine={}, rows=(one, other))
    growth.write_bytes(msgspec.json.encode(report))
    assert rows_in(growth) == [one, other]
    odd.write_text('{"rows": 3')
    with pytest.raises(CorruptData):
        rows_in(odd)
    later = row_of(figures(1000, recall=0.8))
    assert joined([other, one, later]) == (later, other)
    more = msgspec.structs.replace(later, nodes=6)
    assert joined([more, later]) == (later, more)


def test_the_index_alone_and_the_drawing() -> None:
    alone = index_alone(20_000)
    assert alone.windows == 605
    assert alone.index_bytes_per_token == pytest.approx(34 * 605 / 20_000, abs=1e-3)
    assert alone.recall_at_8 is None
    drawn = plot([row_of(figures(1000)), row_of(figures(10_000)), alone])
    assert drawn.startswith("<svg")
    assert ">4 daemons<" in drawn
    six = msgspec.structs.replace(row_of(figures(10_000)), nodes=6)
    assert ">4 or 6 daemons<" in plot([row_of(figures(1000)), six])
    assert drawn.count('class="title"') == 4
    with pytest.raises(CorruptData):
        plot([alone])
