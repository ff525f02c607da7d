"""What the backend remembers of a sequence, against a plain dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest, LimitExceeded
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.stepping.sequences import SequenceLog

N_CTX = 12


def filled(n: int) -> SequenceLog:
    log = SequenceLog(3, N_CTX, None)
    if n:
        log.append(0, np.arange(100, 100 + n, dtype=np.int32))
    return log


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "trim", "shift"]), st.integers(0, N_CTX), st.integers(-5, 5)
        )
    )
)
def test_it_agrees_with_a_dictionary(ops: list[tuple[str, int, int]]) -> None:
    log = SequenceLog(0, N_CTX, None)
    model: dict[int, int] = {}
    for number, (kind, a, b) in enumerate(ops):
        if kind == "append":
            n = abs(b) + 1
            end = max(model, default=-1) + 1
            if max(len(model), end) + n > N_CTX:
                with pytest.raises(LimitExceeded):
                    log.check_room(log.end, n)
                continue
            log.check_room(log.end, n)
            log.append(log.end, np.full(n, number, np.int32))
            model |= {end + i: number for i in range(n)}
        elif kind == "trim":
            log.trim(a)
            model = {p: t for p, t in model.items() if p < a}
        else:
            start, stop = min(a, a + b), max(a, a + b)
            moved = [(p + b if start <= p < stop else p, t) for p, t in model.items()]
            fits = all(0 <= p < N_CTX for p, _ in moved) and len(dict(moved)) == len(moved)
            if fits:
                log.shift(start, stop, b)
                model = dict(moved)
            else:
                with pytest.raises(InvalidRequest):
                    log.shift(start, stop, b)
        pairs = dict(zip(log.positions.tolist(), log.tokens.tolist(), strict=True))
        assert pairs == model
        assert log.end == max(model, default=-1) + 1
        assert log.count == len(model)


def test_selecting_needs_a_cell_at_every_position() -> None:
    log = filled(6)
    assert log.select(2, 5).tolist() == [2, 3, 4]
    log.shift(4, 6, 3)
    assert log.select(7, 9).tolist() == [4, 5]
    for start, stop in ((3, 8), (2, 2), (5, 2), (-1, 2), (8, 20)):
        with pytest.raises(InvalidRequest) as caught:
            log.select(start, stop)
        assert caught.value.code == "kv_range"


def test_room_is_counted_in_cells_and_in_positions() -> None:
    log = filled(10)
    log.check_room(10, 2)
    with pytest.raises(LimitExceeded) as caught:
        log.check_room(10, 3)
    assert caught.value.facts == {"n_ctx": N_CTX, "needed": 13}
    assert caught.value.code == "kv_full"


def test_the_bias_becomes_arrays() -> None:
    log = SequenceLog(0, 4, SamplingParams(logit_bias={5: 1.5, 2: -100.0}))
    assert log.bias.tokens.tolist() == [5, 2]
    assert log.bias.values.tolist() == [1.5, -100.0]
