"""``ask``: answer a question from a context, and say what from."""

from __future__ import annotations

import contextlib

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.ask import choose_model, sampling_ask, sampling_options, show_answer
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import ContextChoice


@click.command("ask")
@click.argument("context")
@click.argument("question")
@click.option("--count", type=int, help="Give the model so many chunks (default 8).")
@click.option(
    "--exact",
    is_flag=True,
    help="Compute the whole prompt, instead of joining KV that chunks have already.",
)
@sampling_options
@click.option("--stats", is_flag=True, help="Show the speed on stderr.")
@json_option
@pass_app
def ask_command(
    app: App,
    /,
    context: str,
    question: str,
    **given: object,
) -> None:
    """Answer QUESTION from what the context CONTEXT holds, with a list of the sources."""
    if not question.strip():
        raise InvalidRequest("The question is empty.", code="bad_parameter")
    client = app.client()
    ask = sampling_ask(choose_model(client, given["model"]), given)
    system = [ChatMessage("system", str(given["system"]))] if given["system"] else []
    ask = msgspec.structs.replace(
        ask,
        messages=(*system, ChatMessage("user", question)),
        context=msgspec.convert(
            {"name": context, "count": given["count"], "exact": given["exact"] or None},
            ContextChoice,
        ),
    )
    with contextlib.closing(client.generate(ask)) as pieces:
        answer = show_answer(app, pieces)
    assert answer is not None, "the client raises unless an answer came"
    app.out.line(answer)
    if answer.citations:
        app.out.text("\nSources:")
    else:
        app.out.text("\nNothing was found for it in the context.")
    for each in answer.citations:
        source = "".join(char if char.isprintable() else "?" for char in each.source)
        lines = f"lines {each.first_line}-{each.last_line}"
        app.out.text(f"  [{each.number}] {source}, {lines} (score {each.score:.3f})")
    if given["stats"]:
        few = f", of {answer.joined_landmarks} landmarks only" if answer.joined_landmarks else ""
        app.out.note(
            f"first token after {answer.ttft_seconds:.2f} s; KV of {answer.joined_tokens} of"
            f" {answer.prompt_tokens} tokens of the prompt was that of chunks{few}"
        )
