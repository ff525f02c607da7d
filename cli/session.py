"""``session``: answers in progress, wherever they are made."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import write_atomic
from pyagent_node.base.limits import MIB
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.ask import show_answer
from pyagent_node.cli.output import duration, short, size

if TYPE_CHECKING:
    from pyagent_node.node.api.session_schema import ImportReply, SessionRow

MAX_FILE = 32 * MIB


@click.group("session")
def session_command() -> None:
    """List, follow, move, export and import answers in progress.

    A session's id is all that reading it takes: treat it as a secret.
    """


@session_command.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the sessions that this node heads or serves, and those that the mesh can resume."""
    rows = app.client().sessions.list().sessions
    app.out.result({"sessions": rows}, lambda: _table(app, rows))


def _table(app: App, rows: tuple[SessionRow, ...]) -> None:
    from rich.table import Table  # noqa: PLC0415

    if not rows:
        app.out.note("No session is in progress.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("session", "model", "head", "tokens", "tokens/s", "journal kept by"):
        table.add_column(column, justify="right" if column.startswith("tokens") else "left")
    for row in rows:
        here = row.part == "head"
        name = str(row.session) if row.session is not None else f"({short(row.public)})"
        counted = row.part != "away"
        table.add_row(
            name,
            row.model,
            "this node" if here else row.head_name,
            f"{row.completion_tokens}" if counted else "-",
            "waiting" if row.suspended else f"{row.tokens_per_second:.1f}" if counted else "-",
            ", ".join(row.holders) or "-",
        )
    app.out.console.print(table)


@session_command.command("move")
@click.argument("session")
@click.argument("node")
@json_option
@pass_app
def move(app: App, session: str, node: str) -> None:
    """Let NODE (name or peer id) be the head of SESSION; whoever reads it notices nothing."""
    reply = app.client().sessions.move(session, node)
    app.out.result(
        reply, lambda: app.out.text(f"{reply.name} heads it now, from token {reply.tokens} on.")
    )


@session_command.command("follow")
@click.argument("session")
@click.option("--from", "after", type=click.IntRange(0), default=0, help="First token to show.")
@json_option
@pass_app
def follow(app: App, session: str, after: int) -> None:
    """Show the text of SESSION as it comes; this node takes it over if its head is gone.

    Whoever read it before is told that it is read elsewhere.
    """
    with contextlib.closing(app.client().resume(session, after)) as pieces:
        answer = show_answer(app, pieces)
    if answer is not None:
        app.out.line(answer)


@session_command.command("export")
@click.argument("session")
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@json_option
@pass_app
def export(app: App, session: str, file: Path | None) -> None:
    """Write SESSION, as far as it is, to FILE or stdout; it goes on here."""
    data = app.client().sessions.write_out(session)
    if file is None:
        sys.stdout.buffer.write(data + b"\n")
        return
    write_atomic(file, data)
    reply = {"file": str(file), "bytes": len(data)}
    app.out.result(reply, lambda: app.out.text(f"{file}: {size(len(data))}"))


@session_command.command("import")
@click.argument("file", type=click.File("rb"))
@json_option
@pass_app
def import_(app: App, file: BinaryIO) -> None:
    """Go on with a session from FILE (`-`: stdin), under a new id, in this mesh."""
    data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise InvalidRequest(
            f"The file is larger than {size(MAX_FILE)}; no session is.", code="bad_session_file"
        )
    reply = app.client().sessions.read_in(data)
    app.out.result(reply, lambda: _imported(app, reply))


def _imported(app: App, reply: ImportReply) -> None:
    app.out.text(reply.session)
    app.out.note(
        f"{reply.name}: {reply.prompt_tokens} tokens of prompt, {reply.completion_tokens} of"
        f" answer. Read it within {duration(reply.seconds)}:"
        f" `pyagent-node session follow {reply.session}`."
    )
