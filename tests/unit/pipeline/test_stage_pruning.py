"""Sessions that give up cells on a stage: when, which, and what the head is told."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import SessionId
from pyagent_node.inference.backend import (
    CellAttention,
    OpenSequence,
    PruneSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import WINDOW, Evicted, Pruning, budget, due
from pyagent_node.inference.pipeline.frames import (
    PIPE_CODEC,
    OpenSession,
    Result,
    StageError,
    Step,
    pack_tail,
)
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_queue import Batch
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import SamplingParams

from .stage_driver import EPOCH, HEAD, MODEL, Driver, errors, spec

PRUNING = Pruning(256)
PROMPT = 512


def driver(rank: int = 2, *, prunes: bool = True) -> Driver:
    """Return a stage whose runner can prune."""
    made = Driver(spec(rank))
    made.core = StageCore(made.spec, prunes=prunes, cell_bytes=100)
    return made


def opened(
    stage: Driver, name: str = "s", pruning: Pruning | None = PRUNING, root: bytes = b""
) -> list[object]:
    """Open a session with a budget."""
    stage.at[name] = (0, 0)
    message = OpenSession(
        SessionId(name),
        MODEL,
        EPOCH,
        stage.spec.rank,
        HEAD,
        4096,
        PROMPT,
        SamplingParams(),
        root,
        pruning=pruning,
    )
    out = stage.core.receive(stage.sender, message, b"", 0.0)
    return [each.message for each in out]


def attention(positions: np.ndarray[tuple[int], np.dtype[np.int32]]) -> CellAttention:
    """Return what a runner might say of cells that were all alike."""
    n = len(positions)
    return CellAttention(
        positions.astype(np.int32),
        np.ones((2, n), np.float32),
        np.ones(n, np.float32),
        np.ones(n, np.int32),
        np.zeros(2, np.float32),
        1,
    )


def ran(stage: Driver) -> tuple[Batch, list[Outgoing]]:
    """Have the next batch computed."""
    batch = stage.batch()
    return batch, stage.run(batch)


def prompted(stage: Driver, name: str = "s") -> tuple[list[object], list[object]]:
    """Have a prompt computed in two pieces, and return the operations before each."""
    opened(stage, name)
    stage.step(name, 256, sample=False)
    first, _ = ran(stage)
    stage.step(name, 256)
    second, _ = ran(stage)
    return list(first.ops), list(second.ops)


def test_attention_is_measured_from_the_last_piece_of_the_prompt_on() -> None:
    stage = driver()
    first, second = prompted(stage)
    assert [type(op) for op in first] == [OpenSequence]
    assert [type(op) for op in second] == [WatchSequence]
    stage.step("s")
    batch, _ = ran(stage)
    assert batch.ops == ()


def test_nothing_is_given_up_before_the_first_token_of_the_answer() -> None:
    stage = driver()
    prompted(stage)
    assert not stage.core.pruning.has_turn
    stage.step("s")
    ran(stage)
    assert stage.core.pruning.has_turn


def rolling(stage: Driver, cells: int = 256) -> list[tuple[list[str], int]]:
    """Read a prompt of three pieces; return the operations and the cells kept behind each."""
    opened(stage, pruning=Pruning(cells, rolling=True))
    found: list[tuple[list[str], int]] = []
    held = np.zeros(0, np.int32)
    for at in range(0, PROMPT, 171):
        end = min(PROMPT, at + 171)
        stage.step("s", end - at, sample=end == PROMPT)
        batch, _ = ran(stage)
        held = np.concatenate([held, np.arange(at, end, dtype=np.int32)])
        while (turn := stage.core.pruning.next_turn()) is not None:
            ops = stage.core.pruning.plan(turn, attention(held))
            assert isinstance(ops[0], PruneSequence)
            held = np.concatenate([np.arange(*part, dtype=np.int32) for part in ops[0].keep])
        found.append(([type(op).__name__ for op in batch.ops], len(held)))
    return found


def test_a_rolling_budget_holds_behind_every_piece_of_the_prompt() -> None:
    stage = driver()
    found = rolling(stage)
    assert found == [(["OpenSequence", "WatchSequence"], 171), ([], 256), ([], 256)]
    assert stage.core.pruning.cells == PROMPT - 256
    for _ in range(64):  # an answer may be a few cells over
        stage.step("s")
        ran(stage)
        assert not stage.core.pruning.has_turn
    stage.step("s")
    ran(stage)
    assert stage.core.pruning.has_turn


def test_a_prompt_within_its_rolling_budget_is_kept_whole() -> None:
    stage = driver()
    assert [cells for _, cells in rolling(stage, PROMPT)] == [171, 342, PROMPT]
    assert stage.core.pruning.cells == 0


@pytest.mark.parametrize(
    ("pruning", "prompt", "positions", "trained", "code"),
    [
        (Pruning(256), 100, 8192, 8192, None),
        (Pruning(256), 100, 8193, 8192, "bad_parameter"),
        (Pruning(256), 4096, 4097, 8192, "bad_parameter"),
        (Pruning(256, rolling=True), 8000, 8192, 8192, None),
        (Pruning(256, rolling=True), 100, 4097, 0, "bad_parameter"),
        (Pruning(4000, rolling=True), 100, 4097, 8192, "bad_parameter"),
        (None, 100, 4097, 8192, "bad_parameter"),
        (None, 100, 4096, 0, None),
    ],
)
def test_positions_beyond_the_cells_of_a_slot(
    pruning: Pruning | None, prompt: int, positions: int, trained: int, code: str | None
) -> None:
    for able in (True, False):
        stage = Driver(spec(2))
        stage.core = StageCore(stage.spec, prunes=able, cell_bytes=100, trained=trained)
        message = OpenSession(
            SessionId("s"), MODEL, EPOCH, 2, HEAD, positions, prompt, SamplingParams()
        )
        message = msgspec.structs.replace(message, pruning=pruning)
        out = stage.core.receive(stage.sender, message, b"", 0.0)
        told = [each.message.error.code for each in out if isinstance(each.message, StageError)]
        expected = code or ("no_pruning" if positions > 4096 and not able else None)
        assert told == ([expected] if expected else [])


def test_what_is_given_up_is_counted_and_told() -> None:
    stage = driver()
    prompted(stage)
    stage.step("s")
    ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    ops = stage.core.pruning.plan(turn, attention(np.arange(PROMPT + 1)))
    assert [type(op) for op in ops] == [PruneSequence, WatchSequence]
    assert isinstance(ops[0], PruneSequence)
    assert sum(stop - start for start, stop in ops[0].keep) == 256
    gone = PROMPT + 1 - 256
    view = stage.core.view()
    assert (view.evicted, view.evicted_bytes) == (gone, 100 * gone)
    stage.step("s")
    _, out = ran(stage)
    (result,) = [each.message for each in out]
    assert isinstance(result, Result)
    assert result.evicted == Evicted(257, gone, 100 * gone)


def test_every_rank_adds_what_it_gave_up() -> None:
    stage = driver(1)
    prompted(stage)
    stage.step("s")
    ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    stage.core.pruning.plan(turn, attention(np.arange(PROMPT + 1)))
    session = turn.session
    found = stage.core.pruning.evicted(session, Evicted(10, 20, 30))
    gone = PROMPT + 1 - 256
    assert found == Evicted(10 + 256, 20 + gone, 30 + 100 * gone)


def test_a_runner_that_cannot_keeps_everything_and_says_nothing() -> None:
    stage = driver(prunes=False)
    _, second = prompted(stage)
    assert second == []
    stage.step("s")
    _, out = ran(stage)
    assert not stage.core.pruning.has_turn
    (result,) = [each.message for each in out]
    assert isinstance(result, Result)
    assert result.evicted is None


def test_a_session_that_ended_meanwhile_is_left_alone() -> None:
    stage = driver()
    prompted(stage)
    stage.step("s")
    ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    stage.close("s")
    assert stage.core.pruning.plan(turn, attention(np.arange(PROMPT + 1))) == ()
    assert stage.core.pruning.cells == 0


def test_a_session_that_ended_before_has_no_turn() -> None:
    stage = driver()
    prompted(stage)
    stage.step("s")
    ran(stage)
    stage.close("s")
    assert stage.core.pruning.next_turn() is None
    assert stage.core.has_work  # its slot is to be freed


def test_what_the_runner_refuses_is_not_tried_again() -> None:
    stage = driver()
    prompted(stage)
    stage.step("s")
    ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    stage.core.pruning.refused(turn)
    stage.step("s")
    ran(stage)
    assert not stage.core.pruning.has_turn


@pytest.mark.parametrize("cells", [1, 255, -1, 1 << 40])
def test_a_budget_that_nobody_can_keep_is_refused(cells: int) -> None:
    (error,) = opened(driver(), pruning=Pruning(cells))
    assert isinstance(error, StageError)
    assert error.error.code == "bad_parameter"


def test_a_pruned_session_has_no_blocks() -> None:
    (error,) = opened(driver(), root=bytes(32))
    assert isinstance(error, StageError)
    assert error.error.code == "bad_parameter"


@given(st.integers(256, 700), st.integers(1, 300))
def test_cells_held_stay_near_the_budget(cells: int, tokens: int) -> None:
    stage = driver()
    stage.at["s"] = (0, 0)
    pruning = Pruning(cells)
    opened(stage, pruning=pruning)
    stage.step("s", 512)
    ran(stage)
    held = list(range(PROMPT))
    for _ in range(tokens):
        held.append(stage.at["s"][1])
        stage.step("s")
        ran(stage)
        turn = stage.core.pruning.next_turn()
        if turn is None:
            assert not due(pruning, len(held), held[-1] + 1)
            continue
        (prune, _) = stage.core.pruning.plan(turn, attention(np.array(held)))
        assert isinstance(prune, PruneSequence)
        kept = [at for start, stop in prune.keep for at in range(start, stop)]
        assert set(kept) <= set(held)
        assert kept[-WINDOW:] == held[-WINDOW:]
        assert len(kept) == budget(pruning, held[-1] + 1)
        held = kept


def test_guesses_that_are_not_settled_wait_for_their_turn() -> None:
    stage = driver(1)
    prompted(stage)
    session = stage.core._sessions[SessionId("s")]
    session.end = PROMPT + 200
    child = Step(SessionId("s"), MODEL, EPOCH, 1, 9, PROMPT + 190, 10, sample=True, drafts=9)
    child = msgspec.structs.replace(child, parent=8, settled=session.end - WINDOW)
    stage.core.pruning.computed(session, child)
    assert not stage.core.pruning.has_turn
    child = msgspec.structs.replace(child, settled=session.end - WINDOW + 1)
    stage.core.pruning.computed(session, child)
    assert stage.core.pruning.has_turn


def pruned(stage: Driver) -> tuple[int, ...]:
    """Give up cells of session "s" and return where later steps must not go back to."""
    prompted(stage)
    for _ in range(WINDOW + 2):
        stage.step("s")
        ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    ops = stage.core.pruning.plan(turn, attention(np.arange(turn.session.end)))
    assert ops
    return tuple(range(turn.session.end - WINDOW - 1, turn.session.end - WINDOW + 1))


def test_a_session_that_took_up_guesses_while_it_waited_is_due_again_later() -> None:
    stage = driver(1)
    prompted(stage)
    stage.step("s")
    ran(stage)
    session = stage.core._sessions[SessionId("s")]
    assert stage.core.pruning.has_turn
    settled = session.end
    session.end += WINDOW  # guesses of guesses, none of which is settled
    child = Step(SessionId("s"), MODEL, EPOCH, 1, 9, settled, 10, sample=True, drafts=9)
    child = msgspec.structs.replace(child, parent=8, settled=settled)
    stage.core.pruning.computed(session, child)
    assert stage.core.pruning.next_turn() is None
    stage.core.pruning.computed(session, msgspec.structs.replace(child, settled=settled + 1))
    assert stage.core.pruning.next_turn() is not None


def test_no_step_goes_back_to_where_cells_are_gone() -> None:
    for at in (0, 1):
        stage = driver(1)
        floor = pruned(stage)
        assert errors(stage.step("s", position=floor[at])) == [(HEAD, "s", "out_of_order")]
    stage = driver(1)
    assert stage.step("s", position=pruned(stage)[1] + 1) == []


def test_a_step_that_waits_and_goes_back_far_keeps_its_session_whole() -> None:
    stage = driver(1)
    prompted(stage)
    for _ in range(WINDOW + 2):
        stage.step("s")
        ran(stage)
    turn = stage.core.pruning.next_turn()
    assert turn is not None
    floor = turn.session.end - WINDOW
    assert stage.step("s", position=floor) == []
    assert stage.core.pruning.plan(turn, attention(np.arange(turn.session.end))) == ()
    assert stage.core.pruning.cells == turn.session.evicted == 0


@pytest.mark.parametrize("number", [-1, 2**53 + 1, 2**64 - 1])
@pytest.mark.parametrize("field", ["spent", "settled", "held", "cells", "bytes"])
def test_a_step_with_a_number_that_cannot_be_is_refused(field: str, number: int) -> None:
    stage = driver(1)
    prompted(stage)
    message = Step(SessionId("s"), MODEL, EPOCH, 1, 2, PROMPT, 1, sample=True)
    if field in Evicted.__struct_fields__:
        what: dict[str, object] = {"evicted": Evicted(**{field: number})}
    else:
        what = {field: number}
    message = msgspec.structs.replace(message, **what)
    tail = pack_tail(np.zeros(1, np.int32), np.ones((1, 2), np.float32))
    out = stage.core.receive(stage.sender, message, tail, 0.0)
    assert errors(out) == [(HEAD, "s", "malformed_step")]


def test_a_runner_that_failed_prunes_no_session_that_opens_later() -> None:
    stage = driver()
    stage.core.pruning.failed()
    prompted(stage)
    stage.step("s")
    ran(stage)
    assert not stage.core.pruning.has_turn


def test_steps_carry_nothing_more_where_nobody_prunes() -> None:
    assert b"evicted" not in PIPE_CODEC.encode(
        Step(SessionId("s"), MODEL, EPOCH, 0, 0, 0, 1, sample=True)
    )
