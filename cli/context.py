"""``context``: sets of documents that questions are asked about, over the whole mesh."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pyagent_node.base.contexts import MAX_DOCUMENT
from pyagent_node.base.errors import InvalidRequest, NotFound
from pyagent_node.base.types import ContextPolicy
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import duration, size

if TYPE_CHECKING:
    from pyagent_node.node.api.context_schema import (
        ContextView,
        DocumentsReply,
        DocumentView,
        HitView,
        QueryReply,
    )

_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*(s|m|min|h|d|w)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SHOWN_LINES = 4
_SHOWN_PLACES = 5


class Seconds(click.ParamType[int]):
    """A time span: ``90``, ``15m``, ``12h``, ``7d``, ``4w``."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return seconds."""
        match = _TIME.fullmatch(str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is no time; write 90, 15m, 12h, 7d or 4w", param, ctx)
        return int(float(match[1]) * _SECONDS[match[2]])


@click.group("context")
def context_command() -> None:
    """Keep documents in the mesh and find what a question needs in them.

    First `context create NAME`, then `context add NAME FOLDER`, then `context query NAME QUESTION`.
    """


@context_command.command("create")
@click.argument("name")
@click.option("--max-age", type=Seconds(), default=0, help="Answer from no older documents (7d).")
@click.option(
    "--max-tokens", type=click.IntRange(0), default=0, help="Answer from the newest so many tokens."
)
@click.option(
    "--unused", type=Seconds(), default=0, help="Drop documents that nobody asks for so long (30d)."
)
@json_option
@pass_app
def create(app: App, name: str, max_age: int, max_tokens: int, unused: int) -> None:
    """Make the context NAME: letters, digits, dots, underscores and hyphens."""
    policy = ContextPolicy(max_age, max_tokens, unused)
    view = app.client().contexts.create(name, policy)

    def show() -> None:
        app.out.text(f"{view.name} is there.")
        app.out.note(f"Next: `pyagent-node context add {view.name} FOLDER`.")

    app.out.result({"context": view}, show)


@context_command.command("add")
@click.argument("name")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--as", "source", help="What to call the document, or the folder.")
@click.option("--prune", is_flag=True, help="Remove documents of files that a folder has no more.")
@json_option
@pass_app
def add(app: App, name: str, paths: tuple[str, ...], *, source: str | None, prune: bool) -> None:
    """Add files, folders, or stdin (`-`, with --as) to the context NAME.

    Text of any sort, HTML and PDF.  Of a folder, what .gitignore leaves out and what is no text is
    left out.  Only what changed is sent: after an interruption, run it again.
    """
    from pyagent_node.cli.context_adding import Adding  # noqa: PLC0415

    if source is not None and len(paths) > 1:
        raise InvalidRequest("--as names one file or folder.", code="usage")
    if "-" in paths and (source is None or len(paths) > 1):
        raise InvalidRequest(
            "stdin is one document, and needs a name.",
            code="usage",
            remedy=f"Write: pyagent-node context add {name} - --as NOTES.md",
        )
    adding = Adding(app, name)
    began = time.monotonic()
    if "-" in paths:
        data = sys.stdin.buffer.read(MAX_DOCUMENT + 1)
        adding.add_data(str(source), data, int(time.time()))
    else:
        adding.add_paths([Path(path) for path in paths], source, prune=prune)
    adding.finish(time.monotonic() - began)


@context_command.command("rm")
@click.argument("name")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option("--yes", is_flag=True, help="Do not ask before a whole context goes.")
@json_option
@pass_app
def remove(app: App, name: str, sources: tuple[str, ...], yes: bool) -> None:
    """Remove documents (SOURCE may have `*` and `?`), or the whole context NAME."""
    client = app.client().contexts
    if not sources:
        shown = client.show(name).context
        if not yes and not sys.stdin.isatty():
            raise InvalidRequest(
                f"A whole context goes only if that is said: {name!r} has {shown.documents}"
                " documents.",
                code="usage",
                remedy="Add --yes.",
            )
        if not yes:
            question = f"Remove {name!r} with {shown.documents} documents from the whole mesh?"
            click.confirm(question, abort=True, err=True)
        reply = client.drop(name)
        app.out.result(reply, lambda: app.out.text(f"{name} is removed."))
        return
    held = [row.source for row in client.show(name).documents]
    for source in _matching(sources, held, name):
        removed = client.remove(name, source).removed
        app.out.line({"removed": removed})
        app.out.text(f"{removed} is removed.")


def _matching(patterns: Sequence[str], held: Sequence[str], name: str) -> Iterator[str]:
    for pattern in dict.fromkeys(patterns):
        found = [pattern] if pattern in held else [s for s in held if fnmatchcase(s, pattern)]
        if not found:
            raise NotFound(
                f"There is no document {pattern!r} in {name!r}.",
                code="source_not_found",
                remedy=f"`pyagent-node context show {name}` lists them.",
            )
        yield from found


@context_command.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the contexts of the mesh."""
    reply = app.client().contexts.list()
    app.out.result(reply, lambda: _contexts(app, reply.contexts))


def _contexts(app: App, rows: Sequence[ContextView]) -> None:
    from rich.table import Table  # noqa: PLC0415

    if not rows:
        app.out.note("There is no context. Make one: `pyagent-node context create NAME`.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("context", "documents", "chunks", "tokens", "index", "chunks here", "policy"):
        table.add_column(column, justify="left" if column in ("context", "policy") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.documents}",
            f"{row.chunks}",
            f"{row.tokens:,}",
            size(row.record_bytes) + (" spread" if row.spread else ""),
            f"{row.bodies_here}",
            _policy(row.policy),
        )
    app.out.console.print(table)


def _policy(policy: ContextPolicy) -> str:
    said = []
    if policy.max_age_seconds:
        said.append(f"up to {duration(policy.max_age_seconds)} old")
    if policy.max_tokens:
        said.append(f"newest {policy.max_tokens:,} tokens")
    if policy.unused_seconds:
        said.append(f"used within {duration(policy.unused_seconds)}")
    return ", ".join(said) or "kept"


@context_command.command("show")
@click.argument("name")
@json_option
@pass_app
def show(app: App, name: str) -> None:
    """Show the context NAME and its documents."""
    reply = app.client().contexts.show(name)
    app.out.result(reply, lambda: _show(app, reply))


def _show(app: App, reply: DocumentsReply) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    view = reply.context
    app.out.text(
        f"{view.name}: {view.documents} documents, {view.tokens:,} tokens in {view.chunks} chunks,"
        f" index {size(view.record_bytes)}; {_policy(view.policy)}"
    )
    app.out.text(f"  encoder {view.encoder}")
    where = "spread over the nodes by bucket" if view.spread else "on every node"
    app.out.text(
        f"  sketches ({size(view.sketch_bytes)}) {where}, {size(view.sketch_bytes_here)} on this"
        f" one: {view.spread_why}"
    )
    if view.removals:
        until = f"; waiting for {len(view.removals_wait_for)}" if view.removals_wait_for else ""
        app.out.text(f"  {view.removals} removals, kept until every member has them{until}")
    if view.lost:
        names = ", ".join(row.source for row in reply.documents if row.lost)
        app.out.note(
            f"{view.lost} chunks are lost: no node has them any more. Add again: {_plain(names)}"
        )
    if not reply.documents:
        app.out.note(f"It is empty. Next: `pyagent-node context add {view.name} FOLDER`.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("document", "bytes", "tokens", "chunks", "joined", "version", "added", ""):
        table.add_column(column, justify="left" if column in ("document", "") else "right")
    for row in reply.documents:
        table.add_row(
            Text(row.source),
            size(row.size),
            f"{row.tokens:,}",
            f"{row.chunks}",
            f"{row.joined}",
            f"{row.counter}",
            _when(row),
            "" if row.fresh else "too old",
        )
    app.out.console.print(table)


def _when(row: DocumentView) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(row.added))


@context_command.command("query")
@click.argument("name")
@click.argument("question", nargs=-1, required=True)
@click.option("--count", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option(
    "--way",
    type=click.Choice(["both", "meaning", "words"]),
    default="both",
    show_default=True,
    help="What ranks the chunks.",
)
@click.option("--why", is_flag=True, help="Say why each chunk was found, and by whom.")
@click.option("--full", is_flag=True, help="Show whole chunks.")
@json_option
@pass_app
def query(
    app: App,
    name: str,
    question: tuple[str, ...],
    *,
    count: int,
    way: Literal["both", "meaning", "words"],
    why: bool,
    full: bool,
) -> None:
    """Show the chunks of the context NAME that QUESTION needs, best first."""
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.context_schema import QueryRequest  # noqa: PLC0415

    request = QueryRequest(question=" ".join(question), count=count, way=way)
    with Reporter(app.out, stream_json=False) as report:
        reply = app.client().contexts.query(name, request, report)
    app.out.result(reply, lambda: _hits(app, reply, why=why, full=full))
    if way == "words" and reply.candidate_chunks < reply.chunks:
        app.out.note(
            f"Words were counted in {reply.candidate_chunks} of {reply.chunks} chunks: those that"
            " the question's meaning points to."
        )


def _plain(line: str) -> str:
    """Return a line of somebody's document without what terminals obey."""
    return "".join(each if each.isprintable() or each == "\t" else "?" for each in line)


def _hits(app: App, reply: QueryReply, *, why: bool, full: bool) -> None:
    if not reply.hits:
        app.out.note("Nothing was found: the context has no fresh documents with such words.")
    for number, hit in enumerate(reply.hits, 1):
        lines = f"{hit.first_line}-{hit.last_line}"
        near = f"  {hit.likeness:.3f}" if hit.likeness is not None else ""
        app.out.text(f"{number}. {hit.source}:{lines}{near}")
        if why:
            _why(app, hit)
        shown = [line for line in (hit.text if full else hit.best).splitlines() if line.strip()]
        for line in shown if full else shown[:_SHOWN_LINES]:
            app.out.text(f"   | {_plain(line.rstrip())[: None if full else 160]}")
    if reply.missing:
        app.out.note(
            f"{reply.missing} candidate chunks could be had from no node: something may be missing."
        )
    if reply.lost:
        app.out.note(
            f"{reply.lost} chunks of the context are lost: no node has them any more. 'pyagent-node"
            " context show' names their documents; add those again."
        )
    if why:
        app.out.text(
            f"{reply.candidates} of {reply.windows} windows were candidates, in"
            f" {reply.candidate_chunks} of {reply.chunks} chunks; {reply.nodes_asked} of"
            f" {reply.nodes} nodes"
            f"{f' ({reply.probed} of them for sketches)' if reply.probed else ''}"
            f" asked; {reply.seconds * 1000:.0f} ms, {reply.embed_seconds * 1000:.0f} of them for"
            " the question's vector"
        )


def _why(app: App, hit: HitView) -> None:
    said = []
    if hit.meaning_rank is not None:
        said.append(f"by meaning #{hit.meaning_rank}")
    if hit.words_rank is not None:
        said.append(f"by words #{hit.words_rank}")
    said.append(f"score {hit.score:.4f}, {hit.tokens} tokens")
    if hit.owner is not None:
        said.append(f"from …{hit.owner[-8:]}")
    app.out.text(f"   {', '.join(said)}")
    for place in hit.also[:_SHOWN_PLACES]:
        app.out.text(f"   also in {place.source}:{place.first_line}-{place.last_line}")
    if len(hit.also) > _SHOWN_PLACES:
        app.out.text(f"   and in {len(hit.also) - _SHOWN_PLACES} more places")
