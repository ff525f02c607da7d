"""``bench backends``: llama.cpp, torch and MLX on the same weights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from pyagent_node.benchmarks.backends import BackendRow, BackendsReport

PROMPT_TOKENS, TOKENS, ROUNDS = 64, 16, 2
FULL_PROMPT_TOKENS, FULL_TOKENS, FULL_ROUNDS = 256, 64, 5


@click.command("backends")
@click.option("--full", is_flag=True, help="A longer prompt, more tokens, more rounds.")
@click.option("--threads", type=click.IntRange(1, 512), help="Default: as a runner.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def backends(app: App, *, full: bool, threads: int | None, model: str, output: str | None) -> None:
    """Every backend that is installed, beside its library's own generate loop in the same run.

    The weights are the model's in f16; perplexity and logits are those of one short text, compared
    with llama.cpp's.
    """
    from pyagent_node.benchmarks import backends as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415
    from pyagent_node.inference.threads import default_threads  # noqa: PLC0415

    prompt = FULL_PROMPT_TOKENS if full else PROMPT_TOKENS
    tokens, rounds = (FULL_TOKENS, FULL_ROUNDS) if full else (TOKENS, ROUNDS)
    with interruptible():
        path = model_file(app, model)
        rows = bench.measure(
            path,
            prompt_tokens=prompt,
            tokens=tokens,
            rounds=rounds,
            threads=threads or default_threads(),
            say=app.out.note,
        )
        scored = len(bench.tokenised(path))
    report = bench.BackendsReport(
        bench="backends",
        time=time.time(),
        machine=machine(),
        model=model,
        prompt_tokens=prompt,
        tokens=tokens,
        rounds=rounds,
        scored_tokens=scored,
        backends=rows,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: BackendsReport) -> None:
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("backend", "device", "prefill", "decode", "perplexity", "logits off", "own loop"):
        table.add_column(name, justify="left" if name == "backend" else "right")
    for row in report.backends:
        table.add_row(*(escape(cell) for cell in _cells(row)))  # a hint names an extra in brackets
    app.out.console.print(table)
    app.out.text(
        f"Tokens a second, prompts of {report.prompt_tokens}, {report.tokens} tokens an answer;"
        " own loop: ours over the library's, prefill and decode."
    )


def _cells(row: BackendRow) -> tuple[str, ...]:
    if not row.available:
        return (row.name, "-", "not installed", "", "", "", row.hint)

    def shown(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    own = row.baseline
    return (
        f"{row.name} {row.version}",
        row.device,
        shown(row.prefill_tokens_per_second),
        shown(row.decode_tokens_per_second),
        shown(row.perplexity, ".3f"),
        shown(row.max_logit_diff, ".3f"),
        f"{own.name} {own.prefill_ratio:.2f}, {own.decode_ratio:.2f}"
        if own is not None
        else row.hint or "-",
    )
