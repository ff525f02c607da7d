"""``config``: show and change settings."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from pyagent_node.base.errors import NotFound
from pyagent_node.cli.app import App, json_option, pass_app


def _keys(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from pyagent_node.node.options import OPTIONS  # noqa: PLC0415

    return [CompletionItem(o.key, help=o.help) for o in OPTIONS if o.key.startswith(incomplete)]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@click.group("config")
def config_command() -> None:
    """Show and change settings.

    A flag wins over the environment (PYAGENT_<KEY>), that over config.toml, that over the default.
    A running daemon takes a change when it is started again.
    """


@config_command.command("show")
@json_option
@pass_app
def show(app: App) -> None:
    """Show every setting, its value and where that came from."""
    rows = app.settings().show()

    def table() -> None:
        from rich.table import Table  # noqa: PLC0415

        view = Table(box=None, pad_edge=False)
        for column in ("setting", "value", "from", "meaning"):
            view.add_column(column, overflow="fold")
        for row in rows:
            view.add_row(row.key, _text(row.value), row.source, row.help)
        app.out.console.print(view)

    app.out.result({"settings": rows}, table)


@config_command.command("get")
@click.argument("key", shell_complete=_keys)
@json_option
@pass_app
def get(app: App, key: str) -> None:
    """Print the value of one setting."""
    row = next((row for row in app.settings().show() if row.key == key), None)
    if row is None:
        raise NotFound(
            f"There is no setting {key!r}.",
            code="unknown_setting",
            remedy="See `pyagent-node config show`.",
        )
    value = _text(row.value)
    app.out.result(row, lambda: app.out.text(value))


@config_command.command("set")
@click.argument("key", shell_complete=_keys)
@click.argument("value", required=False)
@click.option("--unset", is_flag=True, help="Go back to the default.")
@json_option
@pass_app
def set_(app: App, key: str, value: str | None, unset: bool) -> None:
    """Set one setting in config.toml.  Lists are written with commas."""
    from pyagent_node.node.config import change_setting  # noqa: PLC0415

    if (value is None) != unset:
        raise click.UsageError("Give a VALUE, or --unset.")
    change_setting(app.home, key, value)
    row = next(row for row in app.settings().show() if row.key == key)

    def show_row() -> None:
        app.out.text(f"{key} = {_text(row.value)}")
        if row.source not in ("default", str(app.home.config_path)):
            app.out.note(f"Note: {row.source} is set and wins over the file.")
        if app.home.read_state() is not None:
            app.out.note("A running daemon takes it when it is started again.")

    app.out.result(row, show_row)


@config_command.command("path")
@json_option
@pass_app
def path(app: App) -> None:
    """Print where the settings and the node's files are."""
    places = {"config": str(app.home.config_path), "home": str(app.home.root)}
    app.out.result(places, lambda: app.out.text(places["config"]))
