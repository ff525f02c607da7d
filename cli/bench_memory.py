"""``bench context --part memory``: what pruning the KV of a long context saves and costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import write_atomic
from pyagent_node.benchmarks.context_memory_types import ARMS
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.lists import numbers, refused
from pyagent_node.cli.output import size

if TYPE_CHECKING:
    from pyagent_node.benchmarks.context_memory_types import MemoryReport, MemoryRow
    from pyagent_node.cli.app import App

LENGTHS = "256,512,1024,2048,4096,8192"
COLUMNS = (
    "context",
    "cells",
    "held",
    "bytes",
    "most at once",
    "resident",
    "perplexity",
    "divergence",
    "later",
    "asked",
)
SHORTEST, LONGEST, MOST = 256, 8192, 16


def memory(
    app: App,
    model: str,
    lengths: str,
    budget: str,
    *,
    threads: int,
    plot: str | None,
    output: str | None,
) -> None:
    """Measure, show, store, and draw if asked to; raises :class:`InvalidRequest` (``usage``)."""
    from pyagent_node.benchmarks import context_memory as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.context_memory_plot import plot as draw  # noqa: PLC0415
    from pyagent_node.benchmarks.context_memory_types import MemoryJob, MemoryReport  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415
    from pyagent_node.inference.kv.budgets import read_budget  # noqa: PLC0415

    remedy = f"Write up to {MOST} numbers from {SHORTEST} to {LONGEST} with commas: {LENGTHS}."
    asked = numbers("--lengths", lengths, int, least=SHORTEST, most=LONGEST, remedy=remedy)
    if len(asked) > MOST:
        raise refused("--lengths", lengths, remedy)
    pruning = read_budget(budget)
    if pruning is None:
        raise refused("--kv-budget", budget, "Say auto, or a number of cells.")
    picture = Path(plot).expanduser() if plot is not None else None
    if picture is not None and not picture.parent.is_dir():
        raise InvalidRequest(
            f"{picture} cannot be written: {picture.parent} is no directory.",
            code="usage",
            remedy="Make the directory first.",
        )
    with interruptible():
        job = MemoryJob(
            path=str(model_file(app, model)),
            lengths=tuple(sorted(asked)),
            cells=pruning.cells,
            threads=threads,
        )
        app.out.note(f"  contexts of {', '.join(map(str, job.lengths))} tokens")
        result = bench.measure_apart(job)
    report = MemoryReport(
        bench="context-memory",
        time=time.time(),
        machine=machine(),
        model=model,
        job=job,
        result=result,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")
    if picture is not None:
        write_atomic(picture, draw(result.rows).encode(), 0o644)
        app.out.note(f"Drawn into {picture}.")


def _show(app: App, report: MemoryReport) -> None:
    order = {arm: at for at, arm in enumerate(ARMS)}
    rows = sorted(report.result.rows, key=lambda row: (row.tokens, order.get(row.arm, 0)))
    for line in table([COLUMNS, *map(_cells, rows)]):
        app.out.text(line)
    app.out.text(
        "\nonce: pruned at the end; rolling: behind every piece; recent: the first and the last"
        " alone.  later: facts told right that were asked for after pruning; asked: where the"
        f" question was there before.  {max(row.facts for row in rows)} facts;"
        f" {report.result.seconds:.0f} s, attention of {report.result.sampled} rows measured."
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of a table in Markdown, its columns below each other; the first row names them.

    The columns but the second, which has words, are set to the right.
    """
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    rule = [f"{'-' * (n - 1)}{'-' if at == 1 else ':'}" for at, n in enumerate(widths)]
    padded = [
        [cell.ljust(n) if at == 1 else cell.rjust(n) for at, (cell, n) in pairs]
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    return [f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:])]


def _cells(row: MemoryRow) -> tuple[str, ...]:
    return (
        f"{row.tokens:,}",
        row.arm,
        f"{row.cells:,}",
        size(row.bytes),
        size(row.most_bytes),
        size(row.resident) if row.resident else "",
        f"{row.perplexity:.2f}",
        f"{row.divergence:.3f}",
        f"{row.later * row.facts:.0f} of {row.facts}",
        "" if row.asked is None else f"{row.asked * row.facts:.0f} of {row.facts}",
    )
