"""``generate``: answer one prompt."""

from __future__ import annotations

import contextlib
import sys

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.limits import MIB
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.ask import choose_model, sampling_ask, sampling_options, show_answer
from pyagent_node.cli.output import size
from pyagent_node.inference.generation import ChatMessage

MAX_PROMPT = 16 * MIB


@click.command("generate")
@click.argument("prompt", default="-")
@sampling_options
@click.option("--raw", is_flag=True, help="Continue the text itself, without a chat template.")
@click.option("--stats", is_flag=True, help="Show the speed on stderr.")
@json_option
@pass_app
def generate_command(app: App, /, prompt: str, raw: bool, stats: bool, **given: object) -> None:
    """Answer one prompt, streaming to stdout; `-` reads it from stdin."""
    if prompt == "-":
        if sys.stdin.isatty():
            app.out.note("Reading the prompt from here; Ctrl-D on a line of its own ends it.")
        prompt = sys.stdin.read(MAX_PROMPT + 1)
        if len(prompt) > MAX_PROMPT:
            raise InvalidRequest(f"The prompt is longer than {MAX_PROMPT} characters.")
    if not prompt.strip():
        raise InvalidRequest(
            "The prompt is empty.", code="bad_parameter", remedy="Give a text, or - to read stdin."
        )
    if raw and given["system"]:
        raise click.UsageError("--system needs the chat template; leave --raw out.")
    client = app.client()
    ask = sampling_ask(choose_model(client, given["model"]), given)
    if raw:
        ask = msgspec.structs.replace(ask, prompt=prompt)
    else:
        system = [ChatMessage("system", str(given["system"]))] if given["system"] else []
        ask = msgspec.structs.replace(ask, messages=(*system, ChatMessage("user", prompt)))
    with contextlib.closing(client.generate(ask)) as pieces:
        answer = show_answer(app, pieces)
    assert answer is not None, "the client raises unless an answer came"
    app.out.line(answer)
    if stats:
        app.out.note(
            f"{answer.completion_tokens} tokens, {answer.tokens_per_second:.1f} tokens/s,"
            f" first after {answer.ttft_seconds:.2f} s, {len(answer.placement.ranks)} ranks,"
            f" seed {answer.seed}"
        )
        if answer.cached_tokens:
            app.out.note(
                f"{answer.cached_tokens} of {answer.prompt_tokens} tokens of the prompt were"
                " there already"
            )
        if (pruned := answer.kv) is not None:
            app.out.note(
                f"{pruned.held_cells} cells of KV are held, {pruned.evicted_cells} were given up"
                f" ({size(pruned.evicted_bytes)}), counted on every rank"
            )
        guesses = answer.speculation
        if guesses is not None:
            app.out.note(
                f"{guesses.drafter}: {guesses.accepted} of {guesses.drafted} guesses were right,"
                f" {guesses.tokens_per_pass:.2f} tokens a pass"
            )
