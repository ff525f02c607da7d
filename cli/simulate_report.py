"""What ``simulate`` shows of the seeds it has run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from pyagent_node.cli.app import App
from pyagent_node.cli.simulate_plan import Plan

if TYPE_CHECKING:
    from pyagent_node.simulations.jobs import Verdict

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


def line(plan: Plan, verdict: Verdict) -> Line:
    """Return what ``--json`` prints of a verdict."""
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


def list_faults(app: App) -> None:
    """Print the mixes of faults, and what each fault means."""
    from pyagent_node.simulations.catalogue import kinds, mixes  # noqa: PLC0415

    for name, faults in mixes().items():
        app.out.line({"mix": name, "faults": faults})
        app.out.text(f"{name:10} {', '.join(faults) or 'nothing goes wrong'}")
    app.out.text("")
    for kind, meaning in kinds().items():
        app.out.line({"fault": kind, "meaning": meaning})
        app.out.text(f"{kind:14} {meaning}")


def show(app: App, plan: Plan, verdicts: Sequence[Verdict]) -> None:
    """Print the summary of a run, and the story of what failed."""
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
