"""``bench context``: a large context over daemons, and what a question finds in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.bench_growth import growth
from pyagent_node.cli.bench_memory import LENGTHS, memory
from pyagent_node.cli.demo import MAX_NODES, model_file
from pyagent_node.cli.model import DEFAULT
from pyagent_node.cli.output import size
from pyagent_node.cli.progress import Reporter

if TYPE_CHECKING:
    from pyagent_node.benchmarks.context_index import Row
    from pyagent_node.benchmarks.context_swarm import ContextReport

DEFAULT_TOKENS, FULL_TOKENS = 50_000, 1_000_000
ASKED = (1, 2, 4, 8, 16)


@click.command("context")
@click.option(
    "--tokens",
    type=click.IntRange(2_000, 100_000_000),
    help=f"About how many tokens are added (default {DEFAULT_TOKENS}).",
)
@click.option(
    "--nodes", type=click.IntRange(1, MAX_NODES), default=4, show_default=True, help="Daemons."
)
@click.option("--full", is_flag=True, help=f"{FULL_TOKENS} tokens.")
@click.option(
    "--answers",
    type=click.IntRange(0, 134),
    default=8,
    show_default=True,
    help="Questions that a model answers, too.",
)
@click.option(
    "--top",
    type=click.IntRange(1, 32),
    default=8,
    show_default=True,
    help="Chunks in the prompt of an answer.",
)
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option(
    "--encoder",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="A folder with the encoder's model.onnx and tokenizer.json (default: fetched).",
)
@click.option(
    "--part",
    type=click.Choice(("swarm", "memory", "growth")),
    default="swarm",
    show_default=True,
    help="memory: what pruning saves of a model's KV, and what it costs; growth: several sizes.",
)
@click.option(
    "--with",
    "before",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    multiple=True,
    help="A stored run whose figures count, for growth; without --tokens nothing is measured then.",
)
@click.option("--lengths", metavar="N,M,..", help=f"Of contexts, for memory ({LENGTHS}).")
@click.option(
    "--kv-budget",
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Cells that pruning leaves, for memory.",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 512),
    default=2,
    show_default=True,
    help="Of the model, for memory.",
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw memory or growth: an SVG file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def context(
    app: App,
    *,
    tokens: int | None,
    nodes: int,
    full: bool,
    answers: int,
    top: int,
    model: str,
    encoder: Path | None,
    part: str,
    before: tuple[Path, ...],
    lengths: str | None,
    kv_budget: str,
    threads: int,
    plot: str | None,
    output: str | None,
) -> None:
    """Python's standard library, 201 sentences hidden in it, asked for in other words.

    Daemons on this machine add it and are asked.  Baselines over the same chunks and vectors: exact
    search, BM25, random hyperplanes; and recall where only some of 16 nodes can be asked.  The
    questions are those that tuning never saw.

    With --part memory: one model behind contexts of several lengths, with all cells of its KV, with
    those that attention rests on, and with the last ones alone: bytes held, perplexity of the text
    that follows, and facts that are asked for.

    With --part growth: 10,000, 100,000 and 1,000,000 tokens, and the index alone at 10,000,000; or
    one size (--tokens), beside rows of stored runs (--with).
    """
    if part == "memory":
        memory(
            app,
            model,
            lengths or LENGTHS,
            kv_budget,
            threads=threads,
            plot=plot,
            output=output,
        )
        return
    if part == "growth":
        growth(app, tokens, nodes, encoder, before=before, plot=plot, output=output)
        return
    from pyagent_node.benchmarks import context_swarm as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415
    from pyagent_node.node.offline import open_store  # noqa: PLC0415

    if encoder is None:
        app.out.note("The encoder is fetched if it is not here (106 MB).")
    path = model_file(app, model) if answers else Path()
    with interruptible(), Reporter(app.out, stream_json=False) as progress:
        report = bench.run(
            tokens or (FULL_TOKENS if full else DEFAULT_TOKENS),
            nodes,
            bench.encoder(open_store(app.home, app.settings()), encoder),
            model=path,
            answers=answers,
            top=top,
            report=progress,
            say=app.out.note,
            machine=machine(),
        )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: ContextReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("way", "recall@8", "recall@16", "p50", "p99"):
        table.add_column(name, justify="left" if name == "way" else "right")
    swarm: Row = {
        "recall_at_8": report.recall_at_8,
        "recall_at_16": report.recall_at_16,
        "query_ms_p50": report.query_ms_p50,
        "query_ms_p99": report.query_ms_p99,
    }
    rows = {
        f"{report.nodes} daemons": swarm,
        f"{report.nodes} daemons, by meaning alone": report.by_meaning,
        **report.baselines,
    }
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['recall_at_8']:.3f}",
            f"{row['recall_at_16']:.3f}",
            f"{row['query_ms_p50']:.1f} ms",
            f"{row['query_ms_p99']:.1f} ms",
        )
    app.out.console.print(table)
    app.out.text(
        f"{report.questions} questions.  The baselines search in one process, and their times are"
        f" without the question's vector ({report.question_vector_ms_p50:.1f} ms on the daemons)."
    )
    curve = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("recall@8, of 16 nodes asked", *map(str, ASKED), "largest node"):
        curve.add_column(name, justify="left" if "recall" in name else "right")
    for name, row in report.spread.items():
        curve.add_row(
            name, *(f"{row[f'nodes_{n}']:.3f}" for n in ASKED), f"{row['largest_node']:.1%}"
        )
    app.out.console.print(curve)
    held = report.sharded
    app.out.text(
        f"Sketches spread over 16 nodes: recall@8 {held['recall_at_8']:.3f} with"
        f" {held['nodes_asked']:.1f} nodes asked for sketches, {held['nodes_8']:.3f} with 8;"
        f" {held['bytes_a_node']:.0f} bytes of sketches a node instead of"
        f" {held['bytes_a_node_replicated']:.0f}."
    )
    app.out.text(
        f"{report.tokens} tokens, {report.documents} files, {report.chunks} chunks,"
        f" {report.windows} windows, added in {report.ingest_seconds:.0f} s"
        f" ({report.tokens_per_second:.0f} tokens/s).  Every node holds"
        f" {size(report.index_bytes)} ({report.replicated_bytes_per_window:.1f} bytes a window);"
        f" chunks and vectors are {size(report.chunk_bytes)} over all nodes, copies counted."
        f"  A question asked {report.nodes_contacted_fraction:.0%} of the nodes,"
        f" for {report.candidate_chunks:.0f} chunks; {report.missing} could not be had."
    )
    if (answered := report.answers) is not None:
        app.out.text(
            f"{answered.questions} answers: the first token came after {answered.ttft_joined:.2f} s"
            f" from KV of chunks, {answered.ttft_computed:.2f} s computed"
            f" ({answered.kv_ttft_speedup:.1f} times); right {answered.answer_accuracy:.0%},"
            f" computed {answered.answer_accuracy_full_prefill:.0%}: a difference of"
            f" {answered.accuracy_points:+.1f} points (standard error"
            f" {answered.accuracy_points_error:.1f}).  The fact was among the {answered.chunks}"
            f" chunks of {answered.found:.0%}."
        )
