"""The protocol between a head and a drafter rank, without a network: pure cores and frames."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    RunnerFailed,
    Unsupported,
)
from pyagent_node.base.types import Digest
from pyagent_node.base.wire import Frame
from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft
from pyagent_node.inference.drafting.remote_messages import (
    FROM_DRAFTER,
    MAX_AHEAD,
    MAX_DRAFT_HEADER,
    MAX_TOLD,
    TO_DRAFTER,
    Ask,
    AskerCore,
    DeskCore,
    Drafted,
    DraftRefused,
    NotNow,
    OpenDraft,
    Question,
    pack_tokens,
    read_frame,
    unpack_tokens,
)
from pyagent_node.inference.sampling import SamplingParams

EPOCH = 3
D = Digest("1" * 64)
TOKENS = st.lists(st.integers(0, (1 << 31) - 1), max_size=20)
NUMBERS = st.integers(-3, 70) | st.integers(-(1 << 63), 1 << 63)


def taken(core: DeskCore, ask: Ask, tokens: list[int]) -> Question | NotNow:
    return core.take(ask, pack_tokens(tokens), EPOCH)


def test_every_message_comes_back_as_it_was() -> None:
    sampling = SamplingParams(seed=2**64 - 1, logit_bias=dict.fromkeys(range(1024), -1.5))
    opening = OpenDraft(D, 1 << 40, D, sampling)
    assert read_frame(Frame(TO_DRAFTER.encode(opening))) == opening
    ask = Ask(1, 2, 3, 4, 5, 0.25)
    assert read_frame(Frame(TO_DRAFTER.encode(ask), b"abc")) == ask
    refused = DraftRefused(RunnerFailed("dead", reason="SIGKILL").to_info())
    for reply in (Drafted(1, 2, (3, 4), (0.5, 1.0)), NotNow(1, 2, 3), refused):
        assert FROM_DRAFTER.decode(FROM_DRAFTER.encode(reply)) == reply


@given(TOKENS)
def test_tokens_come_back_as_they_were(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens), most=20) == tokens


def test_what_is_no_list_of_tokens_is_refused() -> None:
    with pytest.raises(LimitExceeded) as many:
        unpack_tokens(bytes(44), most=10)
    assert many.value.code == "too_many_tokens"
    for tail in (b"abc", pack_tokens([5]) + b"\xff", b"\xff\xff\xff\xff"):
        with pytest.raises(CorruptData):
            unpack_tokens(tail, most=10)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_whatever_comes_in_is_refused_by_name(header: bytes, tail: bytes) -> None:
    core = DeskCore(100)
    with contextlib.suppress(PyAgentError):  # and nothing else
        message = read_frame(Frame(header, tail))
        if isinstance(message, Ask):
            core.take(message, tail, EPOCH)
    assert core.held <= 100


def test_headers_have_a_limit_of_their_own() -> None:
    with pytest.raises(LimitExceeded) as caught:
        read_frame(Frame(bytes(MAX_DRAFT_HEADER + 1)))
    assert caught.value.code == "frame_too_large"
    with pytest.raises(Unsupported) as strange:
        read_frame(Frame(FROM_DRAFTER.encode(NotNow(1, 2, 3))))
    assert strange.value.code == "unknown_message"


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(), TOKENS)
def test_numbers_of_any_kind_do_no_harm(
    request: int, epoch: int, start: int, ahead: int, limit: int, floor: float, tokens: list[int]
) -> None:
    core = DeskCore(64)
    assert isinstance(taken(core, Ask(1, EPOCH, 0, 0, 0), [7, 8, 9]), Question)
    try:
        question = taken(core, Ask(request, epoch, start, ahead, limit, floor), tokens)
    except PyAgentError:
        assert core.held == 3
        return
    if isinstance(question, NotNow):
        assert core.held == 3
        assert epoch != EPOCH or start > 3
        return
    assert core.held + len(question.ahead) + question.limit <= 64
    assert question.limit <= MAX_DRAFT
    assert 0.0 <= question.floor <= 1.0


def test_what_contradicts_is_refused() -> None:
    core = DeskCore(64)
    taken(core, Ask(1, EPOCH, 0, 0, 0), [7, 8, 9])
    again = taken(core, Ask(2, EPOCH, 1, 1, 4), [8, 9, 10, 50])
    assert again == Question(2, (10,), (50,), 4, 0.0)
    assert taken(core, Ask(3, EPOCH, 2, 0, 4), [9]) == Question(3, (), (), 4, 0.0)
    with pytest.raises(CorruptData) as caught:
        taken(core, Ask(3, EPOCH, 1, 0, 4), [5, 9])
    assert caught.value.code == "draft_contradicts"
    with pytest.raises(LimitExceeded) as full:
        taken(core, Ask(4, EPOCH, 4, 0, 4), [1] * 61)
    assert full.value.code == "kv_full"
    nearly = taken(core, Ask(4, EPOCH, 4, 0, 4), [1] * 58)
    assert isinstance(nearly, Question)
    assert nearly.limit == 2  # as many as there is room for
    with pytest.raises(InvalidRequest):
        taken(core, Ask(5, EPOCH, 0, 0, MAX_DRAFT + 1), [])


def test_a_long_history_is_told_in_parts() -> None:
    asker, desk = AskerCore(), DeskCore(3 * MAX_TOLD)
    asker.extend([5] * (2 * MAX_TOLD + 10))
    rounds = 0
    while asker.lags():
        ask, tail = asker.ask(EPOCH, [1, 2], 4, 0.0)
        assert (ask.ahead, ask.limit) == (0, 0)
        assert isinstance(desk.take(ask, tail, EPOCH), Question)
        asker.answer(ask, Drafted(ask.request, desk.held), "d")
        rounds += 1
    ask, tail = asker.ask(EPOCH, [1, 2], 4, 0.0)
    question = desk.take(ask, tail, EPOCH)
    assert isinstance(question, Question)
    assert (len(question.new), question.ahead, question.limit, rounds) == (10, (1, 2), 4, 2)
    with pytest.raises(LimitExceeded):
        asker.ask(EPOCH, [1] * (MAX_AHEAD + 1), 4, 0.0)


@pytest.mark.parametrize(
    "reply",
    [
        Drafted(1, 99),
        Drafted(1, -1),
        Drafted(2, 2),
        Drafted(1, 2, (1, 2, 3), (1.0, 1.0, 1.0)),
        Drafted(1, 2, (1,), ()),
        Drafted(1, 2, (1,), (0.5,), (-1,)),
        NotNow(1, 99, EPOCH),
    ],
)
def test_an_answer_that_cannot_be_one(reply: Drafted | NotNow) -> None:
    asker = AskerCore()
    asker.extend([7, 8])
    ask, _ = asker.ask(EPOCH, [], 2, 0.0)
    with pytest.raises(CorruptData):
        asker.answer(ask, reply, "d")


def test_what_the_rank_refuses_with_is_told() -> None:
    asker = AskerCore()
    ask, _ = asker.ask(EPOCH, [], 2, 0.0)
    with pytest.raises(RunnerFailed, match="The drafter d refused: dead"):
        asker.answer(ask, DraftRefused(RunnerFailed("dead", reason="x").to_info()), "d")
    assert asker.answer(ask, Drafted(0, 0), "d") is None  # of an earlier question


STEPS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 50), max_size=4),  # accepted since
        st.lists(st.integers(0, 50), max_size=3),  # in flight
        st.sampled_from(["arrives", "question lost", "answer lost", "twice", "other epoch"]),
    ),
    max_size=30,
)


@given(STEPS)
def test_both_agree_whatever_is_lost(steps: list[tuple[list[int], list[int], str]]) -> None:
    """What the rank holds is always the beginning of what was accepted, and soon all of it."""
    asker, desk = AskerCore(), DeskCore(1000)
    history: list[int] = []
    told: list[int] = []
    for accepted, ahead, fate in steps:
        asker.extend(accepted)
        history += accepted
        ask, tail = asker.ask(EPOCH, ahead, 4, 0.0)
        if fate == "question lost":
            continue
        epoch = EPOCH + (fate == "other epoch")
        for _ in range(2 if fate == "twice" else 1):
            taken_in = desk.take(ask, tail, epoch)
            if isinstance(taken_in, Question):
                told += taken_in.new
                assert taken_in.ahead == tuple(ahead)
                reply: Drafted | NotNow = Drafted(ask.request, desk.held, (1,), (0.5,))
            else:
                reply = taken_in
        assert told == history[: desk.held]
        if fate != "answer lost":
            got = asker.answer(ask, reply, "d")
            assert got == (reply if isinstance(reply, NotNow) else Draft((1,), (0.5,), "d"))
    ask, tail = asker.ask(EPOCH, [], 4, 0.0)
    last = desk.take(ask, tail, EPOCH)
    if isinstance(last, NotNow):
        asker.answer(ask, last, "d")
        last = desk.take(*asker.ask(EPOCH, [], 4, 0.0), EPOCH)
    assert isinstance(last, Question)
    assert [*told, *last.new] == history


def test_unknown_fields_are_left_alone() -> None:
    """A newer head may say more."""
    encoded = msgspec.msgpack.decode(TO_DRAFTER.encode(Ask(1, 2, 3, 0, 5)))
    encoded["colour"] = "blue"
    assert read_frame(Frame(msgspec.msgpack.encode(encoded))) == Ask(1, 2, 3, 0, 5)
