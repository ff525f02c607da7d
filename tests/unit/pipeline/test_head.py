"""The core of a session at its head: prefill window, tokens, ends, and who is believed."""

from __future__ import annotations

import numpy as np
import pytest

from pyagent_node.base.errors import CorruptData, ErrorInfo, PyAgentError, RunnerFailed, Unavailable
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.backend import PREFILL_CHUNK, Activations, Tokens
from pyagent_node.inference.generation import Finished, Generated, GenerationEvent
from pyagent_node.inference.kv.budgets import Evicted
from pyagent_node.inference.pipeline.frames import (
    CloseSession,
    OpenSession,
    Result,
    StageError,
    Step,
    unpack_tail,
)
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.shown import RUN_AHEAD
from pyagent_node.inference.pipeline.stage_types import Outgoing
from pyagent_node.inference.sampling import Sampled, SamplingParams

N_EMBD = 3
HEAD, TAIL = PeerId("head"), PeerId("p2")
END = 255
VOCABULARY = Vocabulary(
    pieces=(*(bytes([i]) for i in range(255)), b""), end_tokens=frozenset({END})
)


def embed(tokens: Tokens) -> Activations:
    """Return rows that show their token."""
    rows: Activations = np.repeat(tokens[:, None], N_EMBD, axis=1).astype(np.float32)
    return rows


def start(
    prompt: int = 3,
    *,
    ranks: int = 3,
    budget: int = 100,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    n_ctx: int = 4096,
) -> HeadCore:
    """Return a session with ``prompt`` tokens, at time 10."""
    placement = Placement(
        model=Digest("a" * 64),
        epoch=4,
        ranks=tuple(
            Rank(r, Slice(r, r + 1, r == ranks - 1), PeerId(f"p{r}")) for r in range(ranks)
        ),
        n_ctx=n_ctx,
        n_seq=1,
    )
    plan = HeadPlan(
        session=SessionId("stable"),
        head=HEAD,
        model=placement.model,
        budget=budget,
        stop=stop,
        ignore_eos=ignore_eos,
        sampling=SamplingParams(seed=3),
    )
    tokens = np.arange(prompt, dtype=np.int32) % 250
    core = HeadCore(plan, tokens, VOCABULARY, 10.0)
    core.begin(SessionId("s"), placement, None if ranks == 1 else embed, 10.0)
    return core


def send_prompt(core: HeadCore) -> list[Step]:
    """Send every chunk that may go now."""
    sent = []
    while (chunk := core.next_chunk()) is not None:
        assert core.attempt is not None
        out = core.attempt.send_chunk(chunk, None, 10.0)
        assert isinstance(out.message, Step)
        sent.append(out.message)
    return sent


def result(
    core: HeadCore,
    step: int,
    token: int | None = None,
    *,
    sender: PeerId = TAIL,
    now: float = 11.0,
    sampled: Sampled | None = None,
) -> Outgoing | None:
    """Hand in a result."""
    if token is not None:
        sampled = Sampled(token)
    got = () if sampled is None else (sampled,)
    message = Result(SessionId("s"), Digest("a" * 64), 4, 2, step, 0.25, got)
    out = core.on_result(sender, message, now)
    assert len(out) <= 1
    return out[0] if out else None


def events(core: HeadCore, now: float = 12.0) -> list[GenerationEvent]:
    """Take all events."""
    taken = []
    while (event := core.take(now)[0]) is not None:
        taken.append(event)
    return taken


def test_the_opening_carries_what_every_rank_needs() -> None:
    core = start(3, budget=5)
    assert core.attempt is not None
    out = core.attempt.open()
    assert out.peer == "p0"
    assert out.message == OpenSession(
        SessionId("s"), Digest("a" * 64), 4, 0, HEAD, 8, 3, SamplingParams(seed=3)
    )


def test_a_token_goes_out_again_as_the_next_step_before_it_is_read() -> None:
    core = start(3)
    (step,) = send_prompt(core)
    assert (step.step, step.position, step.n, step.sample) == (0, 0, 3, True)
    out = result(core, 0, 65)
    assert out is not None
    assert out.peer == "p0"
    assert isinstance(out.message, Step)
    assert (out.message.step, out.message.position, out.message.n) == (1, 3, 1)
    tokens, rows = unpack_tail(out.tail, 1, N_EMBD)
    assert tokens.tolist() == [65]
    assert rows is not None
    assert rows.tolist() == [[65.0] * 3]
    (event,) = events(core)
    assert event == Generated(token=65, text="A", piece=b"A")


