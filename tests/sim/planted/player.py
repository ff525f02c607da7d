"""The process that plays planted bugs: one request a line on standard input, one answer a line.

Runs repeat themselves only where sets of strings have the same order, which an interpreter decides
when it starts (``PYTHONHASHSEED``); so they do not run where the tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from pathlib import Path

import msgspec

from pyagent_node.simulations.run import Found

COMMAND = (
    sys.executable,
    "-c",
    "import sys; sys.path.insert(0, sys.argv[1]); from planted.player import main; main(sys.stdin)",
    str(Path(__file__).parents[1]),
)


class Request(msgspec.Struct):
    """Which bug to play, under which seed, with or without it."""

    bug: str
    seed: int
    planted: bool


def main(lines: Iterable[str]) -> None:
    """Serve until standard input ends."""
    from .registry import BUGS

    bugs = {bug.name: bug for bug in BUGS}
    sound: dict[Hashable, bytes] = {}
    for line in lines:
        request = msgspec.json.decode(line, type=Request)
        bug, seed = bugs[request.bug], request.seed
        same = bug.sound_run(seed)
        answer = None if request.planted else sound.get(same)
        if answer is None:
            outcome = bug.play(seed, planted=request.planted)
            answer = msgspec.json.encode(outcome.violations)
        if not request.planted:
            sound[same] = answer
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def read_answer(line: bytes) -> tuple[Found, ...]:
    """Return the broken invariants in an answer."""
    return msgspec.json.decode(line, type=tuple[Found, ...])
