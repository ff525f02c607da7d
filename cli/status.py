"""``status`` and ``peers``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from pyagent_node.base.errors import Unavailable
from pyagent_node.cli.app import App, json_option, pass_app

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pyagent_node.node.api.schema import StatusView

RETRY_SECONDS = 1.0


@click.command("status")
@click.option("--watch", "-w", is_flag=True, help="Keep showing it, live.")
@click.option("--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True)
@json_option
@pass_app
def status_command(app: App, watch: bool, interval: float) -> None:
    """Show the node, its mesh, peers, ranks with their load, and sessions."""
    if not watch:
        from pyagent_node.cli.views import status_view  # noqa: PLC0415

        status = app.client().status()
        app.out.result(status, lambda: app.out.console.print(status_view(status)))
    elif app.out.json:
        for status in app.client().events(interval):
            app.out.line(status)
    else:
        _watch(app, interval)


def _watch(app: App, interval: float) -> None:
    """Show the live view until Ctrl-C; a daemon that goes away is waited for."""
    from rich.live import Live  # noqa: PLC0415

    screen = app.out.console.is_terminal
    with Live(console=app.out.console, screen=screen, auto_refresh=False) as live:
        for view in _views(app, interval):
            live.update(view, refresh=True)


def _views(app: App, interval: float) -> Iterator[RenderableType]:
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from pyagent_node.cli.views import status_view  # noqa: PLC0415

    last: StatusView | None = None
    foot = Text("Ctrl-C to leave", style="dim")
    while True:
        try:
            with app.client() as client:
                for last in client.events(interval):
                    yield Group(status_view(last), Text(""), foot)
            raise Unavailable("The daemon ended the stream.", code="stream_closed")
        except Unavailable as error:
            lines: list[RenderableType] = [Text(f"{error.message} Trying again.", style="red")]
            if last is not None:
                lines += [Text("Last seen:", style="dim"), status_view(last)]
            yield Group(*lines, Text(""), foot)
            time.sleep(RETRY_SECONDS)


@click.command("peers")
@json_option
@pass_app
def peers_command(app: App) -> None:
    """List the connected peers with their round trips."""
    from pyagent_node.cli.views import peers_view  # noqa: PLC0415

    peers = app.client().peers().peers
    app.out.result({"peers": peers}, lambda: app.out.console.print(peers_view(peers)))
