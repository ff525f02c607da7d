"""``bench failover``: how long a user waits when a node dies in the middle of an answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.demo import model_file
from pyagent_node.cli.lists import names
from pyagent_node.cli.model import DEFAULT

if TYPE_CHECKING:
    from pyagent_node.benchmarks.failover import FailoverReport

DEFAULT_TOKENS, DEFAULT_ROUNDS, FULL_ROUNDS = 96, 1, 5


@click.command("failover")
@click.option("--kinds", default="", metavar="K,L,..", help="Which deaths (default: all).")
@click.option(
    "--tokens",
    type=click.IntRange(48, 1500),
    default=DEFAULT_TOKENS,
    show_default=True,
    help="The length of an answer.",
)
@click.option(
    "--context",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="About how many tokens the prompt has besides the question.",
)
@click.option(
    "--blocks/--no-blocks",
    default=True,
    help="Whether the answer leaves KV blocks to go on from (default), or is replayed.",
)
@click.option("--rounds", type=click.IntRange(1, 100), help=f"Default {DEFAULT_ROUNDS}.")
@click.option("--full", is_flag=True, help=f"{FULL_ROUNDS} rounds.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def failover(
    app: App,
    *,
    kinds: str,
    tokens: int,
    context: int,
    blocks: bool,
    rounds: int | None,
    full: bool,
    model: str,
    output: str | None,
) -> None:
    """`kill -9` of a daemon in the middle of an answer that five of them give with three ranks.

    hot: a standby has the slice loaded.  cold: a spare has it on disk.  missing: nobody has it, it
    is fetched from peers.  leader: the Raft leader dies.  leader+rank: both at once, hot.  The
    answer must have the tokens of an undisturbed one.
    """
    from pyagent_node.benchmarks import failover as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    asked = names("--kinds", kinds, bench.KINDS) if kinds else bench.KINDS
    count = rounds or (FULL_ROUNDS if full else DEFAULT_ROUNDS)
    with interruptible():
        path = str(model_file(app, model))
        recoveries = tuple(
            bench.measure(
                kind, path, tokens=tokens, say=app.out.note, context=context, blocks=blocks
            )
            for _ in range(count)
            for kind in asked
        )
    report = bench.FailoverReport(
        bench="failover",
        time=time.time(),
        machine=machine(),
        model=model,
        tokens=tokens,
        context=context,
        blocks=blocks,
        recoveries=recoveries,
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _show(app: App, report: FailoverReport) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("died", "stall", "a token else", "failovers", "computed again", "same tokens"):
        table.add_column(name, justify="right")
    for each in report.recoveries:
        table.add_row(
            each.kind,
            f"{each.stall_ms:.0f} ms",
            f"{each.plain_ms:.1f} ms",
            str(each.failovers),
            f"{each.recomputed_tokens} tokens",
            "yes" if each.identical else "NO",
        )
    app.out.console.print(table)
    app.out.text(
        f"stall: the longest pause between two of {report.tokens} tokens, as the client saw it;"
        f" the kill came after token {_kill_at()}."
    )


def _kill_at() -> int:
    from pyagent_node.benchmarks.failover import KILL_AT  # noqa: PLC0415

    return KILL_AT
