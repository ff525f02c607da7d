"""``invite``, ``join`` and ``connect``: who is in the mesh and who is connected."""

from __future__ import annotations

import re
import sys
import time

import click

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.mesh import restart_note
from pyagent_node.cli.output import duration

MAX_TICKET = 16_384
_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)")
_UNITS = {"": 3600.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Span(click.ParamType[float]):
    """A time span such as ``30m``, ``24h`` or ``7d``; a bare number counts hours."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the span in seconds."""
        if isinstance(value, float):
            return value
        match = _SPAN.fullmatch(str(value).strip().lower())
        if match is None or float(match[1]) <= 0:
            self.fail(f"{str(value)[:40]!r} is no time span; write 30m, 24h or 7d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.command("invite")
@click.option(
    "--role",
    type=click.Choice(["voter", "learner", "client"]),
    default="voter",
    show_default=True,
    help="What the new node may do: hold slices and vote, hold slices, only ask.",
)
@click.option("--expires", type=Span(), metavar="TIME", help="Life of the ticket: 30m, 24h, 7d.")
@json_option
@pass_app
def invite_command(app: App, role: str, expires: float | None) -> None:
    """Make a single-use ticket that lets another node join.

    Whoever holds the ticket can join: pass it on as you would a password.
    """
    from pyagent_node.node.api.schema import InviteRequest  # noqa: PLC0415

    seconds = expires if expires is not None else app.settings().ticket_hours * 3600
    reply = app.client().invite(InviteRequest(role=role, ttl_seconds=int(seconds)))
    value = {"ticket": reply.ticket, "expires": reply.expires, "role": role}

    def show() -> None:
        app.out.text(reply.ticket)
        left = duration(reply.expires - time.time())
        app.out.note(f"On the other machine, within {left}: pyagent-node join TICKET")

    app.out.result(value, show)


@click.command("join")
@click.argument("ticket", required=False)
@click.option("--name", metavar="NAME", help="This node's name in the mesh.")
@click.option("--again", is_flag=True, help="Redeem it although this node was a member before.")
@json_option
@pass_app
def join_command(app: App, ticket: str | None, name: str | None, again: bool) -> None:
    """Join a mesh with a ticket (without one, or with `-`, it is read from stdin)."""
    import trio  # noqa: PLC0415

    from pyagent_node.node.joining import join  # noqa: PLC0415

    if ticket in (None, "-"):
        if sys.stdin.isatty():
            app.out.note("Paste the ticket, then press Enter:")
        ticket = sys.stdin.readline(MAX_TICKET)
    ticket = "".join((ticket or "").split())
    if not ticket:
        raise InvalidRequest(
            "There is no ticket.",
            code="ticket_malformed",
            remedy="Get one with `pyagent-node invite` on a node of the mesh.",
        )
    node_name = app.settings(name=name).node_name
    profile = trio.run(lambda: join(app.home, ticket, name=node_name, again=again))
    genesis = profile.genesis
    value = {"mesh_id": profile.mesh_id, "name": genesis.name, "role": profile.role}

    def show() -> None:
        app.out.text(f"Joined {genesis.name} ({profile.mesh_id[:12]}) as {profile.role}.")
        app.out.note("Next: `pyagent-node up`.")
        restart_note(app)

    app.out.result(value, show)


@click.command("connect")
@click.argument("address")
@json_option
@pass_app
def connect_command(app: App, address: str) -> None:
    """Connect to a peer: /ip4/192.0.2.7/tcp/4810/p2p/12D3KooW..."""
    peer = app.client().connect(address).peer_id
    app.out.result({"peer_id": peer}, lambda: app.out.text(f"Connected to {peer}."))
