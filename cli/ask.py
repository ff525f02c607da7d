"""Asking a model through the daemon: the options of a request, and which model is meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar, cast

import click
import msgspec
from click.shell_completion import CompletionItem

from pyagent_node.base.errors import InvalidRequest, NotFound, PyAgentError
from pyagent_node.cli.app import App
from pyagent_node.node.answers import Answer

if TYPE_CHECKING:
    from pyagent_node.node.answers import Ask, Piece
    from pyagent_node.node.client import Client

F = TypeVar("F", bound=Callable[..., object])

DEFAULT_TEMPERATURE = 0.8
DEFAULT_TOP_K = 40
DEFAULT_TOP_P = 0.95
DEFAULT_MIN_P = 0.05
"""Those of llama.cpp's own programs; the API's are OpenAI's (temperature 1.0, nothing cut off)."""


def _loaded(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        names = [card.id for card in context.ensure_object(App).client().loaded()]
    except PyAgentError:
        return []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def sampling_options(command: F) -> F:
    """Add the options of a generation to a verb."""
    for option in reversed(
        (
            click.option(
                "--model",
                "-m",
                metavar="MODEL",
                shell_complete=_loaded,
                help="Which loaded model (default: the only one).",
            ),
            click.option("--max-tokens", "-n", type=click.IntRange(min=1), help="End after these."),
            click.option(
                "--temperature",
                "-t",
                type=float,
                default=DEFAULT_TEMPERATURE,
                show_default=True,
                help="0 takes the likeliest token.",
            ),
            click.option("--seed", type=int, help="The same seed gives the same answer."),
            click.option("--stop", multiple=True, metavar="TEXT", help="End here; repeatable."),
            click.option(
                "--top-k",
                type=int,
                default=DEFAULT_TOP_K,
                show_default=True,
                help="Only the K likeliest tokens.",
            ),
            click.option(
                "--top-p",
                type=float,
                default=DEFAULT_TOP_P,
                show_default=True,
                help="Only the likeliest tokens up to P in all.",
            ),
            click.option(
                "--min-p",
                type=float,
                default=DEFAULT_MIN_P,
                show_default=True,
                help="Only tokens with P of the likeliest's.",
            ),
            click.option("--repetition-penalty", type=float, help="Above 1 avoids repetition."),
            click.option(
                "--speculation",
                metavar="DRAFTER",
                help="Who guesses tokens ahead: none, auto, or a drafter such as suffix."
                "  The answer is the same.",
            ),
            click.option("--draft-length", type=int, help="Guesses a step, instead of as it pays."),
            click.option("--draft-depth", type=int, help="Steps in flight; see --draft-length."),
            click.option(
                "--draft-tree/--draft-chain",
                default=None,
                help="Whether the guesses of --draft-length form a tree.",
            ),
            click.option(
                "--prompt-cache/--no-prompt-cache",
                default=None,
                help="Whether what is computed of the prompt is kept for the next request.",
            ),
            click.option(
                "--kv-budget",
                metavar="off|auto|N|rolling|rolling:N",
                help="Give up KV that little attention rests on, for as many cells a rank."
                "  The answer is another one.  rolling: while the prompt is read, too, which may"
                " then be longer than the context of a session.",
            ),
            click.option("--system", metavar="TEXT", help="The system message."),
        )
    ):
        command = option(command)
    return command


def sampling_ask(model: str, given: dict[str, object]) -> Ask:
    """Return a request without its prompt, with the options that were given."""
    from pyagent_node.node.answers import Ask  # noqa: PLC0415

    names = (
        "max_tokens",
        "temperature",
        "seed",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "speculation",
        "draft_length",
        "draft_depth",
        "draft_tree",
        "cache_salt",
        "prompt_cache",
        "kv_budget",
    )
    fields = {name: given[name] for name in names if given.get(name) is not None}
    stop = cast("tuple[str, ...]", given.get("stop") or ())
    return msgspec.convert({"model": model, "stop": stop or None, **fields}, Ask)


def choose_model(client: Client, wanted: object) -> str:
    """Return the model to ask: the one named, else the only one that is loaded."""
    if isinstance(wanted, str) and wanted:
        return wanted
    names = [card.id for card in client.loaded()]
    if not names:
        raise NotFound(
            "No model is loaded.",
            code="model_not_found",
            remedy="Load one with `pyagent-node model load`.",
        )
    if len(names) > 1:
        raise InvalidRequest(
            "Several models are loaded.",
            code="ambiguous_model",
            remedy=f"Choose with --model one of: {', '.join(names)}.",
        )
    return names[0]


def show_answer(app: App, pieces: Iterator[Piece | Answer]) -> Answer | None:
    """Print the text of an answer as it comes, on a line of its own; returns the whole answer."""
    written, answer = "", None
    try:
        for piece in pieces:
            if isinstance(piece, Answer):
                answer = piece
            else:
                written = piece.text or written
                app.out.piece(piece.text)
    finally:
        if written and not written.endswith("\n"):
            app.out.piece("\n")
    return answer
