"""The history checker accepts what is possible and nothing else."""

from __future__ import annotations

import math
import random

from .linearizability import (
    Look,
    Operation,
    Read,
    Swap,
    Write,
    counter,
    linearizable,
    register,
    without_unseen_writes,
)

Registers = list[Operation[Write | Read]]


def ok(history: Registers) -> bool:
    kept = without_unseen_writes(history)
    assert linearizable(history, 0, register) is linearizable(kept, 0, register)
    return linearizable(kept, 0, register)


def test_one_after_the_other() -> None:
    assert ok([])
    assert ok([Operation(Write(1), 0, 1), Operation(Read(1), 2, 3)])
    assert not ok([Operation(Write(1), 0, 1), Operation(Read(0), 2, 3)])
    assert not ok([Operation(Read(1), 0, 1), Operation(Write(1), 2, 3)])


def test_a_read_beside_a_write_sees_either_but_time_does_not_turn_back() -> None:
    write = Operation[Write | Read](Write(1), 0, 9)
    for value in (0, 1):
        assert ok([write, Operation(Read(value), 1, 2)])
    assert ok([write, Operation(Read(0), 1, 2), Operation(Read(1), 3, 4)])
    assert not ok([write, Operation(Read(1), 1, 2), Operation(Read(0), 3, 4)])


def test_a_write_of_unknown_outcome_may_happen_late_or_never() -> None:
    lost = Operation[Write | Read](Write(1), 0, math.inf)
    other = Operation[Write | Read](Write(2), 1, 2)
    assert ok([lost, other, Operation(Read(2), 3, 4)])
    assert ok([lost, other, Operation(Read(2), 3, 4), Operation(Read(1), 5, 6)])
    assert not ok(
        [
            lost,
            other,
            Operation(Read(2), 3, 4),
            Operation(Read(1), 5, 6),
            Operation(Read(2), 7, 8),
        ]
    )


def test_a_swap_that_two_won_is_impossible() -> None:
    both = [Operation(Swap(0, owner, True), owner, owner + 10) for owner in (1, 2)]
    assert not linearizable(both, (0, 0), counter)
    one = [both[0], Operation(Swap(0, 2, False), 2.5, 12.5)]
    assert linearizable([*one, Operation(Look(1, 1), 20, 21)], (0, 0), counter)
    assert not linearizable([*one, Operation(Look(1, 2), 20, 21)], (0, 0), counter)


def test_real_histories_are_accepted_and_spoilt_ones_are_not() -> None:
    spoilt = refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        history, value, time = Registers(), 0, 0.0
        for number in range(60):
            time += 1
            if rng.random() < 0.5:
                value = number + 1
                action: Write | Read = Write(value)
            else:
                action = Read(value)
            history.append(Operation(action, time - rng.random() * 5, time + rng.random() * 5))
        assert ok(history)
        place = rng.choice([i for i, each in enumerate(history) if isinstance(each.action, Read)])
        stale = Operation[Write | Read](Read(0), *history[place][1:])
        if any(isinstance(each.action, Write) and each.ended < stale.began for each in history):
            spoilt += 1
            refused += not ok([*history[:place], stale, *history[place + 1 :]])
    assert spoilt > 30
    assert refused == spoilt
