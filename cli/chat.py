"""``chat``: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click
import msgspec

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.base.files import OWNER_ONLY, write_atomic
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.ask import choose_model, sampling_ask, sampling_options
from pyagent_node.cli.output import coloured
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node.answers import Answer, Ask

HISTORY_LINES = 1000
HELP = """\
/help           this
/reset          forget the conversation
/system TEXT    set the system message (and forget the conversation)
/save FILE      write the conversation to a file (.json or text)
/exit           leave (Ctrl-D does too)
Ctrl-C stops an answer.  End a line with \\ to go on in the next."""


class Conversation:
    """The turns so far and what can be done to them."""

    def __init__(self, app: App, ask: Ask, system: str | None) -> None:
        self._app = app
        self._ask = ask
        self.system = system
        self.turns: list[ChatMessage] = []

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """What the model is sent: the system message and the turns."""
        system = [ChatMessage("system", self.system)] if self.system else []
        return (*system, *self.turns)

    def ask(self, text: str) -> None:
        """Send one turn and stream the answer.

        An answer that is stopped with Ctrl-C stays in the conversation as far as it came; a turn
        that failed is taken back, so that it can be tried again.
        """
        self.turns.append(ChatMessage("user", text))
        texts: list[str] = []
        end = "\n"
        try:
            self._stream(texts)
        except KeyboardInterrupt:
            end = " (stopped)\n"
        except PyAgentError:
            self.turns.pop()
            raise
        finally:
            self._app.out.piece(end)
        if texts:
            self.turns.append(ChatMessage("assistant", "".join(texts)))
        else:
            self.turns.pop()

    def _stream(self, texts: list[str]) -> None:
        """Print the answer as it comes and collect it in ``texts``."""
        ask = msgspec.structs.replace(self._ask, messages=self.messages)
        with self._app.client() as client, contextlib.closing(client.generate(ask)) as pieces:
            for piece in pieces:
                if isinstance(piece, Answer):
                    self._app.out.line(piece)
                else:
                    self._app.out.piece(piece.text)
                    texts.append(piece.text)

    def command(self, line: str) -> bool:
        """Carry out a ``/command``; return whether to go on."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name in ("/help", "/?"):
            self._app.out.note(HELP)
        elif name in ("/reset", "/clear"):
            self.turns.clear()
            self._app.out.note("The conversation starts anew.")
        elif name == "/system":
            self.system = rest or None
            self.turns.clear()
            self._app.out.note("The conversation starts anew with this system message.")
        elif name == "/save":
            self._save(rest)
        else:
            self._app.out.note(f"There is no {name[:40]}; /help lists what there is.")
        return True

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidRequest("/save needs the name of a file.")
        path = Path(name).expanduser()
        if path.suffix == ".json":
            data = msgspec.json.format(msgspec.json.encode(self.messages), indent=2) + b"\n"
        else:
            data = "".join(f"{m.role}: {m.content}\n\n" for m in self.messages).encode()
        write_atomic(path, data)
        self._app.out.note(f"Saved {len(self.turns)} turns to {path}.")


class Prompt:
    """Reads the user's lines: with editing and history on a terminal, plainly from a pipe."""

    def __init__(self, app: App) -> None:
        self._interactive = sys.stdin.isatty()
        self._history = app.home.root / "chat_history"
        self._marker = "> "
        if self._interactive and coloured(sys.stdout):
            # \x01 and \x02 tell readline which characters take no room.
            self._marker = "\x01\033[1m\x02> \x01\033[0m\x02"

    def __enter__(self) -> Prompt:
        if self._interactive:
            with contextlib.suppress(ImportError, OSError):
                import readline  # noqa: PLC0415

                readline.set_history_length(HISTORY_LINES)
                readline.read_history_file(self._history)
        return self

    def __exit__(self, *_: object) -> None:
        if self._interactive:
            with contextlib.suppress(ImportError, OSError):
                import readline  # noqa: PLC0415

                readline.write_history_file(self._history)
                os.chmod(self._history, OWNER_ONLY)

    def read(self) -> str | None:
        """Return the next turn, ``None`` at the end; a line ending in a backslash goes on."""
        lines: list[str] = []
        while True:
            try:
                line = input(("... " if lines else self._marker) if self._interactive else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])


@click.command("chat")
@sampling_options
@json_option
@pass_app
def chat_command(app: App, /, **given: object) -> None:
    """Talk to a model; /help lists the commands."""
    with app.client() as client:
        model = choose_model(client, given["model"])
    system = given["system"] if isinstance(given["system"], str) else None
    talk = Conversation(app, sampling_ask(model, given), system)
    if sys.stdin.isatty():
        app.out.note(f"Talking to {model}; /help lists the commands, Ctrl-D leaves.")
    with Prompt(app) as prompt:
        while True:
            try:
                line = prompt.read()
            except KeyboardInterrupt:
                app.out.note("\n(Ctrl-D or /exit leaves)")
                continue
            if line is None:
                if sys.stdin.isatty():
                    app.out.note("")  # the shell goes on in a line of its own
                break
            try:
                if line.startswith("/"):
                    if not talk.command(line.strip()):
                        break
                elif line.strip():
                    talk.ask(line)
            except PyAgentError as error:
                app.out.error(error)
