"""``bench edge``: clients far away from the node that computes, with and without guesses."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import N_CTX, called, draft_file, model_file
from pyagent_node.cli.lists import names, numbers
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pyagent_node.benchmarks.edge import EdgeReport, Plan, Run
    from pyagent_node.cli.demo import DraftFile

MAX_CLIENTS = 32
MAX_EDGES = 8
DEFAULT_TOKENS = 64


@click.command("edge")
@click.option("--clients", default="1,4,16", show_default=True, metavar="N,M,..")
@click.option("--rtt-ms", type=click.FloatRange(0, 2000), default=50, show_default=True)
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--drafter", help="A smaller model, a source or a file: one more arm, at the edge.")
@click.option("--prompts", default="code,copy,prose", show_default=True, metavar="K,L,..")
@click.option(
    "--edges",
    type=click.IntRange(1, MAX_EDGES),
    default=1,
    show_default=True,
    help="Daemons that the clients share.",
)
@click.option("--tokens", type=click.IntRange(8, 700), default=DEFAULT_TOKENS, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=2, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 10), default=0.0, show_default=True)
@click.option("--threads", type=click.IntRange(0, 512), default=0, help="Of the strong node.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def edge(
    app: App,
    *,
    clients: str,
    rtt_ms: float,
    model: str,
    drafter: str | None,
    prompts: str,
    edges: int,
    tokens: int,
    rounds: int,
    temperature: float,
    threads: int,
    output: str | None,
) -> None:
    """One node holds a whole model; its clients are a round trip away, and guess or do not.

    Against the same node that streams its own tokens over the same path.  All arms take turns on
    the same texts; the tokens are compared.
    """
    from pyagent_node.benchmarks import edge as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.benchmarks.texts import KINDS  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    counts = numbers(
        "--clients",
        clients,
        int,
        least=1,
        most=MAX_CLIENTS,
        remedy=f"Write numbers from 1 to {MAX_CLIENTS} with commas: 1,4,16.",
    )
    kinds = names("--prompts", prompts, KINDS)
    with interruptible():
        path = model_file(app, model)
        drafting = draft_file(app, drafter)
        plan = bench.Plan(
            model="",
            drafters=(),
            kinds=kinds,
            tokens=tokens,
            rounds=rounds,
            temperature=temperature,
        )
        runs = _measure(
            app,
            plan,
            counts,
            rtt_ms,
            edges=edges,
            path=path,
            drafting=drafting,
            name=called(model),
            threads=threads,
        )
    report = bench.EdgeReport(
        bench="edge",
        time=time.time(),
        machine=machine(),
        model=model,
        drafter_model=drafter,
        rtt_ms=rtt_ms,
        edges=edges,
        tokens=tokens,
        rounds=rounds,
        temperature=temperature,
        runs=tuple(runs),
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _measure(
    app: App,
    plan: Plan,
    counts: Sequence[int],
    rtt_ms: float,
    *,
    edges: int,
    path: Path,
    drafting: DraftFile | None,
    name: str | None,
    threads: int,
) -> list[Run]:
    """Measure every number of clients on one swarm, whose first node is the strong one."""
    import msgspec  # noqa: PLC0415
    import trio  # noqa: PLC0415

    from pyagent_node.benchmarks import edge as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.shaped import (  # noqa: PLC0415
        await_answers,
        reshape,
        shaped_swarm,
    )
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.answers import Ask  # noqa: PLC0415
    from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest  # noqa: PLC0415

    runs: list[Run] = []
    with shaped_swarm(1 + edges, threads=threads, say=app.out.note) as (server, *others):
        name = server.client.pull(PullRequest(source=f"file:{path}", name=name)).name
        server.client.load(
            LoadRequest(
                model=name,
                ranks=1,
                nodes=(server.peer_id,),
                n_ctx=N_CTX,
                n_seq=max(counts),
                standbys=0,
                spares=0,
            )
        )
        drafters = ["suffix"]
        if drafting is not None:
            drafters += list(dict.fromkeys(map(drafting.give, others)))
        reshape([server, *others], rtt_ms, name)
        plan = msgspec.structs.replace(plan, model=name, drafters=tuple(drafters))
        for node in others:
            for drafter in drafters:
                ask = Ask(
                    model=name,
                    prompt="One, two,",
                    max_tokens=4,
                    ignore_eos=True,
                    speculation=drafter,
                )
                await_answers(node, ask)
        total = len(plan.arms) * plan.rounds * sum(counts)
        done = 0
        with Reporter(app.out, stream_json=False) as report:

            def tick() -> None:
                nonlocal done
                done += 1
                report(Progress(step="answers", text="", done=done, total=total, unit="answers"))

            for count in counts:
                runs += trio.run(bench.measure, plan, count, server, others, rtt_ms, tick)
    return runs


def _show(app: App, report: EdgeReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("clients", justify="right")
    table.add_column("arm")
    for name in ("tokens/s", "busy a token", "cpu", "pause p50", "p99", "mean", "tokens a pass"):
        table.add_column(name, justify="right")
    for name in ("right", "rows a token", "rows a batch", "same tokens"):
        table.add_column(name, justify="right")
    for run in report.runs:
        table.add_row(
            str(run.clients),
            run.arm,
            f"{run.tokens_per_second:.1f}",
            f"{run.server_busy_ms_per_token:.1f} ms",
            f"{run.server_cpu_ms_per_token:.1f} ms",
            f"{run.inter_token_ms_p50:.0f} ms",
            f"{run.inter_token_ms_p99:.0f} ms",
            f"{run.inter_token_ms_mean:.0f} ms",
            f"{run.tokens_per_pass:.2f}",
            f"{run.acceptance:.0%}",
            f"{run.rows_per_token:.2f}",
            f"{run.tokens_per_batch:.1f}",
            "yes" if run.identical else "NO",
        )
    app.out.console.print(table)
    app.out.text(
        f"server: the strong node streams its own tokens; edge: the head is {report.rtt_ms:g} ms"
        f" away and nobody guesses; others: it guesses.  {report.tokens} tokens each, prompts'"
        " time taken off."
    )
