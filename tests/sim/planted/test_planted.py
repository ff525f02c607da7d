"""The simulator proves itself: it finds every bug that is planted, and nothing where none is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import msgspec
import pytest

from pyagent_node.simulations.pool import ENVIRONMENT
from pyagent_node.simulations.run import Found

from .kit import Bug
from .player import COMMAND, Request, read_answer
from .registry import BUGS

LEAST = 18
MOST_SEEDS = 5

Play = Callable[[Request], tuple[Found, ...]]


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    """Play bugs in a process of their own; it is started once."""
    env = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(request: Request) -> tuple[Found, ...]:
            requests.write(msgspec.json.encode(request) + b"\n")
            requests.flush()
            answer = answers.readline()
            assert answer, f"the process that plays bugs died of {request}"
            return read_answer(answer)

        yield ask
        requests.close()


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug, play: Play) -> None:
    """Within its number of seeds, by an invariant that speaks of it; without the bug, none does."""
    for seed in range(bug.within):
        found = play(Request(bug.name, seed, planted=True))
        if {each.invariant for each in found} & bug.caught_by:
            break
    else:
        pytest.fail(f"{bug.within} seeds did not show that {bug.what}")
    assert play(Request(bug.name, seed, planted=False)) == ()


def test_the_bugs_are_many_and_distinct() -> None:
    assert len(BUGS) >= LEAST
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert all(bug.caught_by and bug.within <= MOST_SEEDS for bug in BUGS)
