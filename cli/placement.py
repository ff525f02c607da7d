"""``placement``: which node holds which layers, what planning again would change, drain a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.model import DEFAULT, placement_options

if TYPE_CHECKING:
    from pyagent_node.node.api.placement_schema import DrainReply, PlanView
    from pyagent_node.node.api.schema import LoadRequest, PlacementView


@click.group("placement")
def placement_command() -> None:
    """Show, plan and change which nodes hold which layers."""


@placement_command.command("show")
@click.argument("model", required=False)
@json_option
@pass_app
def show(app: App, model: str | None) -> None:
    """Show every rank with its standbys and spares, of one MODEL or of all."""
    from pyagent_node.base.errors import NotFound  # noqa: PLC0415

    found = tuple(
        placement
        for placement in app.client().placements()
        if model is None or model in (placement.name, placement.model)
    )
    if model is not None and not found:
        raise NotFound(
            f"{model[:80]!r} is not loaded.",
            code="placement_not_found",
            remedy="See `pyagent-node placement show` for what is.",
        )

    def table() -> None:
        from pyagent_node.cli.views import placement_view  # noqa: PLC0415

        for placement in found:
            app.out.console.print(placement_view(placement))
        if not found:
            app.out.note(f"No model is loaded: `pyagent-node model load {DEFAULT}`.")

    app.out.result({"placements": found}, table)


@placement_command.command("plan")
@click.option(
    "--explain", is_flag=True, help="Show what every node would do and why (--json always does)."
)
@json_option
@pass_app
@placement_options
def plan(app: App, request: LoadRequest, explain: bool) -> None:
    """Say what planning MODEL again would change, and why; nothing is changed.

    --explain shows of every node with what it computes, how fast that was measured or is estimated
    to be, its memory and power, and why it has not more and not less.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415

    with Reporter(app.out) as report:
        view = app.client().plan(request, report)
    app.out.result({"plan": view}, lambda: _show_plan(app, view, explain=explain))


def _show_plan(app: App, view: PlanView, *, explain: bool) -> None:
    from rich.table import Table  # noqa: PLC0415

    now = f"epoch {view.epoch}" if view.epoch is not None else "not loaded"
    app.out.text(f"{view.name} ({now}), {view.n_seq} sessions of {view.n_ctx} tokens")
    rows = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("rank", "layers", "node", "standbys", "spares"):
        rows.add_column(column, justify="right" if column == "rank" else "left")
    for rank in view.ranks:
        first, last = rank.layers
        rows.add_row(
            str(rank.rank),
            f"{first}-{last - 1}{' + head' if rank.head else ''}",
            rank.name,
            ", ".join(rank.standbys) or "-",
            ", ".join(rank.spares) or "-",
        )
    app.out.console.print(rows)
    if explain:
        _explain(app, view)
    for line in view.explanation:
        app.out.text(f"  {line}")
    if view.guessing:
        app.out.text(f"  guessing: {view.guessing}")
    if explain and view.prompt_seconds > 0:
        app.out.text(f"  prompts: about {1 / view.prompt_seconds:.0f} tokens a second")
    if view.token_seconds_now is not None:
        app.out.text(f"  as it is: {view.token_seconds_now * 1000:.2f} ms a token")
    if not view.changes:
        app.out.text("Nothing would change.")
        return
    app.out.text("Changes:")
    for line in view.changes:
        app.out.text(f"  {line}")
    if view.switch:
        app.out.text(f"  {view.switch}")
    app.out.note(f"Next: `pyagent-node placement apply {view.name}` with the same options.")


_SOURCES = {
    "sessions": "measured in sessions",
    "loading": "measured at loading",
    "others": "measured, other models",
    "estimate": "estimated",
}


def _explain(app: App, view: PlanView) -> None:
    """Show every node of a plan."""
    from rich.table import Table  # noqa: PLC0415

    from pyagent_node.cli.output import size  # noqa: PLC0415

    rows = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("node", "backend", "layers", "speed", "memory: needs, usable, free", "power"):
        rows.add_column(column, overflow="fold")
    for node in view.nodes:
        layers = ", ".join(f"{first}-{last - 1}" for first, last in node.layers) or "-"
        threads = f"{node.threads} thread{'s' * (node.threads != 1)}"
        where = threads if node.device == "cpu" else node.device
        rows.add_row(
            node.name,
            f"{node.backend} {node.version}".strip() + f", {where}",
            layers,
            f"{node.decode_bytes_per_second / 1e9:.2f} GB/s,"
            f" {node.prefill_flops_per_second / 1e9:.0f} GFLOPS ({_SOURCES[node.source]})",
            f"{size(node.need_bytes)}, {size(node.usable_bytes)},"
            f" {size(node.free_bytes)} {node.memory}",
            node.power if node.share == 1 else f"{node.power}: counts {node.share:.0%}",
        )
    app.out.console.print(rows)
    for node in view.nodes:
        if node.why:
            app.out.text(f"  {node.name}: {node.why}")


@placement_command.command("apply")
@json_option
@pass_app
@placement_options
def apply(app: App, request: LoadRequest) -> None:
    """Place MODEL anew as `plan` says; answers in progress go on.

    The new slices are loaded beside those in force, then all nodes switch at once.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415

    with Reporter(app.out) as report:
        placement = app.client().apply(request, report)
    app.out.result({"placement": placement}, lambda: _show(app, placement))


def _show(app: App, placement: PlacementView) -> None:
    from pyagent_node.cli.views import placement_view  # noqa: PLC0415

    app.out.console.print(placement_view(placement))


@placement_command.command("drain")
@click.argument("node")
@click.option("--undo", is_flag=True, help="Let the node work again.")
@json_option
@pass_app
def drain(app: App, node: str, undo: bool) -> None:
    """Move the work of NODE (name or peer id) away and wait until it has none.

    Its ranks move to standbys that are loaded first, so that answers hardly pause.  Ctrl-C stops
    the waiting, not the draining; --undo ends it.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.placement_schema import DrainRequest  # noqa: PLC0415

    with Reporter(app.out) as report:
        reply = app.client().drain(DrainRequest(node=node, undo=undo), report)
    app.out.result(reply, lambda: _drained(app, reply))


def _drained(app: App, reply: DrainReply) -> None:
    if not reply.draining:
        app.out.text(f"{reply.name} takes work again.")
        return
    app.out.text(f"{reply.name} holds nothing any more.")
    app.out.note("It may leave: `pyagent-node down` there.")
