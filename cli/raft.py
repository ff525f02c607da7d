"""``raft``: the mesh's log, who votes on it, who leads; and beginning it anew after a disaster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import short

if TYPE_CHECKING:
    from pyagent_node.node.api.mesh_schema import RaftView

VERDICTS = {
    "same": "the same log",
    "different": "ANOTHER LOG",
    "behind": "the same, but behind",
    "not_kept": "cannot tell",
    "unreachable": "no answer",
}


@click.group("raft")
def raft_command() -> None:
    """Show and change who decides: the log, its voters, its leader."""


@raft_command.command("status")
@json_option
@pass_app
def status(app: App) -> None:
    """Show the log as this node sees it, and who votes."""
    view = app.client().mesh.raft()
    app.out.result(view, lambda: _show(app, view))


def _show(app: App, view: RaftView) -> None:
    from rich.table import Table  # noqa: PLC0415

    leader = view.leader_name or "none"
    behind = f" of {view.commit} agreed on" if view.commit > view.index else ""
    app.out.text(f"{view.engine}: this node is {view.role}, the leader is {leader}")
    app.out.text(f"  term {view.term}, entry {view.index}{behind}")
    if view.chain:
        app.out.text(f"  hash over the log  {view.chain[:16]}")
    if view.joint:
        app.out.text("  a change of voters is under way")
    if view.missing:
        many = "voter is" if view.missing == 1 else "voters are"
        app.out.text(f"  {view.missing} {many} missing: nothing can be decided")
    elif view.problem is not None:
        app.out.text(f"  {view.problem.message}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("node", "peer", "duty", "here", "entry"):
        table.add_column(column, justify="right" if column == "entry" else "left")
    for node in view.followers:
        duty = "leader" if node.leader else "voter" if node.voter else "learner"
        entry = str(node.matched) if node.matched is not None else "-"
        here = "yes" if node.present else "away"
        table.add_row(node.name, short(node.peer_id), duty, here, entry)
    app.out.console.print(table)


@raft_command.command("voters")
@click.option("--set", "nodes", metavar="A,B,C", help="Have exactly these nodes vote (1, 3, 5, 7).")
@click.option("--auto", is_flag=True, help="Let the mesh choose its voters again.")
@json_option
@pass_app
def voters(app: App, nodes: str | None, auto: bool) -> None:
    """Show who votes; fix it with --set, or undo that with --auto."""
    if nodes is not None and auto:
        raise click.UsageError("--set and --auto exclude each other.")
    mesh = app.client().mesh
    if nodes is None and not auto:
        view = mesh.raft()
    else:
        chosen = tuple(name for part in (nodes or "").split(",") if (name := part.strip()))
        if not auto and not chosen:
            raise click.UsageError("--set needs the names of one or more nodes.")
        view = mesh.set_voters(chosen)
        wanted = set(chosen)
        vote = {each.name for each in view.followers if each.voter}
        vote |= {each.peer_id for each in view.followers if each.voter}
        if not wanted <= vote:
            app.out.note("Not all of them vote yet: they must be connected and up to date first.")

    def show() -> None:
        for node in view.followers:
            if node.voter:
                note = "" if node.present else "  (away)"
                app.out.text(f"{node.name}{' (leader)' if node.leader else ''}{note}")

    value = [each for each in view.followers if each.voter]
    app.out.result({"voters": value, "missing": view.missing, "joint": view.joint}, show)


@raft_command.command("transfer")
@click.argument("node")
@json_option
@pass_app
def transfer(app: App, node: str) -> None:
    """Let another voter lead."""
    view = app.client().mesh.transfer(node)
    app.out.result(view, lambda: app.out.text(f"{view.leader_name} leads."))


@raft_command.command("snapshot")
@json_option
@pass_app
def snapshot(app: App) -> None:
    """Replace this node's log so far by a snapshot of the state."""
    reply = app.client().mesh.snapshot()
    app.out.result(reply, lambda: app.out.text(f"The log begins after entry {reply.index} now."))


@raft_command.command("verify")
@json_option
@pass_app
@click.pass_context
def verify(context: click.Context, app: App) -> None:
    """Compare the logs of all connected nodes with this one's; exit code 1 if one differs."""
    reply = app.client().mesh.verify()

    def show() -> None:
        app.out.text(f"entry {reply.index}, hash {(reply.chain or 'not kept')[:16]}")
        for node in reply.nodes:
            detail = f" ({node.detail})" if node.detail else ""
            app.out.text(f"  {node.name}  {VERDICTS[node.verdict]}{detail}")

    app.out.result(reply, show)
    if not reply.good:
        app.out.note("Stop the nodes that differ and keep their logs: this must not happen.")
        context.exit(1)


@raft_command.command("recover")
@click.option("--mesh", default="", metavar="NAME", help="The mesh, if this node is in several.")
@click.option(
    "--yes-this-loses-data",
    "sure",
    is_flag=True,
    help="Needed: what the lost voters alone had agreed on is gone for good.",
)
@json_option
@pass_app
def recover(app: App, mesh: str, sure: bool) -> None:
    """Begin the log anew from this node's copy, after most voters are lost FOR EVER.

    Stop the daemon first.  Choose the survivor with the highest entry in `raft status`.  This node
    becomes the only voter; the other survivors follow it when they connect.  A lost voter that
    comes back all the same must not be started with its old log.
    """
    from pyagent_node.base.errors import InvalidRequest  # noqa: PLC0415
    from pyagent_node.node.log_recovery import recover_log  # noqa: PLC0415

    if not sure:
        raise InvalidRequest(
            "This makes this node's copy of the log the truth, whatever the lost voters knew.",
            code="not_confirmed",
            remedy="If they are lost for ever, repeat it with --yes-this-loses-data.",
        )
    done = recover_log(app.home, mesh or app.settings().mesh)

    def show() -> None:
        app.out.text(f"The log of {done.mesh} begins anew at entry {done.index}.")
        app.out.text(f"  state         after entry {done.applied}, which is all this node had")
        app.out.text(f"  before, also  {', '.join(short(p) for p in done.lost) or 'nobody else'}")
        app.out.text(f"  old log       {done.backup}")
        app.out.note("Next: `pyagent-node up` here, then on the other survivors.")

    app.out.result(done, show)
