"""``init`` and ``id``: the node's home and key, no daemon needed."""

from __future__ import annotations

import click

from pyagent_node.cli.app import App, json_option, pass_app


@click.command("init")
@click.option("--name", metavar="NAME", help="This node's name in meshes (default: the host's).")
@json_option
@pass_app
def init_command(app: App, name: str | None) -> None:
    """Create this node's home and key.

    Safe to repeat: what is there stays.  `up` does it too.
    """
    from pyagent_node.node.config import change_setting  # noqa: PLC0415

    fresh = not app.home.key_path.exists()
    if name is not None:
        change_setting(app.home, "name", name)
    key = app.home.node_key()
    app.home.api_token()
    settings = app.settings()
    value = {
        "peer_id": key.peer_id,
        "name": settings.node_name,
        "home": str(app.home.root),
        "created": fresh,
    }

    def show() -> None:
        app.out.text(f"{'Created' if fresh else 'Found'} node {settings.node_name}")
        app.out.text(f"  peer id  {key.peer_id}")
        app.out.text(f"  home     {app.home.root}")
        app.out.note("Next: `pyagent-node up`, or `pyagent-node join TICKET` first.")

    app.out.result(value, show)


@click.command("id")
@json_option
@pass_app
def id_command(app: App) -> None:
    """Show this node's peer id, creating its key on first use."""
    key = app.home.node_key()
    name = app.settings().node_name
    app.out.result({"peer_id": key.peer_id, "name": name}, lambda: app.out.text(key.peer_id))
