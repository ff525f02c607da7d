"""The simulator proves itself: it finds every bug that is planted, and nothing where none is."""

from __future__ import annotations

import pytest

from .kit import Bug
from .registry import BUGS

LEAST = 15


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    """Within its number of seeds, by an invariant that speaks of it; without the bug, none does."""
    for seed in range(bug.within):
        found = bug.play(seed, planted=True).violations
        if {each.invariant for each in found} & bug.caught_by:
            break
        assert not found, f"seed {seed} broke something else: {found}"
    else:
        pytest.fail(f"{bug.within} seeds did not show that {bug.what}")
    assert bug.play(seed, planted=False).violations == ()


def test_the_bugs_are_many_and_distinct() -> None:
    assert len(BUGS) >= LEAST
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert all(bug.caught_by and bug.within <= 5 for bug in BUGS)
