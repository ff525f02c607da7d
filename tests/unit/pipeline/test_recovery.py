"""Patience with failing ranks, and the steps that feed a journal again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    RunnerFailed,
    Unavailable,
)
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK
from pyagent_node.inference.pipeline.attempt import Attempt
from pyagent_node.inference.pipeline.flights import Route
from pyagent_node.inference.pipeline.frames import OpenSession, Result, Step, unpack_tail
from pyagent_node.inference.pipeline.recovery import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    MAX_DEATHS,
    MAX_FUTILE,
    READY_SECONDS,
    RECOVERY_SECONDS,
    Patience,
)
from pyagent_node.inference.pipeline.stage_types import MAX_STEPS_PER_SESSION
from pyagent_node.inference.sampling import Sampled, SamplingParams

LOST = Unavailable("gone", code="peer_lost")


def forgives(
    patience: Patience,
    error: PyAgentError,
    now: float = 0.0,
    epoch: int = 1,
    *,
    begun: bool = True,
    got: bool = False,
    held: bool = False,
) -> bool:
    """Hand in an error."""
    return patience.forgives(error, epoch=epoch, begun=begun, got=got, held=held, now=now)


@pytest.mark.parametrize(
    ("error", "fresh", "begun"),
    [
        (LOST, True, True),
        (Conflict("x", code="stale_epoch"), True, True),
        (Unavailable("x", code="stage_not_ready"), True, True),
        (Unavailable("x", code="stream_closed"), True, True),
        (RunnerFailed("x", reason="SIGKILL"), True, True),
        (RunnerFailed("x", code="runner_protocol"), True, True),
        (LimitExceeded("x", code="too_many_sessions"), False, True),
        (LimitExceeded("x", code="too_many_steps"), False, True),
        (LimitExceeded("x", code="kv_full"), False, False),
        (InvalidRequest("x", code="bad_parameter"), False, False),
        (CorruptData("x", code="bad_result"), False, False),
        (CorruptData("x", code="not_finite"), False, False),
    ],
)
def test_only_what_other_ranks_can_cure_is_waited_for(
    error: PyAgentError, fresh: bool, begun: bool
) -> None:
    assert forgives(Patience(0.0), error, begun=False) == fresh
    assert forgives(Patience(0.0), error, begun=True) == begun


def test_an_idle_session_is_only_forgiven_where_its_reader_was_there() -> None:
    idle = Unavailable("x", code="session_idle")
    assert forgives(Patience(0.0), idle)
    assert not forgives(Patience(0.0), idle, held=True)


def test_pauses_grow_and_begin_anew_with_an_epoch_or_a_token() -> None:
    patience = Patience(0.0)
    pauses = []
    for _ in range(10):
        assert forgives(patience, LOST, 1.0)
        pauses.append(patience.retry_at - 1.0)
    assert pauses[0] == pytest.approx(FIRST_PAUSE)
    assert all(a <= b for a, b in itertools.pairwise(pauses))
    assert pauses[-1] == LONGEST_PAUSE
    forgives(patience, LOST, 1.0, epoch=2)
    assert patience.retry_at - 1.0 == pytest.approx(FIRST_PAUSE)
    forgives(patience, LOST, 1.0, epoch=2)
    patience.cured()
    assert patience.error is None
    forgives(patience, LOST, 1.0, epoch=2)
    assert patience.retry_at - 1.0 == pytest.approx(FIRST_PAUSE)


def test_a_request_waits_less_than_an_answer_that_has_begun() -> None:
    patience = Patience(5.0)
    assert forgives(patience, LOST, 6.0, begun=False)
    assert patience.until == 5.0 + READY_SECONDS
    assert not forgives(patience, LOST, 5.0 + READY_SECONDS, begun=False)
    patience = Patience(5.0)
    assert forgives(patience, LOST, 1000.0, got=True)
    assert patience.until == 1000.0 + RECOVERY_SECONDS
    assert forgives(patience, LOST, 1100.0)
    assert patience.until == 1000.0 + RECOVERY_SECONDS
    assert forgives(patience, LOST, 1110.0, got=True)
    assert not forgives(patience, LOST, 1110.0 + RECOVERY_SECONDS)


def test_the_first_error_of_an_outage_is_the_one_that_is_told() -> None:
    patience = Patience(0.0)
    dead = RunnerFailed("killed")
    forgives(patience, dead, got=True)
    forgives(patience, LOST)
    assert patience.error is dead
    forgives(patience, LOST, got=True)
    assert patience.error is LOST


@pytest.mark.parametrize(
    ("error", "got", "limit"), [(RunnerFailed("x"), False, MAX_DEATHS), (LOST, True, MAX_FUTILE)]
)
def test_attempts_that_lead_nowhere_are_counted(error: PyAgentError, got: bool, limit: int) -> None:
    patience = Patience(0.0)
    for _ in range(2):
        for _ in range(limit):
            assert forgives(patience, error, got=got)
        patience.cured()
    for _ in range(limit):
        assert forgives(patience, error, got=got)
    assert not forgives(patience, error, got=got)
    assert f"no progress in {limit + 1} attempts" in error.message


# ---- attempts --------------------------------------------------------------------------------


def attempt(prompt: int, answer: int, ranks: int = 3) -> tuple[Attempt, list[Sampled]]:
    """Return an attempt and its answer so far."""
    placement = Placement(
        Digest("a" * 64),
        4,
        tuple(Rank(r, Slice(r, r + 1, r == ranks - 1), PeerId(f"p{r}")) for r in range(ranks)),
        100_000,
        1,
    )
    route = Route(SessionId("w"), PeerId("head"), placement, SamplingParams())
    tokens = [Sampled(1000 + i) for i in range(answer)]
    ids = np.arange(prompt, dtype=np.int32)
    return Attempt(route, ids, tokens, prompt + answer + 50, None, 0.0), tokens


@given(
    prompt=st.integers(1, 3 * PREFILL_CHUNK),
    answer=st.integers(0, 70),
    ranks=st.integers(1, 4),
    hold=st.booleans(),
)
def test_a_replay_feeds_the_journal_once_in_order_and_samples_at_its_end(
    prompt: int, answer: int, ranks: int, hold: bool
) -> None:
    one, tokens = attempt(prompt, answer, ranks)
    hold = hold and answer > 0
    tail = PeerId(f"p{ranks - 1}")
    fed: list[int] = []
    steps: list[Step] = []
    done = 0
    while True:
        while (chunk := one.next_chunk(hold=hold)) is not None:
            out = one.send_chunk(chunk, None, 1.0)
            assert isinstance(out.message, Step)
            steps.append(out.message)
            fed += unpack_tail(out.tail, out.message.n, 1)[0].tolist()
            assert len(steps) - done <= MAX_STEPS_PER_SESSION
        if done == len(steps):
            break
        step = steps[done]
        assert one.computed == step.position
        sampled = Sampled(7) if step.sample else None
        got = () if sampled is None else (sampled,)
        result = Result(SessionId("w"), Digest("a" * 64), 4, ranks - 1, done, 0.0, got)
        landed = one.on_result(tail, result, 2.0)
        assert (None if landed is None else landed.sampled) == (got or None)
        done += 1
        if sampled is not None:
            break
    total = prompt + answer - hold
    assert fed == [*range(prompt), *(s.token for s in tokens)][:total]
    assert [s.step for s in steps] == list(range(len(steps)))
    assert [s.sample for s in steps] == [False] * (len(steps) - 1) + [not hold]
    assert one.computed == total
    assert not one.waiting
    for step in steps:
        end = step.position + step.n
        if end <= prompt:  # the chunks of the first time
            assert step.position % PREFILL_CHUNK == 0
            assert end == prompt or end % PREFILL_CHUNK == 0
        else:
            assert step.position >= prompt
            assert step.n <= MAX_DECODE_ROWS


def test_several_steps_of_a_replay_are_under_way_at_once() -> None:
    one, _ = attempt(1, 200)
    sent = 0
    while (chunk := one.next_chunk()) is not None:
        one.send_chunk(chunk, None, 0.0)
        sent += 1
    assert sent == MAX_STEPS_PER_SESSION


def test_an_attempt_opens_and_closes_under_its_own_id() -> None:
    one, _ = attempt(10, 5)
    opening = one.open().message
    assert isinstance(opening, OpenSession)
    assert (opening.session, opening.epoch, opening.prompt_tokens) == ("w", 4, 10)
    assert opening.positions == 65
    assert [(o.peer, o.message.session) for o in one.close()] == [
        ("p0", "w"),
        ("p1", "w"),
        ("p2", "w"),
    ]
