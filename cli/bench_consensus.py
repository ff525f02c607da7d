"""``bench consensus``: what a decision costs, and the death of the leader."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, cast

import click
import msgspec

from pyagent_node.cli.app import App, json_option, pass_app

if TYPE_CHECKING:
    from pyagent_node.benchmarks.consensus import Figures
    from pyagent_node.benchmarks.consensus_node import EngineName

FULL_KILLS, FULL_COMMITS = 30, 2000


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures with what they depend on."""

    bench: str
    time: float
    machine: dict[str, str | int]
    engine: str
    voters: int
    commit_ms_p50: float
    commit_ms_p99: float
    follower_commit_ms_p50: float
    commits_per_second: float
    failover_ms_p50: float
    failover_ms_max: float
    failovers_ms: list[float]
    election_timeout_ms: tuple[float, float]
    fsync_ms_p50: float


@click.command("consensus")
@click.option(
    "--engine",
    type=click.Choice(["raft-rs", "pysyncobj"]),
    default="raft-rs",
    show_default=True,
    help="Who decides.",
)
@click.option("--voters", type=click.IntRange(3, 7), default=3, show_default=True)
@click.option("--kills", type=click.IntRange(1, 1000), help="Times the leader dies (default 8).")
@click.option("--full", is_flag=True, help=f"{FULL_COMMITS} commits, {FULL_KILLS} deaths.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def consensus(
    app: App, *, engine: str, voters: int, kills: int | None, full: bool, output: str | None
) -> None:
    """Commits, and failovers after `kill -9` of the leader, with processes and disks of their own.

    Every commit is synced on a majority of the voters; the baseline is a plain write and sync.
    """
    from pyagent_node.benchmarks import consensus as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415

    plan = bench.Plan(engine=cast("EngineName", engine), voters=voters)
    if full:
        plan = msgspec.structs.replace(plan, kills=FULL_KILLS, commits=FULL_COMMITS)
    if kills is not None:
        plan = msgspec.structs.replace(plan, kills=kills)
    with interruptible():
        figures = bench.measure(plan, say=app.out.note)
    report = _report(figures, machine())
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def _report(figures: Figures, machine: dict[str, str | int]) -> Report:
    return Report(
        bench="consensus",
        time=time.time(),
        machine=machine,
        engine=figures.plan.engine,
        voters=figures.plan.voters,
        commit_ms_p50=figures.commit_ms_p50,
        commit_ms_p99=figures.commit_ms_p99,
        follower_commit_ms_p50=figures.follower_commit_ms_p50,
        commits_per_second=figures.commits_per_second,
        failover_ms_p50=figures.failover_ms_p50,
        failover_ms_max=figures.failover_ms_max,
        failovers_ms=figures.failovers_ms,
        election_timeout_ms=(figures.election_timeout.low_ms, figures.election_timeout.high_ms),
        fsync_ms_p50=figures.fsync_ms_p50,
    )


def _show(app: App, report: Report) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("engine", "voters", "commit p50", "p99", "at a follower", "commits/s"):
        table.add_column(name, justify="right")
    for name in ("failover p50", "max", "a plain sync"):
        table.add_column(name, justify="right")
    table.add_row(
        report.engine,
        str(report.voters),
        f"{report.commit_ms_p50:.2f} ms",
        f"{report.commit_ms_p99:.2f} ms",
        f"{report.follower_commit_ms_p50:.2f} ms",
        f"{report.commits_per_second:.0f}",
        f"{report.failover_ms_p50:.0f} ms",
        f"{report.failover_ms_max:.0f} ms",
        f"{report.fsync_ms_p50:.2f} ms",
    )
    app.out.console.print(table)
    low, high = report.election_timeout_ms
    app.out.text(
        f"{len(report.failovers_ms)} deaths of the leader; an election begins {low:.0f} to"
        f" {high:.0f} ms after its last sign of life."
    )
