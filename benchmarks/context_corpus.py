"""The corpus of the context benchmark: Python's standard library with facts hidden in it.

The source files come in the order of their names, as many as the wanted number of tokens takes (the
tests, the site's packages, tables of encodings and the like are left out).  Each fact of
``context_facts.tsv`` becomes a comment line somewhere in a file, at the indentation of the line
after it; where, follows from a seed.  Two thirds of the questions are never used while tuning.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

FACTS: Final = Path(__file__).with_name("context_facts.tsv")
SEED: Final = 7
LEFT_OUT: Final = frozenset(
    (
        *("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"),
        *("turtledemo", "pydoc_data", "ensurepip", "encodings"),
    )
)


class Fact(NamedTuple):
    """A sentence, the question that asks for it, and whether tuning may look at it.

    ``keys``: a right answer says one of them, in whatever case; none where nobody wrote them down.
    """

    sentence: str
    question: str
    tuning: bool
    keys: tuple[str, ...] = ()


def facts(path: Path = FACTS) -> list[Fact]:
    """Return the facts of a file; every third one is for tuning."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    found = [line.split("\t") for line in lines if line]
    return [
        Fact(row[0], row[1], number % 3 == 0, tuple(row[2].split("/")) if len(row) > 2 else ())
        for number, row in enumerate(found)
    ]


def library(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the standard library's source files."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not LEFT_OUT.intersection(name.parts):
            text = path.read_text("utf-8", "replace")
            if text.strip() and "\0" not in text:
                yield name.as_posix(), text


def corpus(
    tokens: int, count: Callable[[str], int], hidden: list[Fact], seed: int = SEED
) -> list[tuple[str, str]]:
    """Return files of about ``tokens`` tokens together, with the facts hidden in them."""
    files: list[tuple[str, str]] = []
    total = 0
    for name, text in library():
        if total >= tokens:
            break
        files.append((name, text))
        total += sum(count(line) for line in text.splitlines())
    generator = random.Random(seed)  # noqa: S311 - reproducible on purpose
    weights = [len(text) for _, text in files]
    for fact in hidden:
        number = generator.choices(range(len(files)), weights)[0]
        name, text = files[number]
        lines = text.splitlines(keepends=True)
        at = generator.randrange(len(lines))
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip(" \t"))].strip("\r\n")
        lines.insert(at, f"{indent}# {fact.sentence}\n")
        files[number] = (name, "".join(lines))
    return files
