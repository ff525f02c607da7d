"""The frame of the command line: help, JSON, errors, exit codes, start-up cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from pyagent_node.base import errors
from pyagent_node.cli import exits, main
from pyagent_node.cli.app import App
from pyagent_node.cli.main import SECTIONS, cli
from pyagent_node.cli.output import Output, duration, short, size
from pyagent_node.node.home import Home

from .conftest import Run

VERBS = [verb for _, verbs in SECTIONS for verb, _, _ in verbs]
WANTED = (
    *("init", "id", "up", "down", "status", "peers", "connect", "mesh", "invite", "join", "model"),
    *("generate", "chat", "doctor", "config", "demo", "bench", "version", "completion"),
)
HEAVY = ("libp2p", "llama_cpp", "fastapi", "hypercorn", "trio", "numpy", "httpx", "rich")


def test_every_wanted_verb_is_there() -> None:
    assert set(WANTED) <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, run: Run) -> None:
    outcome = run(verb, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: pyagent-node {verb}")
    context = click.Context(cli, obj=App())
    command = cli.get_command(context, verb)
    assert command is not None
    commands = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    for each in commands:
        flags = [option for parameter in each.params for option in parameter.opts]
        assert "--json" in flags or each.name == "completion", each.name
        assert each.help, each.name


def test_the_help_fits_a_narrow_terminal(run: Run) -> None:
    assert max(map(len, run("--help").out.splitlines())) < 80


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pyagent_node.cli.main import run; status = run(['--help']);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage: pyagent-node" in done.stdout


def test_verbs_that_ask_the_daemon_import_no_engine(home: Home) -> None:
    heavy = ("libp2p", "llama_cpp", "fastapi", "hypercorn")
    code = (
        "import sys; from pyagent_node.cli.main import run; status = run(['status']);"
        f"print([m for m in {heavy!r} if m in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]"
    assert done.returncode == errors.Unavailable.exit_code


@pytest.mark.parametrize("where", [("--json", "status"), ("status", "--json")])
def test_json_counts_before_and_after_the_verb(
    where: tuple[str, str], run: Run, home: Home
) -> None:
    outcome = run(*where)
    assert outcome.status == errors.Unavailable.exit_code
    assert outcome.out == ""
    assert outcome.error["code"] == "daemon_not_running"
    assert "pyagent-node up" in str(outcome.error["remedy"])


def test_an_error_is_one_line_with_its_remedy(run: Run, home: Home) -> None:
    outcome = run("status")
    assert outcome.out == ""
    assert outcome.err == "error: No daemon runs on this home. Start it with `pyagent-node up`.\n"


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("status", "--nonsense"), ("mesh",), ("mesh", "create"), ("demo", "--nodes=0")],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...], run: Run) -> None:
    outcome = run(*arguments, "--json")
    assert outcome.status == 2
    assert outcome.error["code"] == "usage"
    assert run(*arguments).status == 2


def test_a_verb_that_is_misspelt_is_answered_with_those_that_read_alike(run: Run) -> None:
    outcome = run("modle", "load")
    assert outcome.status == 2
    assert "Did you mean 'model'" in outcome.err
    assert "Did you mean" not in run("frobnicate").err


@pytest.mark.parametrize("kind", [errors.CorruptData, errors.Refused, errors.Unavailable])
def test_a_daemon_that_ends_while_starting_hands_its_exit_code_on(
    kind: type[errors.PyAgentError],
) -> None:
    assert exits.kind_of(kind.exit_code) is kind
    assert exits.kind_of(exits.INTERNAL) is errors.Unavailable


def test_an_unexpected_error_is_told_apart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: App) -> Home:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(App, "home", property(broken))
    outcome = run("id", "--json")
    assert outcome.status == exits.INTERNAL
    assert outcome.error["code"] == "internal"
    assert "Traceback" not in outcome.err
    monkeypatch.setenv("PYAGENT_DEBUG", "1")
    assert "Traceback" in run("id").err


def test_ctrl_c_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: App) -> Home:
        raise KeyboardInterrupt

    monkeypatch.setattr(App, "home", property(interrupted))
    assert run("id").status == exits.INTERRUPTED


def test_a_reader_that_goes_away_is_no_fault() -> None:
    program = f"{sys.executable} -m pyagent_node.cli.main config show"
    command = f"{program} | head -n 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, exits.BROKEN_PIPE)


def test_every_error_class_has_a_documented_exit_code() -> None:
    documented = {code for code, _ in exits.CODES}

    def classes(cls: type[errors.PyAgentError]) -> list[type[errors.PyAgentError]]:
        return [cls, *(c for sub in cls.__subclasses__() for c in classes(sub))]

    assert {cls.exit_code for cls in classes(errors.PyAgentError)} <= documented


def test_the_exit_codes_are_in_the_docs(run: Run) -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for code, meaning in exits.CODES:
        assert f"| {code} | {meaning} |" in text
    assert run("help", "exit-codes").out.split() == exits.table().split()
    for verb in VERBS:
        assert f"`{verb}" in text, f"docs/cli.md does not tell of {verb}"


def test_help_topics(run: Run) -> None:
    assert "PYAGENT_HOME" in run("help", "environment").out
    assert run("help", "up").out.startswith("Usage: pyagent-node up")
    assert run("help").out == run("--help").out
    assert run("help", "nonsense").status == 2


def test_version(run: Run) -> None:
    versions = run("version", "--json").json
    assert versions["pyagent_node"]
    assert str(versions["pyagent_node"]) in run("version").out
    assert str(versions["pyagent_node"]) in run("--version").out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, run: Run) -> None:
    assert "_PYAGENT_NODE_COMPLETE" in run("completion", shell).out


def test_completion_of_verbs_and_keys(home: Home) -> None:
    environment = {"PYAGENT_HOME": str(home.root), "_PYAGENT_NODE_COMPLETE": "bash_complete"}

    def complete(words: str, at: int) -> str:
        return subprocess.run(
            [str(Path(sys.executable).parent / "pyagent-node")],
            env={**environment, "COMP_WORDS": words, "COMP_CWORD": str(at), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert "plain,status" in complete("pyagent-node st", 1)
    assert "api_port" in complete("pyagent-node config get api", 3)


def test_no_colour_in_pipes_and_with_no_color(run: Run, home: Home) -> None:
    assert "\033" not in run("status").err
    assert "\033" not in run("config", "show").out


def test_output_survives_a_narrow_encoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        Output().text("r\u00edo")
    assert path.read_text() == "r?o\n"


def test_words_for_amounts() -> None:
    assert size(98_362_432) == "98.4 MB"
    assert size(999) == "999 B"
    assert size(2e15) == "2000.0 TB"
    assert duration(59) == "59 s"
    assert duration(3 * 3600 + 300) == "3 h 05 min"
    assert duration(90_000) == "1 d 1 h"
    assert short("12D3KooWBRyGWu85s8wiBMBSZSgnK9d5uJmEGXBUVitMtsQAC4TY") == "…tsQAC4TY"
    assert short("ab" * 32) == "abababababab"


def test_main_exits_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pyagent-node", "nonsense"])
    with pytest.raises(SystemExit) as info:
        main.main()
    assert info.value.code == 2
