"""Runs command lines in this process, as a user would type them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from pyagent_node.cli import main


class Outcome(NamedTuple):
    """What a command line left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, object]:
        """The last line of stdout."""
        value = json.loads(self.out.splitlines()[-1])
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> dict[str, object]:
        """The error on stderr with ``--json``."""
        value = json.loads(self.err.splitlines()[-1])["error"]
        assert isinstance(value, dict)
        return value


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs one command line; ``stdin`` is what it can read."""

    def call(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main.run(arguments)
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call
