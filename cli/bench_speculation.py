"""``bench speculation``: what guessing ahead is worth where a token costs a trip."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import called, draft_file, model_file, place
from pyagent_node.cli.lists import names, numbers, refused
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pyagent_node.benchmarks.speculation import Plan, Row, SpeculationReport
    from pyagent_node.cli.demo import DraftFile

RANKS = 3
DEFAULT_TOKENS, FULL_TOKENS = 48, 128
DEFAULT_RTTS, FULL_RTTS = "0,50,100", "0,20,50,100,200"
MAX_RTT_MS = 2000.0
NAMED_DRAFTERS = ("none", "suffix", "auto")


def _drafters(text: str | None, model: str | None) -> tuple[str, ...]:
    """Read ``--drafter suffix,auto``; a model's name needs ``--drafter-model``."""
    if text is None:
        return ("auto",) if model else ("suffix",)
    asked = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(asked):
        remedy = f"Write {', '.join(NAMED_DRAFTERS)} or a model's name, with commas."
        raise refused("--drafter", text, remedy)
    unknown = [name for name in asked if name not in NAMED_DRAFTERS]
    if unknown and model is None:
        raise InvalidRequest(
            f"There is no drafter {unknown[0][:64]!r} without a model for it.",
            code="usage",
            remedy="Name the model with --drafter-model: its name in the catalogue, or its file.",
        )
    return asked


