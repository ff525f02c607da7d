"""``lab``: real daemons on hosts of their own, joined by networks that a scenario describes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import size

if TYPE_CHECKING:
    from pyagent_node.simulations.lab.results import LabResult
    from pyagent_node.simulations.lab.scenario import Scenario


class LinkLine(msgspec.Struct, frozen=True):
    """A link of a scenario in words."""

    between: tuple[str, ...]
    link: str


class ScenarioLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``lab list --json`` and ``lab check --json``."""

    name: str
    about: str
    hosts: tuple[str, ...]
    ranks: tuple[str, ...]
    links: tuple[LinkLine, ...]
    events: tuple[str, ...]


@click.group("lab")
def lab_command() -> None:
    """Daemons on hosts of their own, with delay, loss, rates and partitions between them.

    Needs Linux and root: each host is a network namespace, joined by a router over TUN devices.
    `docs/lab.md` describes scenario files and how to read the results.
    """


@lab_command.command("list")
@json_option
@pass_app
def list_scenarios(app: App) -> None:
    """List the scenarios that come with the program."""
    from pyagent_node.simulations.lab.library import shipped  # noqa: PLC0415
    from pyagent_node.simulations.lab.scenario import parse_scenario  # noqa: PLC0415

    found = [parse_scenario(text) for text in shipped().values()]
    for scenario in found:
        app.out.line(_line(scenario))
    if not app.out.json:
        _show_list(app, found)


@lab_command.command("check")
@click.argument("scenario", metavar="FILE")
@json_option
@pass_app
def check(app: App, scenario: str) -> None:
    """Read a scenario file without running it, and say what it means."""
    from pyagent_node.simulations.lab.library import open_scenario  # noqa: PLC0415

    _, parsed = open_scenario(scenario)
    app.out.result(_line(parsed), lambda: _show_scenario(app, parsed))


@lab_command.command("run")
@click.argument("scenario", metavar="SCENARIO")
@click.option("--keep", is_flag=True, help="Leave the homes and logs of the nodes on disk.")
@click.option(
    "--shape",
    is_flag=True,
    help="One host, with links that the daemons make slow: no root, no loss, no partitions.",
)
@click.option("--tokens", type=click.IntRange(2, 1500), help="Tokens of the answer.")
@json_option
@pass_app
def run(app: App, *, scenario: str, keep: bool, shape: bool, tokens: int | None) -> int:
    """Run a scenario: a name from `lab list`, or a file.

    Starts the daemons, forms a mesh, places the model and asks twice: over perfect links, then
    over those of the scenario while its events happen.  Ends with 0 when the tokens are equal.
    Everything is cleaned up, also after Ctrl-C.
    """
    from pyagent_node.cli.demo import model_file  # noqa: PLC0415
    from pyagent_node.simulations.lab import namespaces  # noqa: PLC0415
    from pyagent_node.simulations.lab.library import open_scenario  # noqa: PLC0415
    from pyagent_node.simulations.lab.play import run_scenario  # noqa: PLC0415

    text, parsed = open_scenario(scenario)
    if tokens is not None:
        answer = msgspec.structs.replace(parsed.answer, tokens=tokens)
        parsed = msgspec.structs.replace(parsed, answer=answer)
    if not shape:
        namespaces.check()
    path = model_file(app, parsed.model.source)
    result = run_scenario(
        text,
        parsed,
        path,
        kind="shape" if shape else "hosts",
        keep=keep,
        say=app.out.note,
    )
    app.out.result(result, lambda: _show_result(app, result))
    return 0 if result.identical else 1


def _line(scenario: Scenario) -> ScenarioLine:
    from pyagent_node.simulations.lab.timeline import describe, moments  # noqa: PLC0415

    return ScenarioLine(
        name=scenario.name,
        about=scenario.about,
        hosts=tuple(host.name for host in scenario.hosts),
        ranks=scenario.holders,
        links=tuple(
            LinkLine(tuple(sorted(pair)), describe(spec))
            for pair, spec in scenario.links.items()
            if len(pair) > 1 or _shared(scenario, *pair)
        ),
        events=tuple(f"{m.at:g} s: {m.text}" for m in moments(scenario.timeline)),
    )


def _shared(scenario: Scenario, site: str) -> bool:
    """Whether more than one host stands there, so that its own links matter."""
    return sum(host.site == site for host in scenario.hosts) > 1


def _show_list(app: App, scenarios: list[Scenario]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("scenario", "hosts", "events", "what it is"):
        table.add_column(column, justify="right" if column in ("hosts", "events") else "left")
    for scenario in scenarios:
        line = _line(scenario)
        table.add_row(line.name, str(len(line.hosts)), str(len(line.events)), line.about)
    app.out.console.print(table)


def _show_scenario(app: App, scenario: Scenario) -> None:
    line = _line(scenario)
    app.out.text(f"{line.name}: {line.about}")
    app.out.text(f"hosts   {', '.join(line.hosts)}; asked is {scenario.asked}")
    app.out.text(f"ranks   {' -> '.join(line.ranks)}")
    for link in line.links:
        ends = " - ".join(link.between if len(link.between) > 1 else (*link.between, "itself"))
        app.out.text(f"link    {ends}: {link.link}")
    for event in line.events:
        app.out.text(f"event   {event}")


def _show_result(app: App, result: LabResult) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("tokens", "tokens/s", "first token", "pause p50", "stall", "failovers", "recomputed")
    table.add_column("answer")
    for name in names:
        table.add_column(name, justify="right")
    first = "perfect links" if result.ground == "hosts" else "shaped links"
    for name, answer in ((first, result.undisturbed), (result.scenario, result.disturbed)):
        table.add_row(
            name,
            str(answer.tokens),
            f"{answer.tokens_per_second:.2f}",
            f"{answer.ttft_seconds:.2f} s",
            f"{answer.pause_ms:.0f} ms",
            f"{answer.stall_seconds:.2f} s",
            str(answer.failovers),
            str(answer.recomputed_tokens),
        )
    app.out.console.print()
    app.out.console.print(table)
    _show_links(app, result)
    trips = ", ".join(f"{name} {ms:.1f} ms" for name, ms in result.rtt_ms.items())
    app.out.text(f"\nRound trips that the daemon measured: {trips or 'none'}")
    if result.transfer is not None:
        sent = result.transfer
        app.out.text(
            f"The model from {sent.source} to {sent.target}: {size(sent.bytes)} in"
            f" {sent.seconds:.1f} s, {sent.megabits_per_second:.1f} Mbit/s"
        )
    same = "yes" if result.identical else "NO"
    app.out.text(f"Tokens equal to those over perfect links: {same}")


def _show_links(app: App, result: LabResult) -> None:
    from rich.table import Table  # noqa: PLC0415

    if result.router is None:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("link")
    for name in ("packets", "bytes", "lost", "queue full", "cut"):
        table.add_column(name, justify="right")
    for link in result.links:
        table.add_row(
            f"{link.source} -> {link.target}",
            str(link.packets),
            size(link.bytes),
            str(link.lost),
            str(link.queue),
            str(link.cut),
        )
    app.out.console.print()
    app.out.console.print(table)
    router = result.router
    app.out.text(
        f"The router delivered half of {router.packets} packets within {router.late_ms_p50:.2f} ms"
        f" of their time, 99% within {router.late_ms_p99:.2f} ms."
    )
    if router.overruns or router.held_over:
        app.out.text(
            f"NOTE: it could not keep up: {router.overruns} packets were dropped before it and"
            f" {router.held_over} by it. Lower the rates, or run it on a faster machine."
        )
