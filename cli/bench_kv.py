"""``bench kv``: what keeping KV as blocks saves and costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from pyagent_node.benchmarks.kv_types import KvReport

PREFIX, SCORED = 768, 256
DEFAULT_TEXTS, FULL_TEXTS = 3, 16
ROUNDS = 9


@click.command("kv")
@click.option("--texts", type=click.IntRange(1, FULL_TEXTS), help=f"Default {DEFAULT_TEXTS}.")
@click.option("--full", is_flag=True, help=f"{FULL_TEXTS} texts.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def kv(app: App, *, texts: int | None, full: bool, model: str, output: str | None) -> None:
    """The levels of the KV codec: bytes, speed, and what they cost in perplexity on real text.

    The baselines are llama.cpp's own KV types q8_0 and q4_0.
    """
    from pyagent_node.benchmarks.kv_codec import measure_apart  # noqa: PLC0415
    from pyagent_node.benchmarks.kv_types import CodecJob, KvReport  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    with interruptible():
        job = CodecJob(
            path=str(model_file(app, model)),
            texts=texts or (FULL_TEXTS if full else DEFAULT_TEXTS),
            prefix=PREFIX,
            scored=SCORED,
            rounds=ROUNDS,
        )
        app.out.note(f"  {job.texts} texts, scored with their KV kept in several ways")
        result = measure_apart(job)
    report = KvReport(
        bench="kv",
        time=time.time(),
        machine=machine(),
        model=model,
        prefix=job.prefix,
        scored=job.scored,
        result=result,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: KvReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("level", "smaller", "bytes a layer", "encode", "decode", "keys off", "values off"):
        table.add_column(name, justify="right")
    for each in report.result.codec:
        table.add_row(
            each.level,
            f"{each.ratio:.2f} x",
            f"{each.bytes_per_token:.0f}",
            f"{each.encode_mb_per_second:.0f} MB/s",
            f"{each.decode_mb_per_second:.0f} MB/s",
            f"{each.key_error:.2%}",
            f"{each.value_error:.2%}",
        )
    app.out.console.print(table)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("KV", "", "smaller", "bytes a token", "perplexity", "cost", "+-", "divergence"):
        table.add_column(name, justify="right")
    for row in report.result.quality:
        table.add_row(
            row.kind,
            row.how,
            f"{row.ratio:.2f} x",
            f"{row.bytes_per_token:.0f}",
            f"{row.perplexity:.3f}",
            f"{row.cost:+.2%}",
            f"{row.cost_error:.2%}",
            f"{row.divergence:.4f}",
        )
    app.out.console.print(table)
    app.out.text(
        f"{report.result.scored_tokens} tokens of {len(report.result.texts)} texts, each scored"
        f" behind {report.prefix} tokens whose KV was kept so; divergence from f16 in nats."
    )