@click.command("speculation")
@click.option("--rtt-ms", metavar="N,M,..", help=f"Round trips of the links ({DEFAULT_RTTS}).")
@click.option("--prompts", default="code,prose,copy", show_default=True, metavar="K,L,..")
@click.option(
    "--drafter",
    metavar="D,E,..",
    help="none, suffix, auto or a model's name (suffix; auto with --drafter-model).",
)
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--drafter-model", help="A smaller model of its family, that drafts.")
@click.option(
    "--pair", is_flag=True, help="--model qwen2.5-coder-1.5b --drafter-model qwen2.5-coder-0.5b."
)
@click.option("--tokens", type=click.IntRange(8, 1500), help=f"An answer ({DEFAULT_TOKENS}).")
@click.option("--texts", type=click.IntRange(1, 3), default=2, show_default=True, help="A kind.")
@click.option("--rounds", type=click.IntRange(1, 100), default=1, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True)
@click.option("--threads", type=click.IntRange(0, 512), default=0, help="In each slice.")
@click.option("--pipelining", is_flag=True, help="Also: 1, 2 and 4 steps in flight, same drafts.")
@click.option("--grid", is_flag=True, help="Also: the controller against every fixed setting.")
@click.option("--full", is_flag=True, help=f"{FULL_TOKENS} tokens, round trips {FULL_RTTS}.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def speculation(
    app: App,
    *,
    rtt_ms: str | None,
    prompts: str,
    drafter: str | None,
    model: str,
    drafter_model: str | None,
    pair: bool,
    tokens: int | None,
    texts: int,
    rounds: int,
    temperature: float,
    threads: int,
    pipelining: bool,
    grid: bool,
    full: bool,
    output: str | None,
) -> None:
    """Answers with guesses against plain ones, by three daemons, over links of several lengths.

    All arms take turns on the same texts; the tokens are compared, and the speed that the head's
    cost model expected is told beside the one that came.  Short trips get more rounds.
    """
    from pyagent_node.benchmarks import speculation as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.benchmarks.texts import KINDS  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    if pair:
        model, drafter_model = "qwen2.5-coder-1.5b", drafter_model or "qwen2.5-coder-0.5b"
    trips = numbers(
        "--rtt-ms",
        rtt_ms or (FULL_RTTS if full else DEFAULT_RTTS),
        float,
        least=0.0,
        most=MAX_RTT_MS,
        remedy=f"Write milliseconds from 0 to {MAX_RTT_MS:g} with commas: 0,50,100.",
    )
    kinds = names("--prompts", prompts, KINDS)
    drafters = _drafters(drafter, drafter_model)
    count = tokens or (FULL_TOKENS if full else DEFAULT_TOKENS)
    with interruptible():
        path = model_file(app, model)
        drafting = draft_file(app, drafter_model)
        plan = bench.Plan(
            model="",
            drafters=drafters,
            kinds=kinds,
            tokens=count,
            texts=texts,
            rounds=rounds,
            temperature=temperature,
            pipelining=pipelining,
            grid=grid,
        )
        rows = _measure(app, plan, trips, path, drafting, threads, name=called(model))
    report = bench.SpeculationReport(
        bench="speculation",
        time=time.time(),
        machine=machine(),
        model=model,
        drafter_model=drafter_model,
        ranks=RANKS,
        tokens=count,
        texts=texts,
        rounds=rounds,
        temperature=temperature,
        runs=tuple(map(bench.summarise, rows)),
        pipelining=tuple(piped for row in rows for piped in bench.pipelining(row)),
        grid=tuple(found for row in rows if (found := bench.choice(row)) is not None),
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _measure(  # noqa: PLR0917 - private
    app: App,
    plan: Plan,
    trips: Sequence[float],
    path: Path,
    drafting: DraftFile | None,
    threads: int,
    *,
    name: str | None,
) -> list[Row]:
    """Measure every row on one swarm."""
    import msgspec  # noqa: PLC0415

    from pyagent_node.benchmarks import speculation as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.shaped import reshape, shaped_swarm  # noqa: PLC0415

    rows: list[Row] = []
    with shaped_swarm(RANKS, threads=threads, say=app.out.note) as swarm:
        name = place(app, swarm, path, name=name).name
        if drafting is not None:
            drafter_model = drafting.give(swarm[0])
            given = tuple(
                drafter
                if drafter in (*NAMED_DRAFTERS, f"{drafter_model}+suffix")
                else drafter_model
                for drafter in plan.drafters
            )
            plan = msgspec.structs.replace(
                plan, drafters=tuple(dict.fromkeys(given)), drafter_model=drafter_model
            )
        plan = msgspec.structs.replace(plan, model=name)
        with _ticking(app, sum(map(plan.answers, trips))) as (tick, say):
            for trip in trips:
                say(f"round trips of {trip:g} ms")
                if trip or drafting is not None or rows:
                    reshape(swarm, trip, name)
                rows += bench.measure(plan, trip, swarm[0], tick)
    return rows


class _ticking:  # noqa: N801 - a context manager that reads as a word
    """Shows how many answers there are; gives what counts one and what names the step."""

    def __init__(self, app: App, total: int) -> None:
        from pyagent_node.cli.progress import Reporter  # noqa: PLC0415

        self._reporter = Reporter(app.out, stream_json=False)
        self._total = total
        self._done = 0
        self._text = ""

    def __enter__(self) -> tuple[Callable[[], None], Callable[[str], None]]:
        self._reporter.__enter__()
        return self._tick, self._say

    def __exit__(self, *_: object) -> None:
        self._reporter.__exit__(None, None, None)

    def _tick(self) -> None:
        self._done += 1
        self._show()

    def _say(self, text: str) -> None:
        self._text = text
        self._show()

    def _show(self) -> None:
        from pyagent_node.node.api.schema import Progress  # noqa: PLC0415

        self._reporter(
            Progress(
                step="answers", text=self._text, done=self._done, total=self._total, unit="answers"
            )
        )


def _show(app: App, report: SpeculationReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    def table(*names: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="dim")
        for name in names:
            made.add_column(name, justify="left" if name in ("text", "drafter") else "right")
        return made

    runs = table("rtt", "text", "drafter", "plain", "guessed", "times", "expected")
    for name in ("tokens a pass", "right", "for nothing", "same tokens"):
        runs.add_column(name, justify="right")
    for run in report.runs:
        runs.add_row(
            f"{run.rtt_ms:g} ms",
            run.prompts,
            run.drafter,
            f"{run.plain_tokens_per_second:.1f}",
            f"{run.tokens_per_second:.1f}",
            f"{run.speedup:.2f}",
            f"{run.predicted_speedup:.2f}",
            f"{run.tokens_per_pass:.2f}",
            f"{run.acceptance:.0%}",
            f"{run.cancelled:.0%}",
            "yes" if run.identical else "NO",
        )
    app.out.console.print(runs)
    app.out.text(
        f"plain, guessed: tokens/s; expected: by the head's cost model.  {report.texts} texts a"
        f" kind, {report.tokens} tokens each, temperature {report.temperature:g}."
    )
    if report.pipelining:
        piped = table("rtt", "text", "drafter", "guesses", "in flight", "tokens/s", "gain")
        for name in ("counted", "for nothing", "same tokens"):
            piped.add_column(name, justify="right")
        for each in report.pipelining:
            piped.add_row(
                f"{each.rtt_ms:g} ms",
                each.prompts,
                each.drafter,
                str(each.length),
                str(each.depth),
                f"{each.tokens_per_second:.1f}",
                f"{each.gain:.2f}",
                f"{each.reused:.0%}",
                f"{each.wasted:.0%}",
                "yes" if each.identical else "NO",
            )
        app.out.text("\nSeveral steps in flight:")
        app.out.console.print(piped)
    if report.grid:
        grid = table("rtt", "text", "drafter", "controller", "best fixed", "at", "share")
        for found in report.grid:
            grid.add_row(
                f"{found.rtt_ms:g} ms",
                found.prompts,
                found.drafter,
                f"{found.tokens_per_second:.1f}",
                f"{found.best_tokens_per_second:.1f}",
                f"{found.best_length}/{found.best_depth}",
                f"{found.share:.2f}",
            )
        app.out.text("\nThe controller against the best fixed guesses/steps in flight:")
        app.out.console.print(grid)
