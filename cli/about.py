"""``help``, ``completion`` and ``version``."""

from __future__ import annotations

import platform
from importlib import metadata

import click
from click.shell_completion import get_completion_class

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.cli import exits
from pyagent_node.cli.app import App, json_option, pass_app

ENVIRONMENT = """\
PYAGENT_HOME     Where the node keeps everything: keys, meshes, models, settings.
PYAGENT_<KEY>    Any setting of `pyagent-node config show`, in capitals.
PYAGENT_DEBUG    Any value: show where an unexpected error happened.
NO_COLOR         Any value: no colours.
"""

INSTALL = {
    "bash": 'eval "$(pyagent-node completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(pyagent-node completion zsh)"   # in ~/.zshrc',
    "fish": "pyagent-node completion fish | source   # in ~/.config/fish/config.fish",
}


@click.command("help")
@click.argument("topic", required=False)
@json_option
@pass_app
@click.pass_context
def help_command(context: click.Context, app: App, topic: str | None) -> None:
    """Help on a verb or a topic: exit-codes, environment."""
    root = context.find_root()
    if topic is None:
        app.out.text(root.get_help())
    elif topic == "exit-codes":
        codes = {str(code): meaning for code, meaning in exits.CODES}
        app.out.result(codes, lambda: app.out.text(exits.table()))
    elif topic == "environment":
        app.out.text(ENVIRONMENT.rstrip())
    else:
        assert isinstance(root.command, click.Group)
        command = root.command.get_command(root, topic)
        if command is None:
            raise InvalidRequest(
                f"There is no verb or topic {topic!r}.", remedy="See `pyagent-node help`."
            )
        with click.Context(command, info_name=topic, parent=root) as inner:
            app.out.text(command.get_help(inner))


@click.command("completion")
@click.argument("shell", type=click.Choice(sorted(INSTALL)))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    \b
    bash:  eval "$(pyagent-node completion bash)"
    zsh:   eval "$(pyagent-node completion zsh)"
    fish:  pyagent-node completion fish | source
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(context.find_root().command, {}, "pyagent-node", "_PYAGENT_NODE_COMPLETE")
    click.echo(script.source())


@click.command("version")
@json_option
@pass_app
def version_command(app: App) -> None:
    """Show the versions of pyagent-node and of what it runs on."""
    versions = {
        "pyagent_node": metadata.version("pyagent-node"),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "libp2p": metadata.version("libp2p"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }

    def show() -> None:
        app.out.text(f"pyagent-node {versions['pyagent_node']}")
        for name in ("llama_cpp_python", "libp2p", "python", "system"):
            app.out.text(f"  {name.replace('_', '-')}: {versions[name]}")

    app.out.result(versions, show)