def test_a_whole_model_gets_tokens_alone() -> None:
    core = start(2, ranks=1)
    send_prompt(core)
    out = result(core, 0, 65, sender=PeerId("p0"))
    assert out is not None
    assert len(out.tail) == 4


def test_a_long_prompt_goes_in_chunks_within_a_window_and_only_the_last_samples() -> None:
    n = 6 * PREFILL_CHUNK + 7
    core = start(n, ranks=2, n_ctx=8192)
    sent = send_prompt(core)
    assert len(sent) == 3
    done = 0
    while done < 7:
        assert result(core, done, sender=PeerId("p1")) is None
        done += 1
        sent += send_prompt(core)
        assert len(sent) == min(7, done + 3)
        if len(sent) == 7 and done == 6:
            break
    assert [s.n for s in sent] == [PREFILL_CHUNK] * 6 + [7]
    assert [s.position for s in sent] == [i * PREFILL_CHUNK for i in range(7)]
    assert [s.sample for s in sent] == [False] * 6 + [True]
    out = result(core, 6, 66, sender=PeerId("p1"))
    assert out is not None
    assert isinstance(out.message, Step)
    assert out.message.position == n


def test_times_and_counts() -> None:
    core = start(3, budget=3)
    send_prompt(core)
    result(core, 0, 65, now=12.0)
    result(core, 1, 66, now=13.0)
    assert result(core, 2, 67, now=14.5) is None
    *tokens, last = events(core)
    assert [t.text for t in tokens] == ["A", "B", "C"]
    assert isinstance(last, Finished)
    assert (last.reason, last.text) == ("length", "")
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)
    assert (last.usage.ttft_seconds, last.usage.seconds) == (2.0, 4.5)
    assert last.usage.tokens_per_second == pytest.approx(2 / 2.5)
    second = tokens[1]
    assert isinstance(second, Generated)
    assert (second.step_seconds, second.compute_seconds) == (1.0, 0.25)
    assert core.over


def test_an_end_token_is_not_shown() -> None:
    core = start()
    send_prompt(core)
    result(core, 0, 65)
    assert result(core, 1, END) is None
    first, last = events(core)
    assert isinstance(first, Generated)
    assert isinstance(last, Finished)
    assert (last.reason, last.usage.completion_tokens) == ("stop", 1)


def test_an_answer_may_be_empty() -> None:
    core = start()
    send_prompt(core)
    result(core, 0, END)
    (last,) = events(core)
    assert isinstance(last, Finished)
    assert last.usage.completion_tokens == 0
    assert last.usage.tokens_per_second == 0.0


def test_end_tokens_can_be_ignored() -> None:
    core = start(ignore_eos=True)
    send_prompt(core)
    assert result(core, 0, END) is not None
    (event,) = events(core)
    assert event == Generated(token=END, text="", piece=b"")


def test_a_stop_string_over_two_tokens_ends_the_answer() -> None:
    core = start(stop=("BC",))
    send_prompt(core)
    for step, char in enumerate("AB"):
        result(core, step, ord(char))
    assert result(core, 2, ord("C")) is None
    *tokens, last = events(core)
    assert [t.text for t in tokens] == ["A", "", ""]
    assert isinstance(last, Finished)
    assert (last.reason, last.text) == ("stop", "")


def test_held_back_text_comes_with_the_end() -> None:
    core = start(stop=("BC",), budget=2)
    send_prompt(core)
    result(core, 0, ord("A"))
    result(core, 1, ord("B"))
    last = events(core)[-1]
    assert isinstance(last, Finished)
    assert (last.reason, last.text) == ("length", "B")


def test_a_lagging_reader_stops_the_session_and_starts_it_again() -> None:
    core = start(budget=1000)
    send_prompt(core)
    step = 0
    while result(core, step, 65) is not None:
        step += 1
    assert step == RUN_AHEAD - 1
    assert send_prompt(core) == []
    rooms = []
    for _ in range(RUN_AHEAD):
        event, room = core.take(20.0)
        assert event is not None
        rooms.append(room)
    assert rooms.count(True) == 1
    (again,) = send_prompt(core)
    assert (again.step, again.n, again.sample) == (RUN_AHEAD, 1, True)
    assert result(core, RUN_AHEAD, 66) is not None


def test_logprobs_come_with_the_bytes_of_the_alternatives() -> None:
    core = start()
    send_prompt(core)
    result(core, 0, sampled=Sampled(65, -0.5, ((65, -0.5), (66, -1.5))))
    (event,) = events(core)
    assert isinstance(event, Generated)
    assert event.logprob == -0.5
    top = [(t.token, t.piece, t.logprob) for t in event.top]
    assert top == [(65, b"A", -0.5), (66, b"B", -1.5)]


