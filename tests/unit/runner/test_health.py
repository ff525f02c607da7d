"""Which silence of a runner counts as hanging."""

from __future__ import annotations

import os

from pyagent_node.inference.runner_health import (
    LEAST_PATIENCE,
    LOOK_SECONDS,
    MEASURED,
    PATIENCE_FACTOR,
    STALL_SECONDS,
    Pace,
    Vigil,
    processor_seconds,
)

LOOKS = int(STALL_SECONDS / LOOK_SECONDS)


def looks(vigil: Vigil, start: float, *seen: tuple[int | None, float | None]) -> list[bool]:
    return [
        vigil.look(start + at * LOOK_SECONDS, request, used)
        for at, (request, used) in enumerate(seen)
    ]


def test_a_request_without_processor_time_hangs_after_a_while() -> None:
    assert looks(Vigil(), 10, *[(1, 2.0)] * (LOOKS + 1)) == [False] * LOOKS + [True]


def test_any_progress_begins_anew() -> None:
    almost = [(1, 2.0)] * LOOKS
    assert not any(looks(Vigil(), 10, *almost, *[(1, 2.01)] * LOOKS))
    assert not any(looks(Vigil(), 10, *almost, *[(2, 2.0)] * LOOKS))


def test_the_idle_and_the_unknown_do_not_hang() -> None:
    assert not any(looks(Vigil(), 10, *[(None, 2.0)] * 3 * LOOKS))
    assert not any(looks(Vigil(), 10, *[(1, None)] * 3 * LOOKS))


def test_a_pause_of_our_own_is_forgiven() -> None:
    vigil = Vigil()
    assert not any(looks(vigil, 10, (1, 2.0), (1, 2.0)))
    assert not any(looks(vigil, 10_000, (1, 2.0), (1, 2.0)))


def test_processor_time_of_processes() -> None:
    own = processor_seconds(os.getpid())
    assert own is not None
    assert own > 0
    assert processor_seconds(2**22 + 1) is None


def test_patience_follows_what_computations_took() -> None:
    pace = Pace()
    for _ in range(MEASURED - 1):
        pace.took(1, 0.5)
        assert pace.patience(1, 300) == 300
    pace.took(512, 5.0)
    assert pace.patience(1, 300) == LEAST_PATIENCE
    assert pace.patience(10, 300) == PATIENCE_FACTOR * 0.5 * 10
    assert pace.patience(512, 300) == 300
    pace.took(0, 2.0)
    assert pace.patience(1, 300) == PATIENCE_FACTOR * 2.0
