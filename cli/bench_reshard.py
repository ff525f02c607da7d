"""``bench reshard``: what streams notice while layers move between nodes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click
import msgspec

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from pyagent_node.benchmarks.reshard import ReshardReport

DEFAULT_TOKENS, FULL_TOKENS = 1200, 1900


@click.command("reshard")
@click.option(
    "--tokens",
    type=click.IntRange(100, 1900),
    help=f"The length of an answer (default {DEFAULT_TOKENS}).",
)
@click.option("--full", is_flag=True, help=f"Answers of {FULL_TOKENS} tokens.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def reshard(app: App, *, tokens: int | None, full: bool, model: str, output: str | None) -> None:
    """Move layers between daemons on this machine while four answers are streamed.

    A node joins, the boundaries move three times, a node is drained.  No answer may fail, and each
    must have the tokens of an undisturbed one.
    """
    from pyagent_node.benchmarks import reshard as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    count = tokens or (FULL_TOKENS if full else DEFAULT_TOKENS)
    with interruptible():
        path = str(model_file(app, model))
        figures = bench.measure(path, tokens=count, say=app.out.note)
    report = msgspec.convert(
        {
            "bench": "reshard",
            "time": time.time(),
            "machine": machine(),
            "model": model,
            "tokens": count,
            **figures,
        },
        bench.ReshardReport,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: ReshardReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("while")
    for name in ("took", "longest pause of each stream", "a token else"):
        table.add_column(name, justify="right")
    for event in report.events:
        table.add_row(
            event.what,
            f"{event.seconds:.1f} s",
            ", ".join(f"{stall:.0f}" for stall in event.stalls_ms) + " ms",
            f"{event.plain_ms:.1f} ms",
        )
    app.out.console.print(table)
    app.out.text(
        f"{report.streams} streams of {report.tokens} tokens, {report.failed} failed, tokens"
        f" {'as undisturbed' if report.identical else 'NOT THE SAME'}; stall at {report.switches}"
        f" switches: p50 {report.stall_ms_p50:.0f} ms, p99 {report.stall_ms_p99:.0f} ms."
    )
    app.out.text(
        f"Computed again: {report.recomputed_tokens} tokens in all, at most"
        f" {report.recomputed_a_switch:.0f} a stream and switch; KV moved between nodes:"
        f" {report.bytes_moved} bytes."
    )
