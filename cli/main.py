"""The entry point: finds the verb, runs it, turns errors into one line and an exit code."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import ClassVar

import click

from pyagent_node.base.errors import ConfigError, PyAgentError
from pyagent_node.cli.app import App, json_option
from pyagent_node.cli.exits import BROKEN_PIPE, INTERNAL, INTERRUPTED

SECTIONS: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "This node",
        (
            ("init", "node", "Create this node's home and key."),
            ("id", "node", "Show this node's peer id."),
            ("up", "up", "Start the daemon."),
            ("down", "up", "Stop the daemon."),
            ("status", "status", "Show the node, its mesh, peers, ranks and sessions."),
            ("doctor", "doctor", "Check what commonly goes wrong."),
            ("config", "config", "Show and change settings."),
        ),
    ),
    (
        "Mesh",
        (
            ("mesh", "mesh", "Create, show and choose meshes."),
            ("invite", "membership", "Make a ticket that lets another node join."),
            ("join", "membership", "Join a mesh with a ticket."),
            ("peers", "status", "List the connected peers."),
            ("connect", "membership", "Connect to a peer by its address."),
            ("member", "member", "List, promote, remove and revoke members."),
            ("raft", "raft", "Show and change who decides: voters, leader, log."),
        ),
    ),
    (
        "Models",
        (
            ("model", "model", "Pull, list, load, unload and remove models."),
            ("placement", "placement", "Show and change which nodes hold which layers."),
            ("kv", "kv", "Show and clear the KV blocks that this node keeps."),
            ("session", "session", "List, follow, move, export and import answers in progress."),
            ("context", "context", "Keep documents and find what a question needs in them."),
            ("generate", "generate", "Answer one prompt."),
            ("chat", "chat", "Talk to a model."),
            ("ask", "ask_context", "Answer a question from a context, with its sources."),
        ),
    ),
    (
        "Trying out",
        (
            ("demo", "demo", "Split a model over daemons on this machine and ask it."),
            ("bench", "bench", "Measure speed against a single process."),
            ("lab", "lab", "Run daemons on hosts of their own, with networks as you say."),
            ("simulate", "simulate", "Try the whole swarm with faults, on virtual time."),
        ),
    ),
    (
        "About",
        (
            ("help", "about", "Help on a topic: exit-codes, environment."),
            ("completion", "about", "Print the completion script for a shell."),
            ("version", "about", "Show the version."),
        ),
    ),
)
"""The verbs as the help lists them: (section, ((verb, module, what it does), ...))."""


class Verbs(click.Group):
    """The top-level group; imports a verb's module when the verb is used."""

    _modules: ClassVar[dict[str, str]] = {
        verb: module for _, verbs in SECTIONS for verb, module, _ in verbs
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the help."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a verb and return its command."""
        module = self._modules.get(cmd_name)
        if module is None:
            return None
        command = getattr(import_module(f"pyagent_node.cli.{module}"), f"{cmd_name}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it; for a verb that is not there, with those that read alike."""
        if args and args[0] not in self._modules and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self._modules, n=2)
            also = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            ctx.fail(f"There is no verb {args[0][:64]!r}.{also}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs by section without importing any."""
        for title, verbs in SECTIONS:
            with formatter.section(title):
                formatter.write_dl([(verb, text) for verb, _, text in verbs])


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
First steps: `pyagent-node demo`, or `pyagent-node up` and then, elsewhere,
`pyagent-node model load smollm2-135m` and `pyagent-node chat`.""",
)
@click.option("--home", metavar="DIR", help="The node's home (default: PYAGENT_HOME or your own).")
@json_option
@click.version_option(package_name="pyagent-node", message="%(package)s %(version)s")
@click.pass_context
def cli(context: click.Context, home: str | None) -> None:
    """Run language models over the machines you have, as one swarm."""
    context.ensure_object(App).home_dir = home


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    app = App()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        found = cli.main(arguments, prog_name="pyagent-node", standalone_mode=False, obj=app)
        sys.stdout.flush()
        return found if isinstance(found, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        app.out.note("")
        return INTERRUPTED
    except click.ClickException as error:
        return _usage(app, arguments, error)
    except PyAgentError as error:
        app.out.error(error)
        return error.exit_code
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        if os.environ.get("PYAGENT_DEBUG"):
            traceback.print_exc()
        app.out.error(
            PyAgentError(
                f"Unexpected {type(error).__name__}: {error}.",
                code="internal",
                remedy="This is a fault in pyagent-node; PYAGENT_DEBUG=1 shows where.",
            )
        )
        return INTERNAL
    finally:
        app.close()


def _usage(app: App, arguments: Sequence[str], error: click.ClickException) -> int:
    """Report a wrong command line; ``--json`` counts even where it was not parsed."""
    app.out.json = app.out.json or "--json" in arguments
    context = getattr(error, "ctx", None)
    path = context.command_path if isinstance(context, click.Context) else "pyagent-node"
    message = error.format_message()
    app.out.error(
        ConfigError(
            message if message.endswith((".", "?", "!")) else f"{message}.",
            code="usage",
            remedy=f"See `{path} --help`.",
        )
    )
    return ConfigError.exit_code


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run())


if __name__ == "__main__":
    main()
