"""``bench simulator``: what swarms of many nodes cost, in the simulator and on the wire."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import write_atomic
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.lists import numbers, refused
from pyagent_node.cli.output import size as sized

if TYPE_CHECKING:
    from pyagent_node.simulations.scale import Size

MAX_NODES = 250
MAX_SIZES = 8
MAX_SEED = (1 << 63) - 1
FAULT_SECONDS, FULL_FAULT_SECONDS = 10.0, 60.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures with what they depend on."""

    bench: str
    time: float
    machine: dict[str, str | int]
    sizes: tuple[Size, ...]


@click.command("simulator")
@click.option("--nodes", default="10,50,200", show_default=True, metavar="N,M,..")
@click.option("--seed", type=click.IntRange(0, MAX_SEED), default=1, show_default=True)
@click.option("--full", is_flag=True, help=f"Faults for {FULL_FAULT_SECONDS:.0f} virtual seconds.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the figures into an SVG file.")
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def simulator(
    app: App, *, nodes: str, seed: int, full: bool, plot: str | None, output: str | None
) -> None:
    """Swarms that form, live quietly for 10 virtual seconds, and go through faults.

    Messages and bytes are those that a node sends in a virtual second.  The baseline is the
    smallest swarm.
    """
    from pyagent_node.benchmarks.swarm import interruptible  # noqa: PLC0415
    from pyagent_node.cli.bench import machine, store  # noqa: PLC0415
    from pyagent_node.simulations.scale import measure_apart  # noqa: PLC0415
    from pyagent_node.simulations.scale_plot import plot as draw  # noqa: PLC0415

    remedy = f"Write up to {MAX_SIZES} numbers from 3 to {MAX_NODES} with commas: 10,50,200."
    counts = sorted(numbers("--nodes", nodes, int, least=3, most=MAX_NODES, remedy=remedy))
    if len(counts) > MAX_SIZES:
        raise refused("--nodes", nodes, remedy)
    picture = Path(plot).expanduser() if plot is not None else None
    if picture is not None and not picture.parent.is_dir():
        raise InvalidRequest(
            f"{picture} cannot be written: {picture.parent} is no directory.",
            code="usage",
            remedy="Make the directory first.",
        )
    seconds = FULL_FAULT_SECONDS if full else FAULT_SECONDS
    sizes = []
    with interruptible():
        for count in counts:
            app.out.note(f"  {count} nodes")
            sizes.append(measure_apart(count, seed=seed, duration=seconds))
    report = Report(bench="simulator", time=time.time(), machine=machine(), sizes=tuple(sizes))
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")
    if picture is not None:
        write_atomic(picture, draw(sizes).encode(), 0o644)
        app.out.note(f"Drawn into {picture}.")


def _show(app: App, report: Report) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("nodes", "virtual", "wall", "cpu", "memory", "phase", "msg/s", "bytes/s"):
        table.add_column(name, justify="right")
    for name in ("busiest msg/s", "bytes/s", "violations"):
        table.add_column(name, justify="right")
    for each in report.sizes:
        head = [
            str(each.nodes),
            f"{each.virtual_seconds:.0f} s",
            f"{each.wall_seconds:.1f} s",
            f"{each.cpu_seconds:.1f} s",
            sized(each.memory_bytes),
        ]
        for period in each.periods:
            table.add_row(
                *head,
                period.phase,
                f"{period.total.messages:.1f}",
                f"{period.total.bytes:.0f}",
                f"{period.most.messages:.0f}",
                f"{period.most.bytes:.0f}",
                str(len(each.violations)) if head[0] else "",
            )
            head = [""] * len(head)
    app.out.console.print(table)
    _show_purposes(app, report)


def _show_purposes(app: App, report: Report) -> None:
    from rich.table import Table  # noqa: PLC0415

    from pyagent_node.simulations.traffic import PURPOSES  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("quiet", *PURPOSES):
        table.add_column(name, justify="right")
    for each in report.sizes:
        for period in each.periods:
            if period.phase == "quiet":
                cells = (period.mean[p] for p in PURPOSES)
                table.add_row(
                    str(each.nodes), *(f"{c.messages:.2f} / {c.bytes:.0f} B" for c in cells)
                )
    app.out.console.print(table)
