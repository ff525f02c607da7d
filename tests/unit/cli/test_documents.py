"""What documents and messages say: links lead somewhere, commands are ones of the program."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pyagent_node.cli.app import App
from pyagent_node.cli.main import cli

ROOT = Path(__file__).resolve().parents[3]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.S | re.M)


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub and GitLab make them."""
    found = set[str]()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", document.read_text()), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


def test_links_between_the_documents_lead_somewhere() -> None:
    broken: list[str] = []
    for document in documents():
        text = FENCE.sub("", document.read_text())
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            if not target.exists() or (
                anchor and target.suffix == ".md" and anchor not in anchors(target)
            ):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)


def test_every_document_is_named_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for document in documents():
        name = document.relative_to(ROOT).as_posix()
        assert document.parent.name == "adr" or name == "README.md" or f"({name})" in readme, name


def of_documents() -> Iterator[tuple[str, str]]:
    """Give every command line of the documents, with where it stands."""
    for document in documents():
        text = document.read_text()
        for block in FENCE.findall(text):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                said = re.match(r"(?:\s*\w*\$)?\s*(?:sudo )?pyagent-node( .*)", line)
                if said:
                    yield document.name, said[1].split(" #")[0]
        for quoted in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            said = re.match(r"pyagent-node( .*)", " ".join(quoted.split()))
            if said:
                yield document.name, said[1]


def of_messages() -> Iterator[tuple[str, str]]:
    """Give every command line that a message of the program names, with where it stands."""
    for folder in ("base", "consensus", "sharding", "inference", "node", "cli", "simulations"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    text = "".join(
                        str(part.value) if isinstance(part, ast.Constant) else "2"
                        for part in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    text = node.value
                else:
                    continue
                for said in re.findall(r"[`']pyagent-node( [^`']+)[`']", " ".join(text.split())):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", said


def parses(arguments: list[str]) -> None:
    """Have the program's own parser read a command line, and nothing more."""
    command: click.Command = cli
    context: click.Context | None = None
    name: str | None = "pyagent-node"
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=context, obj=App())
        _, arguments, _ = command.make_parser(context).parse_args(arguments)
        if not arguments:
            return
        name, found, arguments = command.resolve_command(context, arguments)
        assert found is not None
        command = found
    command.make_context(name, list(arguments), parent=context)


def options(command: click.Command) -> set[str]:
    """Return every option of a command and of those below it."""
    found = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found |= options(below)
    return found


def test_options_that_messages_name_are_there() -> None:
    known = {"--help", *options(cli)}
    wrong: list[str] = []
    for folder in ("base", "consensus", "sharding", "inference", "node"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.keyword) or node.arg != "remedy":
                    continue
                for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", ast.unparse(node.value)):
                    if option not in known and "llama-gguf-split" not in ast.unparse(node.value):
                        wrong.append(f"{path.relative_to(ROOT)}:{node.value.lineno}: {option}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the files that examples name are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYAGENT_HOME", str(tmp_path / "home"))
    for name in ("manuals", "src", "folder"):
        (tmp_path / name).mkdir()
    for name in ("A.json", "B.json", "model.gguf", "faults-17.json"):
        (tmp_path / name).write_text("{}")


@pytest.mark.usefixtures("folder")
def test_command_lines_that_are_told_to_users_are_ones_of_the_program() -> None:
    wrong: list[str] = []
    count = 0
    for where, line in (*of_documents(), *of_messages()):
        count += 1
        # N stands for a number; what a user may leave out or choose is no part of the line.
        arguments = [re.sub(r"^N$", "2", re.sub(r"\[.*\]", "", word)) for word in shlex.split(line)]
        if "VERB" in arguments or arguments[-1] == "...":
            arguments = [word for word in arguments if word not in ("VERB", "...")]
        try:
            parses(arguments)
        except click.MissingParameter:
            # A verb by its name alone is a reference to its help.
            if not all(re.fullmatch("[a-z]+", word) for word in arguments):
                wrong.append(f"{where}: pyagent-node{line} lacks something")
        except click.exceptions.Exit:
            pass  # --help and --version
        except click.ClickException as error:
            wrong.append(f"{where}: pyagent-node{line}: {error.format_message()}")
    assert count > 100
    assert not wrong, "\n".join(wrong)
