"""``bench kv``: what keeping KV as blocks saves and costs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from pyagent_node.benchmarks.kv_types import CodecResult, KvReport, ReuseRow

PREFIX, SCORED = 768, 256
DEFAULT_TEXTS, FULL_TEXTS = 3, 16
ROUNDS = 9
LEVELS = ("f16", "int8", "int4", "int3")
DEFAULT_LEVELS = "f16,int4"
FULL_REUSE_ROUNDS = 3


def _levels(text: str) -> tuple[str, ...]:
    """Read ``--levels f16,int4``."""
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(asked) <= set(LEVELS):
        raise InvalidRequest(
            f"--levels is {text[:80]!r}.",
            code="usage",
            remedy=f"Write some of these with commas: {','.join(LEVELS)}.",
        )
    return asked


@click.command("kv")
@click.option("--texts", type=click.IntRange(1, FULL_TEXTS), help=f"Default {DEFAULT_TEXTS}.")
@click.option("--levels", metavar="L,M,..", help=f"For first tokens (default {DEFAULT_LEVELS}).")
@click.option(
    "--part",
    type=click.Choice(("all", "codec", "reuse")),
    default="all",
    show_default=True,
    help="codec: bytes and perplexity; reuse: first tokens.",
)
@click.option("--full", is_flag=True, help=f"{FULL_TEXTS} texts, all levels, more rounds.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def kv(
    app: App,
    *,
    texts: int | None,
    levels: str | None,
    part: str,
    full: bool,
    model: str,
    output: str | None,
) -> None:
    """The levels of the KV codec: bytes, speed, and what they cost in perplexity on real text.

    The baselines are llama.cpp's own KV types q8_0 and q4_0.  Then the time to the first token
    behind a prefix of about 2,000 tokens: computed again, found by every rank, and fetched by every
    rank from another node, over fast links, slow ones, and (with --full for all levels) such that
    fetching takes about as long as computing.  Each row says what the cost model chose and how that
    compares with the better of fetching everything and computing everything.
    """
    from pyagent_node.benchmarks import kv_codec, kv_reuse  # noqa: PLC0415
    from pyagent_node.benchmarks.kv_types import CodecJob, KvReport  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    asked = _levels(
        levels if levels is not None else (",".join(LEVELS) if full else DEFAULT_LEVELS)
    )
    with interruptible():
        job = CodecJob(
            path=str(model_file(app, model)),
            texts=texts or (FULL_TEXTS if full else DEFAULT_TEXTS),
            prefix=PREFIX,
            scored=SCORED,
            rounds=ROUNDS,
        )
        result = None
        if part != "reuse":
            app.out.note(f"  {job.texts} texts, scored with their KV kept in several ways")
            result = kv_codec.measure_apart(job)
        reuse: tuple[ReuseRow, ...] = ()
        if part != "codec":
            rounds = FULL_REUSE_ROUNDS if full else 1
            close = asked if full else asked[:1]
            reuse = tuple(
                kv_reuse.measure(job.path, asked, rounds=rounds, close=close, say=app.out.note)
            )
    report = KvReport(
        bench="kv",
        time=time.time(),
        machine=machine(),
        model=model,
        prefix=job.prefix,
        scored=job.scored,
        result=result,
        reuse=reuse,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: KvReport) -> None:
    if report.result is not None:
        _show_codec(app, report.result, report.prefix)
    if report.reuse:
        _show_reuse(app, report.reuse)


def _show_reuse(app: App, rows: tuple[ReuseRow, ...]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("level", "link", "computed", "local", "remote", "faster", "reused", "same tokens")
    for name in (*names, "all fetched", "choice", "better", "over it"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.level,
            row.link,
            f"{row.recompute_ms:.0f} ms",
            f"{row.local_ms:.0f} ms",
            f"{row.remote_ms:.0f} ms",
            f"{row.recompute_ms / row.remote_ms:.1f} x" if row.remote_ms else "",
            f"{row.remote_cached} of {row.prompt_tokens}",
            "yes" if row.identical else "no",
            f"{row.fetch_ms:.0f} ms",
            row.choice,
            row.better,
            f"{row.ratio:.2f} x",
        )
    app.out.console.print(table)
    app.out.text("remote: what the cost model chose; over it: that against the better choice.")
    app.out.text("faster: the first token with the blocks of other nodes against computing them.")


def _show_codec(app: App, result: CodecResult, prefix: int) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("level", "smaller", "bytes a layer", "encode", "decode", "keys off", "values off"):
        table.add_column(name, justify="right")
    for each in result.codec:
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
    for row in result.quality:
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
        f"{result.scored_tokens} tokens of {len(result.texts)} texts, each scored"
        f" behind {prefix} tokens whose KV was kept so; divergence from f16 in nats."
    )
