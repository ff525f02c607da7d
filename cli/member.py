"""``member``: who belongs to the mesh."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import duration, short

if TYPE_CHECKING:
    from pyagent_node.node.api.mesh_schema import MemberView, Vote


@click.group("member")
def member_command() -> None:
    """List members, let them vote or not, remove or revoke them."""


@member_command.command("list")
@click.option("--all", "everyone", is_flag=True, help="Also those who left or were revoked.")
@json_option
@pass_app
def list_(app: App, everyone: bool) -> None:
    """List the members of the mesh."""
    members = app.client().mesh.members().members
    shown = tuple(each for each in members if everyone or each.status == "member")
    app.out.result({"members": shown}, lambda: _table(app, shown))


def _table(app: App, members: tuple[MemberView, ...]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "peer", "role", "duty", "here", "certificate", "notes"):
        table.add_column(column)
    for each in members:
        left = each.expires - time.time() if each.expires is not None else 0.0
        notes = [
            *([f"{each.status}: {each.detail}"] if each.detail else []),
            *([each.status] if each.status == "removed" else []),
            *(["authority"] if each.authority else []),
            *([f"vote {each.vote}"] if each.vote != "auto" else []),
            *(["draining"] if each.draining else []),
        ]
        table.add_row(
            each.name,
            short(each.peer_id),
            each.role,
            each.duty if each.duty != "none" else "-",
            "yes" if each.present else "away",
            f"for {duration(left)}" if left > 0 else "expired",
            ", ".join(notes),
        )
    app.out.console.print(table)


@member_command.command("promote")
@click.argument("node")
@click.option(
    "--vote",
    type=click.Choice(["always", "auto", "never"]),
    default="always",
    show_default=True,
    help="It must vote, votes if the mesh sees fit, or must not.",
)
@json_option
@pass_app
def promote(app: App, node: str, vote: Vote) -> None:
    """Let a member vote (on the node that holds the mesh's authority key)."""
    member = app.client().mesh.promote(node, vote)
    words = {
        "always": "is to vote as soon as it is connected and up to date",
        "auto": "votes if the mesh sees fit",
        "never": "is to vote no more",
    }
    app.out.result(member, lambda: app.out.text(f"{member.name} {words[member.vote]}."))


@member_command.command("remove")
@click.argument("node")
@click.option("--force", is_flag=True, help="Although it holds layers of a loaded model.")
@json_option
@pass_app
def remove(app: App, node: str, force: bool) -> None:
    """Let a member leave; with a new ticket it may join again (`join --again`)."""
    member = app.client().mesh.remove(node, force=force)
    app.out.result(member, lambda: app.out.text(f"{member.name} left the mesh."))


@member_command.command("revoke")
@click.argument("node")
@click.option("--reason", default="revoked by an operator", show_default=True)
@json_option
@pass_app
def revoke(app: App, node: str, reason: str) -> None:
    """Shut a member out for ever: its key was stolen, or it misbehaves."""
    member = app.client().mesh.revoke(node, reason)

    def show() -> None:
        app.out.text(f"{member.name} ({short(member.peer_id)}) is shut out.")

    app.out.result(member, show)
