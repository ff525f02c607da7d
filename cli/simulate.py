"""``simulate``: the whole swarm on virtual time, with faults drawn from a seed."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import read_limited, write_atomic
from pyagent_node.cli.app import App, json_option, pass_app

if TYPE_CHECKING:
    from pyagent_node.simulations.faults import Schedule
    from pyagent_node.simulations.jobs import Job, Verdict

NODES, DURATION, FAULTS = 7, 30.0, "standard"
MAX_SEED: Final = (1 << 63) - 1
MAX_SEEDS: Final = 100_000
MAX_FILE: Final = 4 << 20
"""Bytes of a schedule of faults."""
FRESH_BITS: Final = 32
STORIES: Final = 3
"""Failures that are told in full; the rest are listed."""
ROWS: Final = 20
"""Seeds up to which each has a line of its own in the summary."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json`` prints of a seed."""

    seed: int
    nodes: int
    virtual_seconds: float
    wall_seconds: float
    events: int
    requests: int
    faults: int
    violations: tuple[object, ...]
    trace_digest: str
    replay: str
    story: tuple[str, ...] = ()


class Shrunk(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--json --shrink`` prints at the end."""

    seed: int
    shrunk: str
    nodes: int
    duration: float
    faults: int
    runs: int
    replay: str


@dataclass(frozen=True)
class Plan:
    """What is to be run, and how a person asks for one seed of it again."""

    nodes: int
    duration: float
    faults: str
    file: Schedule | None

    def schedule(self, seed: int) -> Schedule:
        """Return the schedule of a seed."""
        from pyagent_node.simulations.faults import draw_schedule  # noqa: PLC0415

        if self.file is not None:
            return self.file
        return draw_schedule(seed, nodes=self.nodes, duration=self.duration, mix=self.faults)

    def replay(self, seed: int) -> str:
        """Return the command that runs one seed again."""
        parts = ["pyagent-node simulate", f"--seed {seed}"]
        if self.file is None:
            parts += [f"--nodes {self.nodes}"] if self.nodes != NODES else []
            parts += [f"--duration {self.duration:g}"] if self.duration != DURATION else []
        if self.file is not None or self.faults != FAULTS:
            parts.append(f"--faults {_quoted(self.faults)}")
        return " ".join(parts)


def _quoted(text: str) -> str:
    import shlex  # noqa: PLC0415

    return shlex.quote(text)


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
@click.option("--list-faults", is_flag=True, help="List the named mixes of faults.")
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
    list_faults: bool,
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
    if list_faults:
        _list(app)
        return 0
    chosen = _seeds(seed, seeds, fresh)
    if limit is not None and math.isnan(limit):
        raise _usage("--limit is not a number.", "Write seconds: --limit 300.")
    plan = _plan(nodes, duration, faults)
    if trace is not None and len(chosen) > 1:
        raise _usage("--trace takes one seed.", "Give it with --seed.")
    for path in (trace, output if shrink else None):
        _check_writable(path)
    from pyagent_node.simulations.jobs import Job  # noqa: PLC0415

    work = [Job(each, plan.schedule(each), trace is not None) for each in chosen]
    verdicts = _play(app, plan, work, jobs or _cores(), limit)
    if trace is not None:
        write_atomic(Path(trace), "".join(f"{e}\n" for e in verdicts[0].trace).encode(), 0o644)
        app.out.note(f"Wrote {len(verdicts[0].trace)} events to {trace}.")
    failed = [verdict for verdict in verdicts if verdict.failed]
    if not app.out.json:
        _show(app, plan, verdicts)
    if shrink and failed:
        _shrink(app, plan, failed[0], limit=limit, runs=shrink_runs, output=output)
    return 1 if failed else 0


# ---- what was asked ------------------------------------------------------------------------------


def _usage(message: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(message, code="usage", remedy=remedy)


def _seeds(seed: int | None, seeds: str | None, fresh: int | None) -> list[int]:
    """Return the seeds to run."""
    if sum(given is not None for given in (seed, seeds, fresh)) > 1:
        raise _usage("--seed, --seeds and --fresh exclude each other.", "Give one of them.")
    if seed is not None:
        return [seed]
    if seeds is None:
        return [secrets.randbits(FRESH_BITS) for _ in range(fresh or 1)]
    first, dots, last = seeds.partition("..")
    if not (dots and first.isdecimal() and last.isdecimal() and seeds.isascii()):
        raise _usage(f"--seeds is {seeds[:80]!r}.", "Write two numbers: 0..99.")
    if len(first) > 20 or len(last) > 20 or int(last) > MAX_SEED:
        raise _usage("A seed of --seeds is too large.", f"The largest is {MAX_SEED}.")
    low, high = int(first), int(last)
    if low > high:
        raise _usage(f"--seeds {low}..{high} holds no seed.", f"Write {high}..{low}.")
    if high - low >= MAX_SEEDS:
        raise _usage(f"--seeds {low}..{high} are too many.", f"Take at most {MAX_SEEDS} at a time.")
    return list(range(low, high + 1))


def _check_writable(path: str | None) -> None:
    """Refuse a file that cannot be written before any time is spent on what goes into it."""
    if path is None:
        return
    parent = Path(path).absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise _usage(
            f"{path[:200]} cannot be written.", f"See whether {parent} is there and yours."
        )


def _plan(nodes: int | None, duration: float | None, faults: str) -> Plan:
    from pyagent_node.simulations.faults import MIXES, decode_schedule  # noqa: PLC0415

    if faults in MIXES:
        return Plan(nodes or NODES, duration or DURATION, faults, None)
    path = Path(faults)
    if path.is_dir():
        raise _usage(f"{faults[:200]} is a directory.", "Name a file, or a mix of faults.")
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        raise InvalidRequest(
            f"There is no mix of faults, and no file, called {faults[:80]!r}.",
            code="bad_schedule",
            remedy=f"Choose one of {', '.join(MIXES)}, or name a file.",
        )
    if nodes is not None or duration is not None:
        raise _usage(
            "A file of faults says how many nodes there are, and for how long.",
            "Leave --nodes and --duration out, or change the file.",
        )
    schedule = decode_schedule(read_limited(path, MAX_FILE))
    return Plan(schedule.nodes, schedule.duration, faults, schedule)


def _list(app: App) -> None:
    from pyagent_node.simulations.catalogue import kinds, mixes  # noqa: PLC0415

    for name, faults in mixes().items():
        app.out.line({"mix": name, "faults": faults})
        app.out.text(f"{name:10} {', '.join(faults) or 'nothing goes wrong'}")
    app.out.text("")
    for kind, meaning in kinds().items():
        app.out.line({"fault": kind, "meaning": meaning})
        app.out.text(f"{kind:14} {meaning}")


def _cores() -> int:
    """Return how many cores this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable is not None else os.cpu_count() or 1


# ---- running -------------------------------------------------------------------------------------


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
            app.out.line(_line(plan, verdict))
            step()

        step()
        play_all(work, workers=workers, done=done, limit=limit)
    return sorted(verdicts, key=lambda verdict: verdict.outcome.seed)


def _line(plan: Plan, verdict: Verdict) -> Line:
    outcome = verdict.outcome
    return Line(
        seed=outcome.seed,
        nodes=outcome.nodes,
        virtual_seconds=outcome.virtual_seconds,
        wall_seconds=outcome.wall_seconds,
        events=outcome.events,
        requests=outcome.requests,
        faults=outcome.faults,
        violations=outcome.violations,
        trace_digest=outcome.trace_digest,
        replay=plan.replay(outcome.seed),
        story=verdict.story,
    )


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


# ---- showing -------------------------------------------------------------------------------------


def _show(app: App, plan: Plan, verdicts: Sequence[Verdict]) -> None:
    failed = [verdict for verdict in verdicts if verdict.failed]
    if len(verdicts) > 1:
        _table(app, verdicts if len(verdicts) <= ROWS else failed)
    for verdict in failed[:STORIES]:
        _tell(app, plan, verdict)
    if len(failed) > STORIES:
        app.out.text(f"\n{len(failed) - STORIES} more failed. Replay them:")
        for verdict in failed[STORIES:]:
            app.out.text(f"  {plan.replay(verdict.outcome.seed)}")
    outcomes = [verdict.outcome for verdict in verdicts]
    virtual = sum(outcome.virtual_seconds for outcome in outcomes)
    spent = sum(outcome.wall_seconds for outcome in outcomes)
    if len(verdicts) == 1 and not failed:
        only = outcomes[0]
        app.out.text(
            f"Seed {only.seed}: nothing was broken. {only.faults} faults and {only.requests}"
            f" requests in {virtual:.1f} s of virtual time, {spent:.1f} s of real time.\n"
            f"{only.events} events, digest {only.trace_digest}"
        )
    elif len(verdicts) > 1:
        app.out.text(
            f"\n{len(verdicts)} seeds, {len(failed)} failed. {sum(o.faults for o in outcomes)}"
            f" faults and {sum(o.requests for o in outcomes)} requests in {virtual:.0f} s of"
            f" virtual time, {spent:.0f} s of real time."
        )


def _table(app: App, verdicts: Sequence[Verdict]) -> None:
    from rich.table import Table  # noqa: PLC0415

    if not verdicts:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("seed", "virtual", "real", "faults", "requests", "events"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    table.add_column("broken")
    for verdict in verdicts:
        outcome = verdict.outcome
        table.add_row(
            str(outcome.seed),
            f"{outcome.virtual_seconds:.1f} s",
            f"{outcome.wall_seconds:.1f} s",
            str(outcome.faults),
            str(outcome.requests),
            str(outcome.events),
            outcome.trace_digest[:12],
            ", ".join(sorted(verdict.broken)),
        )
    app.out.console.print(table)


def _tell(app: App, plan: Plan, verdict: Verdict) -> None:
    """Print the story of a failure and how to see it again."""
    outcome = verdict.outcome
    when = f", {outcome.virtual_seconds:.3f} s in" if outcome.trace_digest else ""
    app.out.text(f"\nSeed {outcome.seed} broke what must hold{when}:")
    for found in outcome.violations:
        app.out.text(f"  {found.invariant}: {found.detail}")
    for line in verdict.story:
        app.out.text(f"  {line}")
    app.out.text(f"Replay it:\n  {plan.replay(outcome.seed)}")
