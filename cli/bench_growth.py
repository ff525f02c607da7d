"""``bench context --part growth``: what a context costs at several sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyagent_node.base.files import write_atomic

if TYPE_CHECKING:
    from pyagent_node.benchmarks.context_growth import GrowthRow
    from pyagent_node.cli.app import App


def growth(
    app: App,
    tokens: int | None,
    nodes: int,
    encoder: Path | None,
    *,
    before: Sequence[Path],
    plot: str | None,
    output: str | None,
) -> None:
    """Measure, show, store and draw; ``before`` are files of earlier runs whose rows count too."""
    from pyagent_node.benchmarks import context_growth as bench  # noqa: PLC0415
    from pyagent_node.benchmarks import context_swarm as swarm  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.offline import open_store  # noqa: PLC0415

    rows = [row for path in before for row in bench.rows_in(path)]
    sizes: tuple[int, ...] = (*bench.SIZES, bench.INDEX_ONLY)
    if tokens is not None:
        sizes = (tokens,)
    elif before:
        sizes = ()
    with interruptible(), Reporter(app.out, stream_json=False) as progress:
        for size in sizes:
            app.out.note(f"{size} tokens")
            if size >= bench.INDEX_ONLY:
                rows.append(bench.index_alone(size))
                continue
            report = swarm.run(
                size,
                nodes,
                swarm.encoder(open_store(app.home, app.settings()), encoder),
                model=Path(),
                answers=0,
                report=progress,
                say=app.out.note,
                machine=machine(),
            )
            rows.append(bench.row_of(report))
    made = bench.GrowthReport(
        bench="context-growth", time=time.time(), machine=machine(), rows=bench.joined(rows)
    )
    stored = store(app, output, made)
    app.out.result(made, lambda: _show(app, made.rows))
    app.out.note(f"Stored in {stored}.")
    if any(row.nodes for row in made.rows):
        picture = Path(plot).expanduser() if plot else stored.with_suffix(".svg")
        write_atomic(picture, bench.plot(made.rows).encode())
        app.out.note(f"Drawn in {picture}.")


def _show(app: App, rows: Sequence[GrowthRow]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    heads = ("tokens", "windows", "tokens/s", "B/token everywhere", "B/token all", "recall@8")
    for name in (*heads, "exact", "p50", "p99"):
        table.add_column(name, justify="right")

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(
            f"{row.tokens}" if row.nodes else f"{row.tokens}, index alone",
            str(row.windows),
            shown(row.tokens_per_second, ".0f"),
            shown(row.index_bytes_per_token, ".2f"),
            shown(row.chunk_bytes_per_token, ".1f"),
            shown(row.recall_at_8, ".3f"),
            shown(row.exact_recall_at_8, ".3f"),
            f"{row.query_ms_p50:.1f} ms",
            f"{row.query_ms_p99:.1f} ms",
        )
    app.out.console.print(table)
