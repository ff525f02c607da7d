"""The core of a stage: admission, fence, order, limits, and who may do what."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_node.base.errors import ErrorInfo, RunnerFailed
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import FreeSequence, OpenSequence, StepOutput
from pyagent_node.inference.pipeline.frames import (
    OpenSession,
    StageError,
    Step,
    unpack_tail,
)
from pyagent_node.inference.pipeline.stage_types import StageLimits
from pyagent_node.inference.sampling import Sampled, SamplingParams

from .stage_driver import (
    AFTER,
    BEFORE,
    EPOCH,
    HEAD,
    HERE,
    MODEL,
    N_EMBD,
    N_VOCAB,
    Driver,
    errors,
    names,
    results,
    spec,
)


def test_a_step_goes_on_to_the_next_rank_with_the_new_activations() -> None:
    driver = Driver(spec(rank=1))
    (opened,) = driver.open("a", prompt_tokens=3)
    assert opened.peer == AFTER
    assert isinstance(opened.message, OpenSession)
    assert (opened.message.rank, opened.message.head) == (2, HEAD)
    driver.step("a", 3, token=9)
    batch = driver.batch()
    assert batch.ops == (OpenSequence(0, None),)
    assert batch.inputs[0].position == 0
    assert batch.inputs[0].tokens.tolist() == [9, 9, 9]
    (out,) = driver.run(batch, seconds=0.5)
    assert out.peer == AFTER
    assert isinstance(out.message, Step)
    assert (out.message.rank, out.message.n, out.message.spent) == (2, 3, 0.5)
    tokens, rows = unpack_tail(out.tail, 3, N_EMBD)
    assert tokens.tolist() == [9, 9, 9]
    assert rows is not None
    assert rows.tolist() == [[2, 2]] * 3
    assert driver.core.next_batch() is None


def test_the_tail_answers_the_head_and_knows_the_sampling() -> None:
    driver = Driver(spec(rank=2))
    sampling = SamplingParams(seed=5, temperature=0.8)
    assert driver.open("a", prompt_tokens=2, sampling=sampling) == []
    driver.step("a", 1, sample=False)
    driver.step("a", 1)
    batch = driver.batch()
    assert batch.ops == (OpenSequence(0, sampling),)
    (out,) = driver.run(batch)
    assert out.peer == HEAD
    (first,) = results([out])
    assert first.sampled == ()
    (second,) = results(driver.run(driver.batch()))
    assert second.sampled == (Sampled(5),)
    assert second.step == 1
    (session,) = driver.core.sessions()
    assert session.generated == 1


def test_a_whole_model_takes_tokens_without_activations() -> None:
    driver = Driver(spec(rank=0, ranks=1))
    driver.open("a")
    assert driver.step("a") == []
    assert driver.batch().inputs[0].activations is None
    with_rows = np.zeros(1 + N_EMBD, dtype=np.float32).tobytes()
    driver.open("b")
    assert errors(driver.step("b", tail=with_rows)) == [(HEAD, "b", "malformed_step")]


def test_a_slice_refuses_tokens_without_activations() -> None:
    driver = Driver(spec(rank=1))
    driver.open("a")
    assert errors(driver.step("a", tail=bytes(4))) == [(HEAD, "a", "malformed_step")]


# ---- fence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
def test_another_epoch_is_answered_with_ours_and_causes_no_work(epoch: int) -> None:
    driver = Driver(spec())
    (out,) = driver.open("a", epoch=epoch)
    assert errors([out]) == [(HEAD, "a", "stale_epoch")]
    assert isinstance(out.message, StageError)
    assert out.message.error.facts["epoch"] == EPOCH
    assert errors(driver.step("a", epoch=epoch)) == [(BEFORE, "a", "stale_epoch")]
    assert not driver.core.has_work


def test_a_step_of_an_unknown_session_is_answered_to_its_sender() -> None:
    driver = Driver(spec())
    assert errors(driver.step("a")) == [(BEFORE, "a", "session_unknown")]


def test_the_error_of_the_next_rank_is_passed_on_to_the_head() -> None:
    driver = Driver(spec())
    driver.open("a")
    message = StageError(
        SessionId("a"), MODEL, EPOCH, 2, AFTER, ErrorInfo("not_found", "session_unknown", "?")
    )
    assert driver.core.receive(PeerId("stranger"), message, b"", 0.0) == []
    (out,) = driver.core.receive(AFTER, message, b"", 0.0)
    assert (out.peer, out.message) == (HEAD, message)
    assert not driver.core.holds(SessionId("a"))


# ---- slots -----------------------------------------------------------------------------------


def test_sessions_wait_for_slots_in_order_of_arrival() -> None:
    driver = Driver(spec(n_seq=1))
    for name in "abc":
        driver.open(name)
        driver.step(name)
    assert driver.core.view().waiting == 2
    batch = driver.batch()
    assert names(batch) == ["a"]
    driver.run(batch)
    assert driver.core.next_batch() is None
    driver.close("a")
    batch = driver.batch()
    assert batch.ops == (FreeSequence(0), OpenSequence(0, None))
    assert names(batch) == ["b"]


def test_a_session_that_waits_can_be_closed() -> None:
    driver = Driver(spec(n_seq=1))
    for name in "abc":
        driver.open(name)
        driver.step(name)
    driver.close("b")
    driver.close("a")
    assert names(driver.batch()) == ["c"]
    assert driver.core.view().queued == 0


def test_a_session_closed_while_it_is_computed_gives_its_slot_on_and_its_result_is_dropped() -> (
    None
):
    driver = Driver(spec(n_seq=1))
    driver.open("a")
    driver.step("a")
    driver.step("a")
    batch = driver.batch()
    driver.open("b")
    driver.step("b")
    driver.close("a")
    assert driver.run(batch) == []
    batch = driver.batch()
    assert batch.ops == (FreeSequence(0), OpenSequence(0, None))
    assert names(batch) == ["b"]
    assert batch.inputs[0].seq == 0


def test_closing_drops_queued_steps_and_what_is_still_on_its_way() -> None:
    driver = Driver(spec())
    driver.open("a")
    driver.step("a", 2, sample=False)
    driver.step("a")
    assert driver.close("a") == []
    assert driver.batch().inputs == ()
    assert driver.step("a") == []
    assert driver.open("a") == []
    assert driver.core.view().sessions == 0
    assert driver.close("a") == []


def test_a_close_that_overtakes_its_opening_wins() -> None:
    driver = Driver(spec())
    driver.close("a")
    assert driver.open("a") == []
    assert driver.step("a") == []
    assert not driver.core.has_work


def test_a_stranger_can_neither_close_nor_bury_anothers_session() -> None:
    driver = Driver(spec())
    driver.close("a", sender=PeerId("stranger"))
    assert len(driver.open("a")) == 1
    driver.close("a", sender=PeerId("stranger"))
    assert driver.core.holds(SessionId("a"))


def test_the_memory_of_closed_sessions_is_bounded() -> None:
    driver = Driver(spec(), StageLimits(tombstones=2))
    for name in "abc":
        driver.close(name)
    assert len(driver.open("a")) == 1
    assert driver.open("c") == []


# ---- senders and contents --------------------------------------------------------------------


def test_sessions_come_through_the_rank_before_only() -> None:
    driver = Driver(spec(rank=1))
    assert errors(driver.open("a", sender=HEAD)) == [(HEAD, "a", "wrong_sender")]
    driver.open("b")
    assert errors(driver.step("b", sender=HEAD)) == [(HEAD, "b", "wrong_sender")]
    assert driver.core.holds(SessionId("b"))


def test_at_rank_0_a_session_is_its_heads() -> None:
    driver = Driver(spec(rank=0))
    assert errors(driver.open("a", head=HEAD, sender=AFTER)) == [(AFTER, "a", "wrong_sender")]
    driver.open("a")
    assert errors(driver.step("a", sender=AFTER)) == [(AFTER, "a", "wrong_sender")]


@pytest.mark.parametrize(
    ("kwargs", "code"),
    [
        ({"step": 1}, "out_of_order"),
        ({"position": 1}, "out_of_order"),
        ({"position": -1}, "out_of_order"),
        ({"n": 0, "tail": b""}, "step_too_long"),
        ({"n": 513}, "step_too_long"),
        ({"n": 21}, "step_too_long"),
        ({"n": -5, "tail": b""}, "step_too_long"),
        ({"tail": b"12345"}, "malformed_step"),
        ({"token": -1}, "bad_parameter"),
        ({"token": N_VOCAB}, "bad_parameter"),
    ],
)
def test_a_wrong_step_ends_its_own_session_alone(kwargs: dict[str, int], code: str) -> None:
    driver = Driver(spec())
    driver.open("good")
    driver.open("bad", positions=20)
    assert errors(driver.step("bad", **kwargs)) == [(HEAD, "bad", code)]  # type: ignore[arg-type]
    assert driver.step("bad") == []
    driver.step("good")
    assert names(driver.batch()) == ["good"]


@pytest.mark.parametrize(
    ("kwargs", "code"),
    [
        ({"positions": 5000}, "bad_parameter"),
        ({"positions": 0}, "bad_parameter"),
        ({"prompt_tokens": 0}, "bad_parameter"),
        ({"prompt_tokens": 30, "positions": 20}, "bad_parameter"),
        ({"sampling": SamplingParams(temperature=-1.0)}, "bad_parameter"),
        ({"sampling": SamplingParams(logit_bias={N_VOCAB: 1.0})}, "bad_parameter"),
    ],
)
def test_a_wrong_opening_is_refused(kwargs: dict[str, int], code: str) -> None:
    driver = Driver(spec(rank=2))
    assert errors(driver.open("a", **kwargs)) == [(HEAD, "a", code)]  # type: ignore[arg-type]
    assert driver.step("a") == []
    assert driver.core.view().refused == 1


def test_opening_a_session_twice_is_refused() -> None:
    driver = Driver(spec())
    driver.open("a")
    assert errors(driver.open("a")) == [(HEAD, "a", "session_exists")]


# ---- limits ----------------------------------------------------------------------------------


def test_sessions_are_limited_for_each_head_and_in_all() -> None:
    driver = Driver(spec(), StageLimits(sessions=3, sessions_per_peer=2))
    other, third = PeerId("other"), PeerId("third")
    driver.open("a")
    driver.open("b")
    assert errors(driver.open("c")) == [(HEAD, "c", "too_many_sessions")]
    assert len(driver.open("d", head=other)) == 1
    assert errors(driver.open("e", head=third)) == [(third, "e", "too_many_sessions")]
    driver.close("a")
    assert len(driver.open("f", head=third)) == 1


def test_queued_steps_and_bytes_are_limited() -> None:
    for limits in (
        StageLimits(steps_per_session=2),
        StageLimits(queued_steps=2),
        StageLimits(queued_bytes=30),
    ):
        driver = Driver(spec(), limits)
        driver.open("a")
        assert driver.step("a") == []
        assert driver.step("a") == []
        assert errors(driver.step("a")) == [(HEAD, "a", "too_many_steps")]
        assert driver.core.view().queued == 0


# ---- turns -----------------------------------------------------------------------------------


def test_tokens_are_batched_up_to_the_width_and_the_longest_waiting_go_first() -> None:
    driver = Driver(spec(n_seq=3, width=2))
    for name in "abc":
        driver.open(name)
        driver.step(name)
    first = driver.batch()
    assert names(first) == ["a", "b"]
    driver.run(first)
    driver.step("b")
    assert names(driver.batch()) == ["c", "b"]


def test_a_prefill_chunk_is_computed_alone_and_takes_turns_with_tokens() -> None:
    driver = Driver(spec(n_seq=4))
    for name in "abcd":
        driver.open(name)
    for name in "ab":
        driver.step(name, 5, sample=False)
        driver.step(name, 5, sample=False)
    for name in "cd":
        driver.step(name)
        driver.step(name)
    seen = []
    while driver.core.has_work:
        batch = driver.batch()
        seen.append("".join(names(batch)))
        driver.run(batch)
    assert seen == ["cd", "a", "cd", "b", "a", "b"]


def test_steps_of_one_session_never_share_a_batch() -> None:
    driver = Driver(spec())
    driver.open("a")
    for _ in range(3):
        driver.step("a")
    assert names(driver.batch()) == ["a"]
    assert driver.core.next_batch() is None


def test_the_lowest_free_slot_is_given_out_first() -> None:
    driver = Driver(spec(n_seq=4))
    for name in "abc":
        driver.open(name)
    driver.batch()
    driver.close("b")
    driver.close("a")
    driver.open("d")
    assert driver.batch().ops == (FreeSequence(1), FreeSequence(0), OpenSequence(0, None))


# ---- ends ------------------------------------------------------------------------------------


def test_a_head_that_is_gone_frees_its_sessions_only() -> None:
    driver = Driver(spec())
    driver.open("a")
    driver.open("b", head=PeerId("other"))
    assert driver.core.peer_down(HEAD) == []
    assert [s.session for s in driver.core.sessions()] == ["b"]


@pytest.mark.parametrize(("peer", "rank"), [(BEFORE, 0), (AFTER, 2)])
def test_a_lost_neighbour_ends_the_sessions_and_is_named(peer: PeerId, rank: int) -> None:
    driver = Driver(spec())
    driver.open("a")
    (out,) = driver.core.peer_down(peer)
    assert errors([out]) == [(HEAD, "a", "peer_lost")]
    assert isinstance(out.message, StageError)
    assert (out.message.rank, out.message.peer_id) == (rank, peer)


def test_a_lost_lane_ends_the_sessions_that_used_it() -> None:
    driver = Driver(spec())
    driver.open("a")
    driver.open("b", head=PeerId("other"))
    # What cannot reach the head goes through the rank before.
    assert errors(driver.core.link_lost(HEAD, control=True)) == [(BEFORE, "a", "stream_closed")]
    assert driver.core.link_lost(HEAD, control=False) == []
    assert driver.core.link_lost(AFTER, control=True) == []
    assert errors(driver.core.link_lost(AFTER, control=False)) == [("other", "b", "peer_lost")]


def test_a_dead_runner_ends_every_session_and_refuses_new_ones() -> None:
    driver = Driver(spec())
    driver.open("a")
    driver.step("a")
    driver.open("b", head=PeerId("other"))
    out = driver.core.stop(RunnerFailed("killed", reason="SIGKILL"))
    assert errors(out) == [(HEAD, "a", "runner_failed"), ("other", "b", "runner_failed")]
    message = out[0].message
    assert isinstance(message, StageError)
    assert (message.rank, message.peer_id) == (1, HERE)
    assert message.error.facts == {"reason": "SIGKILL"}
    assert errors(driver.open("c")) == [(HEAD, "c", "runner_failed")]
    assert not driver.core.has_work


def test_a_refused_batch_ends_its_sessions_only() -> None:
    driver = Driver(spec(width=1))
    driver.open("a")
    driver.open("b")
    driver.step("a")
    driver.step("b")
    batch = driver.batch()
    error = RunnerFailed("no", code="kv_full")
    assert errors(driver.core.abandoned(batch, error)) == [(HEAD, "a", "kv_full")]
    assert names(driver.batch()) == ["b"]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_runner_that_answers_nonsense_ends_the_session(rank: int) -> None:
    driver = Driver(spec(rank=rank))
    driver.open("a")
    driver.step("a")
    out = driver.core.completed(driver.batch(), [StepOutput()], 0.1, 0.0)
    assert errors(out) == [(HEAD, "a", "runner_protocol")]


def test_idle_sessions_expire_but_not_those_that_wait_for_us() -> None:
    driver = Driver(spec(n_seq=1), StageLimits(idle_seconds=10))
    driver.open("idle")
    driver.open("waits")
    driver.step("waits")
    assert driver.core.expire(9.9) == []
    assert errors(driver.core.expire(10.0)) == [(HEAD, "idle", "session_idle")]
    batch = driver.batch()
    assert names(batch) == ["waits"]
    assert driver.core.expire(100.0) == []
    driver.now = 100.0
    driver.run(batch)
    assert driver.core.expire(109.0) == []
    assert errors(driver.core.expire(110.0)) == [(HEAD, "waits", "session_idle")]
