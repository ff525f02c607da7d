"""``kv``: the KV blocks that this node keeps, what they were good for, and giving them up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import size

if TYPE_CHECKING:
    from pyagent_node.node.api.kv_schema import KvView


@click.group("kv")
def kv_command() -> None:
    """Show and clear the KV blocks that this node keeps."""


@kv_command.command("status")
@json_option
@pass_app
def status(app: App) -> None:
    """Show what is kept in memory and on disk, what was found there, and what goes to standbys."""
    view = app.client().kv.view()
    app.out.result(view, lambda: _show(app, view))


def _show(app: App, view: KvView) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("tier", "state", "bytes", "of", "blocks", "found"):
        table.add_column(column, justify="left" if column in ("tier", "state") else "right")
    for tier in view.tiers:
        row = (size(tier.bytes), size(tier.limit), str(tier.blocks), str(tier.hits))
        table.add_row(tier.name, tier.state, *row)
    app.out.console.print(table)
    loads, stream = view.loads, view.stream
    app.out.text(
        f"  not found     {view.misses}, given up for others {view.evicted}, damaged {view.corrupt}"
    )
    app.out.text(
        f"  sessions      {loads.loads} loads found {loads.hit_rate:.0%} of {loads.blocks_wanted}"
        f" blocks: {loads.blocks_local} here, {loads.blocks_remote} at peers"
        f" ({size(loads.bytes_fetched)})"
    )
    limit = f"{size(stream.limit)}/s at most" if stream.limit else "switched off"
    app.out.text(
        f"  to standbys   {stream.blocks_sent} blocks ({size(stream.bytes_sent)}) of"
        f" {stream.sessions} running sessions to {stream.targets} nodes, {limit}"
    )
    app.out.text(f"  for others    {size(stream.bytes_kept)} kept, {size(view.served_bytes)} given")
    if loads.bad_blocks:
        app.out.text(
            f"  refused       {loads.bad_blocks} wrong blocks of peers;"
            f" {loads.distrusted} peers are not asked for now"
        )


@kv_command.command("clear")
@json_option
@pass_app
def clear(app: App) -> None:
    """Give up every block, in memory and on disk; what is needed again is computed again."""
    reply = app.client().kv.clear()
    app.out.result(reply, lambda: app.out.text(f"{reply.blocks} blocks were given up."))
