"""What every verb shares: the flags before it, the home, the client of the running daemon."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from pyagent_node.base.errors import ConfigError
from pyagent_node.cli.output import Output

if TYPE_CHECKING:
    from pyagent_node.node.client import Client
    from pyagent_node.node.config import Settings
    from pyagent_node.node.home import Home

F = TypeVar("F", bound=Callable[..., object])


class App:
    """The state of one invocation."""

    def __init__(self) -> None:
        self.out = Output()
        self.home_dir: str | None = None
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Close the clients that were opened."""
        self._open.close()

    @cached_property
    def home(self) -> Home:
        """The node's home: ``--home``, else ``PYAGENT_HOME``, else the user's own."""
        from pyagent_node.node.home import Home  # noqa: PLC0415

        if self.home_dir is None:
            return Home.default()
        root = Path(self.home_dir).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise ConfigError(
                f"--home is {self.home_dir!r}, which is not a directory.",
                code="bad_home",
                remedy="Name a directory.",
            )
        # For what reads the environment: child processes and libraries of this process.
        os.environ["PYAGENT_HOME"] = str(root)
        return Home.default()

    def settings(self, **flags: object) -> Settings:
        """Return the settings in force; ``flags`` with value ``None`` count as not given."""
        from pyagent_node.node.config import load_settings  # noqa: PLC0415

        return load_settings(self.home, flags=flags)

    def client(self) -> Client:
        """Return a client of the daemon that runs on this home; :meth:`close` closes it.

        Raises :class:`Unavailable` (``daemon_not_running``) with how to start one.
        """
        from pyagent_node.node.client import Client  # noqa: PLC0415

        return self._open.enter_context(Client.from_home(self.home))


pass_app = click.make_pass_decorator(App, ensure=True)


def json_option(command: F) -> F:
    """Give a verb the flag ``--json``, which may also stand before the verb."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            context.ensure_object(App).out.json = True

    return click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Print JSON, one object a line.",
    )(command)
