"""``simulate``: the whole swarm on virtual time, with faults drawn from a seed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pyagent_node.base.files import write_atomic
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.simulate_plan import (
    DURATION,
    FAULTS,
    MAX_SEED,
    MAX_SEEDS,
    NODES,
    Plan,
    check_writable,
    chosen_plan,
    chosen_seeds,
    usage,
)
from pyagent_node.cli.simulate_report import line, list_faults, show

if TYPE_CHECKING:
    from pyagent_node.simulations.faults import Schedule
    from pyagent_node.simulations.jobs import Job, Verdict


class Shrunk(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json --shrink`` prints at the end."""

    seed: int
    shrunk: str
    nodes: int
    duration: float
    faults: int
    runs: int
    replay: str


@click.command("simulate")
@click.option("--nodes", type=click.IntRange(1, 256), help=f"Default {NODES}.")
@click.option(
    "--duration",
    type=click.FloatRange(0, 86_400, min_open=True),
    metavar="SECONDS",
    help=f"Virtual time in which faults strike (default {DURATION:g}).",
)
@click.option("--seed", type=click.IntRange(0, MAX_SEED), help="Run this seed.")
@click.option("--seeds", metavar="A..B", help="Run these seeds, both ends included.")
@click.option("--fresh", type=click.IntRange(1, MAX_SEEDS), metavar="N", help="N new seeds.")
@click.option(
    "--faults", default=FAULTS, show_default=True, metavar="NAME|FILE", help="What goes wrong."
)
@click.option("--list-faults", "list_only", is_flag=True, help="List the named mixes of faults.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Seeds at a time (default: one a core).",
)
@click.option(
    "--limit",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="Real time after which a seed counts as hanging (default: 120 s and more with size).",
)
@click.option("--shrink", is_flag=True, help="Find a smaller schedule that still fails.")
@click.option(
    "--shrink-runs",
    type=click.IntRange(1, 100_000),
    default=200,
    show_default=True,
    metavar="N",
    help="Runs that --shrink may take.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="Where --shrink writes the schedule (default: ./faults-SEED.json).",
)
@click.option(
    "--trace", type=click.Path(dir_okay=False), help="Write every event of one seed to a file."
)
@json_option
@pass_app
def simulate_command(
    app: App,
    *,
    nodes: int | None,
    duration: float | None,
    seed: int | None,
    seeds: str | None,
    fresh: int | None,
    faults: str,
    list_only: bool,
    jobs: int | None,
    limit: float | None,
    shrink: bool,
    shrink_runs: int,
    output: str | None,
    trace: str | None,
) -> int:
    """The real node code on a simulated network, disk and clock, while things go wrong.

    Each seed decides every random choice of a run: which faults strike when, who asks what, in
    which order tasks run. The same seed gives the same run, on any machine. First faults strike,
    then all is mended and the swarm must recover; what must always hold is checked all the time.
    Exits with 1 when anything was broken, and tells how to see it again. Without a seed, a new one
    is drawn.
    """
    if list_only:
        list_faults(app)
        return 0
    chosen = chosen_seeds(seed, seeds, fresh)
    if limit is not None and math.isnan(limit):
        raise usage("--limit is not a number.", "Write seconds: --limit 300.")
    plan = chosen_plan(nodes, duration, faults)
    if trace is not None and len(chosen) > 1:
        raise usage("--trace takes one seed.", "Give it with --seed.")
    for path in (trace, output if shrink else None):
        check_writable(path)
    from pyagent_node.simulations.jobs import Job  # noqa: PLC0415

    work = [Job(each, plan.schedule(each), trace is not None) for each in chosen]
    verdicts = _play(app, plan, work, jobs or _cores(), limit)
    if trace is not None:
        write_atomic(Path(trace), "".join(f"{e}\n" for e in verdicts[0].trace).encode(), 0o644)
        app.out.note(f"Wrote {len(verdicts[0].trace)} events to {trace}.")
    failed = [verdict for verdict in verdicts if verdict.failed]
    if not app.out.json:
        show(app, plan, verdicts)
    if shrink and failed:
        _shrink(app, plan, failed[0], limit=limit, runs=shrink_runs, output=output)
    return 1 if failed else 0


def _cores() -> int:
    """Return how many cores this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable is not None else os.cpu_count() or 1


def _play(
    app: App, plan: Plan, work: Sequence[Job], workers: int, limit: float | None
) -> list[Verdict]:
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.schema import Progress  # noqa: PLC0415
    from pyagent_node.simulations.pool import play_all  # noqa: PLC0415

    verdicts: list[Verdict] = []
    with Reporter(app.out, stream_json=False) as report:

        def step() -> None:
            broken = sum(verdict.failed for verdict in verdicts)
            text = f"Simulating, {broken} failed" if broken else "Simulating"
            report(
                Progress(step="seeds", text=text, done=len(verdicts), total=len(work), unit="seeds")
            )

        def done(_: Job, verdict: Verdict) -> None:
            verdicts.append(verdict)
            app.out.line(line(plan, verdict))
            step()

        step()
        play_all(work, workers=workers, done=done, limit=limit)
    return sorted(verdicts, key=lambda verdict: verdict.outcome.seed)


def _shrink(
    app: App, plan: Plan, verdict: Verdict, *, limit: float | None, runs: int, output: str | None
) -> None:
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.schema import Progress  # noqa: PLC0415
    from pyagent_node.simulations.faults import encode_schedule  # noqa: PLC0415
    from pyagent_node.simulations.jobs import Job  # noqa: PLC0415
    from pyagent_node.simulations.pool import play  # noqa: PLC0415
    from pyagent_node.simulations.shrink import shrink_schedule  # noqa: PLC0415

    seed, asked = verdict.outcome.seed, 0
    with Reporter(app.out, stream_json=False) as report:

        def fails(schedule: Schedule) -> bool:
            nonlocal asked
            asked += 1
            again = play(Job(seed, schedule), limit=limit)
            return bool(again.broken & verdict.broken)

        def say(schedule: Schedule) -> None:
            text = (
                f"Shrinking: {_faults(schedule)}, {schedule.nodes} nodes, {schedule.duration:g} s"
            )
            report(Progress(step="shrink", text=text, done=asked, total=runs, unit="runs"))

        small = shrink_schedule(plan.schedule(seed), fails, runs=runs, say=say)
    path = output or f"faults-{seed}.json"
    write_atomic(Path(path), encode_schedule(small), 0o644)
    replay = Plan(small.nodes, small.duration, path, small).replay(seed)
    app.out.line(
        Shrunk(
            seed=seed,
            shrunk=path,
            nodes=small.nodes,
            duration=small.duration,
            faults=len(small.faults),
            runs=asked,
            replay=replay,
        )
    )
    app.out.text(
        f"\nAfter {asked} runs, what still fails in the same way: {_faults(small)},"
        f" {small.nodes} nodes, {small.duration:g} s."
    )
    for fault in small.faults:
        app.out.text(f"  {fault!r}")
    app.out.text(f"Written to {path}. Replay it:\n  {replay}")


def _faults(schedule: Schedule) -> str:
    count = len(schedule.faults)
    return "1 fault" if count == 1 else f"{count} faults"