# ---- ends and errors -------------------------------------------------------------------------


def test_closing_tells_every_rank_directly() -> None:
    core = start()
    send_prompt(core)
    outs = core.close()
    assert [o.peer for o in outs] == ["p0", "p1", "p2"]
    assert [o.message for o in outs] == [
        CloseSession(SessionId("s"), Digest("a" * 64), 4, r) for r in range(3)
    ]
    assert result(core, 0, 65) is None
    assert core.next_chunk() is None


def fault(rank: int, error: ErrorInfo) -> StageError:
    """Return the error of a rank."""
    return StageError(SessionId("s"), Digest("a" * 64), 4, rank, PeerId(f"p{rank}"), error)


def test_a_dead_runner_is_named_with_rank_node_and_reason_after_the_tokens_before() -> None:
    core = start()
    send_prompt(core)
    result(core, 0, 65)
    info = RunnerFailed("It was killed by SIGKILL.", reason="SIGKILL").to_info()
    assert len(core.on_error(PeerId("p1"), fault(1, info), 11.0)) == 3
    event, _ = core.take(12.0)
    assert isinstance(event, Generated)
    assert core.take(12.0) == (None, False)
    core.give_up()
    with pytest.raises(RunnerFailed, match="runner of rank 1 on node p1 failed: It") as c:
        core.take(12.0)
    assert c.value.facts == {"reason": "SIGKILL", "rank": 1, "peer_id": "p1"}


def test_the_error_of_a_stranger_is_not_believed() -> None:
    core = start()
    error = fault(1, ErrorInfo("conflict", "stale_epoch", "x"))
    assert core.on_error(PeerId("stranger"), error, 11.0) == []
    assert core.attempt is not None
    assert not core.over


@pytest.mark.parametrize(("step", "token"), [(1, 65), (-1, 65), (0, 256), (0, -1), (0, None)])
def test_a_result_that_does_not_belong_ends_the_session(step: int, token: int | None) -> None:
    core = start()
    send_prompt(core)
    assert result(core, step, token) is None
    with pytest.raises(CorruptData) as caught:
        core.take(11.0)
    assert caught.value.code == "bad_result"


@pytest.mark.parametrize("sender", ["p1", "stranger"])
def test_a_result_of_another_than_the_tail_is_ignored(sender: str) -> None:
    core = start()
    send_prompt(core)
    assert result(core, 0, 65, sender=PeerId(sender)) is None
    assert core.take(11.0) == (None, False)
    assert result(core, 0, 66) is not None


def test_a_result_before_any_step_is_refused() -> None:
    core = start()
    assert result(core, 0, 65) is None
    with pytest.raises(CorruptData):
        core.take(11.0)


def test_an_unknown_alternative_is_refused() -> None:
    core = start()
    send_prompt(core)
    result(core, 0, sampled=Sampled(65, -0.5, ((999, -0.5),)))
    with pytest.raises(CorruptData):
        core.take(11.0)


def test_a_lost_rank_is_named() -> None:
    core = start()
    assert core.peer_down(PeerId("elsewhere"), 11.0) == []
    assert [o.peer for o in core.peer_down(PeerId("p1"), 11.0)] == ["p0", "p1", "p2"]
    assert core.next_chunk() is None
    core.give_up()
    with pytest.raises(Unavailable) as caught:
        core.take(11.0)
    assert caught.value.code == "peer_lost"
    assert caught.value.facts == {"rank": 1, "peer_id": "p1"}


def test_the_first_error_counts() -> None:
    core = start()
    core.fail(Unavailable("first"))
    core.fail(PyAgentError("second"))
    with pytest.raises(Unavailable, match="first"):
        core.take(11.0)


@pytest.mark.parametrize("evicted", [Evicted(-1), Evicted(0, 2**53 + 1), Evicted(0, 0, 2**64 - 1)])
def test_counts_of_cells_that_cannot_be_end_the_session(evicted: Evicted) -> None:
    core = start(3)
    send_prompt(core)
    message = Result(
        SessionId("s"), Digest("a" * 64), 4, 2, 0, 0.25, (Sampled(65),), evicted=evicted
    )
    assert core.on_result(TAIL, message, 11.0) == ()
    with pytest.raises(CorruptData) as caught:
        events(core)
    assert caught.value.code == "bad_result"
