"""``mesh``: create, show, list and choose meshes; the daemon is not needed."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Literal

import click
from click.shell_completion import CompletionItem

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import duration

if TYPE_CHECKING:
    from pyagent_node.node.profiles import MeshProfile


def _meshes(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from pyagent_node.node.profiles import load_profile, mesh_ids  # noqa: PLC0415

    home = context.ensure_object(App).home
    names = [load_profile(home, mesh_id).genesis.name for mesh_id in mesh_ids(home)]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _view(profile: MeshProfile) -> dict[str, object]:
    """Return what may be shown of a profile: no key, no PSK."""
    from pyagent_node.node.certificates import read_certificate  # noqa: PLC0415

    genesis = profile.genesis
    expires = read_certificate(profile.certificate).expires if profile.certificate else None
    return {
        "mesh_id": profile.mesh_id,
        "name": genesis.name,
        "visibility": genesis.visibility,
        "engine": genesis.engine,
        "role": profile.role,
        "node_name": profile.name,
        "authority": genesis.authority,
        "is_authority": profile.authority_key is not None,
        "certificate_expires": expires,
        "bootstrap": list(profile.bootstrap),
    }


def _show(app: App, profile: MeshProfile) -> None:
    view = _view(profile)
    app.out.text(f"Mesh {view['name']} ({view['visibility']})")
    app.out.text(f"  id           {view['mesh_id']}")
    app.out.text(f"  engine       {view['engine']}")
    app.out.text(f"  this node    {view['node_name']}, {view['role']}")
    if view["is_authority"]:
        app.out.text("  authority    here: `pyagent-node invite` makes tickets")
    else:
        app.out.text(f"  authority    {view['authority']}")
    expires = view["certificate_expires"]
    if isinstance(expires, int | float):
        left = expires - time.time()
        text = f"for {duration(left)}" if left > 0 else "no more: it has expired"
        app.out.text(f"  certificate  valid {text}")
    for address in profile.bootstrap:
        app.out.text(f"  bootstrap    {address}")


def restart_note(app: App) -> None:
    """Say that a daemon that runs now goes on with what it was started with."""
    if app.home.read_state() is not None:
        app.out.note("A daemon runs: `pyagent-node down` and `up` make it use this mesh.")


@click.group("mesh")
def mesh_command() -> None:
    """Create, show and choose meshes."""


@mesh_command.command("create")
@click.argument("name")
@click.option("--public", is_flag=True, help="Open to join; a private mesh needs a ticket.")
@click.option("--bootstrap", multiple=True, metavar="ADDRESS", help="A peer that is always there.")
@click.option("--engine", default="", help="How the mesh decides: raft-rs (default), pysyncobj.")
@json_option
@pass_app
def create(app: App, name: str, public: bool, bootstrap: tuple[str, ...], engine: str) -> None:
    """Create a mesh; this node becomes the authority that admits members."""
    from pyagent_node.node.genesis import DEFAULT_ENGINE  # noqa: PLC0415
    from pyagent_node.node.profiles import create_mesh  # noqa: PLC0415

    visibility: Literal["public", "private"] = "public" if public else "private"
    profile = create_mesh(
        app.home,
        name,
        visibility,
        node_name=app.settings().node_name,
        clock=time.time,
        bootstrap=bootstrap,
        engine=engine or DEFAULT_ENGINE,
    )

    def show() -> None:
        _show(app, profile)
        app.out.note(
            f"Back up {app.home.mesh_dir(profile.mesh_id) / 'authority.key'}:"
            " only it can admit members."
        )
        restart_note(app)

    app.out.result(_view(profile), show)


@mesh_command.command("show")
@click.argument("mesh", default="", shell_complete=_meshes)
@json_option
@pass_app
def show(app: App, mesh: str) -> None:
    """Show one mesh: the one in use, or the one named."""
    from pyagent_node.node.profiles import active_profile  # noqa: PLC0415

    profile = active_profile(app.home, mesh or app.settings().mesh)
    app.out.result(_view(profile), lambda: _show(app, profile))


@mesh_command.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the meshes that this node is in."""
    from pyagent_node.base.errors import PyAgentError  # noqa: PLC0415
    from pyagent_node.node.profiles import active_profile, load_profile, mesh_ids  # noqa: PLC0415

    profiles = [load_profile(app.home, mesh_id) for mesh_id in mesh_ids(app.home)]
    try:
        active = active_profile(app.home, app.settings().mesh).mesh_id if profiles else None
    except PyAgentError:
        active = None
    views = [_view(p) | {"active": p.mesh_id == active} for p in profiles]

    def table() -> None:
        from rich.table import Table  # noqa: PLC0415

        if not views:
            app.out.note("None yet: `pyagent-node mesh create NAME` or `join TICKET`.")
            return
        rows = Table(box=None, pad_edge=False)
        for column in ("", "name", "id", "visibility", "role", "authority"):
            rows.add_column(column)
        for view in views:
            rows.add_row(
                "*" if view["active"] else "",
                str(view["name"]),
                str(view["mesh_id"])[:12],
                str(view["visibility"]),
                str(view["role"]),
                "here" if view["is_authority"] else str(view["authority"])[-8:],
            )
        app.out.console.print(rows)

    app.out.result({"meshes": views}, table)


@mesh_command.command("use")
@click.argument("mesh", shell_complete=_meshes)
@json_option
@pass_app
def use(app: App, mesh: str) -> None:
    """Choose the mesh that `up` runs."""
    from pyagent_node.node.profiles import active_profile, set_active  # noqa: PLC0415

    profile = active_profile(app.home, mesh)
    set_active(app.home, profile.mesh_id)

    def show_it() -> None:
        app.out.text(f"Using {profile.genesis.name} ({profile.mesh_id[:12]})")
        restart_note(app)

    app.out.result(_view(profile), show_it)


@mesh_command.command("settings")
@click.argument("name", required=False)
@click.argument("value", required=False)
@json_option
@pass_app
def settings(app: App, name: str | None, value: str | None) -> None:
    """Show the settings of the whole mesh, or set NAME to VALUE (a number, or `default`)."""
    from pyagent_node.base.errors import InvalidRequest  # noqa: PLC0415

    if value is None:
        found = app.client().mesh.settings().settings
    else:
        if value != "default" and not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise InvalidRequest(
                f"{value[:40]!r} is no value of a mesh setting.",
                code="bad_setting",
                remedy="Give a whole number, or `default`.",
            )
        number = None if value == "default" else int(value)
        found = app.client().mesh.change_setting(name or "", number).settings
    shown = tuple(each for each in found if name in (None, each.name))
    if not shown:
        raise InvalidRequest(
            f"A mesh has no setting {(name or '')[:40]!r}.",
            code="unknown_setting",
            remedy=f"There are: {', '.join(each.name for each in found)}.",
        )

    def table() -> None:
        for each in shown:
            app.out.text(
                f"{each.name} = {each.value}  ({each.low} to {each.high},"
                f" default {each.default}: {each.meaning})"
            )

    app.out.result({"settings": shown}, table)
