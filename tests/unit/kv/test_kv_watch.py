"""When a fetch that turns out to be slow is ended."""

from __future__ import annotations

import pytest

from pyagent_node.node.kv_plan import LEAST_WATCHED, Ask, Watch

from .kv_kit import A, B

TOKEN = 0.01
"""A block of 64 tokens takes 0.64 s to compute."""
ONE = Ask(A, 0, 4, 0, 10)
OTHER = Ask(B, 4, 6, 0, 10)


def watch(*asks: Ask, came: dict[Ask, int]) -> Watch:
    made = Watch(asks, 0.0)
    for each, count in came.items():
        for _ in range(count):
            made.came(each)
    return made


@pytest.mark.parametrize(
    ("came", "at", "pays"),
    [
        ({ONE: 4}, 0.6, True),  # a block in 0.6 s
        ({ONE: 4}, 0.7, True),  # hardly slower
        ({ONE: 4}, 0.8, False),
        ({ONE: 36}, 8.0, False),  # what has passed does not count, but tells of the speed
        ({ONE: 40}, 80.0, True),  # all is here
        ({ONE: 0}, LEAST_WATCHED - 0.01, True),
        ({ONE: 0}, 1.5, True),  # a quarter of computing all of it is 1.6 s
        ({ONE: 0}, 1.7, False),
        ({ONE: 20, OTHER: 20}, 1.0, True),
        ({ONE: 20, OTHER: 2}, 1.0, False),  # the slowest counts
        ({ONE: 20, OTHER: 0}, 1.0, True),
        ({ONE: 20, OTHER: 0}, 2.0, False),
    ],
)
def test_what_is_slower_than_computing_is_ended(
    came: dict[Ask, int], at: float, pays: bool
) -> None:
    assert watch(*came, came=came).pays(at, TOKEN) is pays
