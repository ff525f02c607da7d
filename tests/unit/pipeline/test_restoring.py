"""How a head begins from blocks: what it asks for, whom it believes, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from pyagent_node.base.errors import Conflict, CorruptData, Unavailable
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.generation import Finished, Usage
from pyagent_node.inference.kv.port import NullShelf
from pyagent_node.inference.pipeline.frames import (
    CloseSession,
    Held,
    Restore,
    Restored,
    Result,
    Step,
    unpack_tokens,
)
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.restoring import RESTORE_SECONDS, Restoring, worth_asking
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.sharding.kv_keys import block_chain

MODEL = Digest("a" * 64)
ROOT = bytes(32)
VOCABULARY = Vocabulary(tuple(bytes([i]) for i in range(256)), frozenset({255}))
PLACEMENT = Placement(
    MODEL, 4, tuple(Rank(r, Slice(r, r + 1, r == 2), PeerId(f"p{r}")) for r in range(3)), 4096, 1
)
LOST = Unavailable("gone", code="peer_lost")
MOVED = Conflict("moved", code="stale_epoch")


def head(prompt: int, budget: int = 200) -> HeadCore:
    """Return a session that has not begun."""
    plan = HeadPlan(
        SessionId("stable"), PeerId("h"), MODEL, budget, (), True, SamplingParams(), ROOT
    )
    return HeadCore(plan, np.arange(prompt, dtype=np.int32) % 200, VOCABULARY, 0.0)


def begin(core: HeadCore, blocks: int) -> Sequence[object]:
    """Begin an attempt; returns its messages."""
    return [out.message for out in core.begin(SessionId("s"), PLACEMENT, None, 0.0, blocks)]


def word(
    rank: int, blocks: int, *, cut: int = 64, sender: str = "", rest: int = 0
) -> tuple[PeerId, Restored]:
    """Return what a rank says."""
    peer = PeerId(sender or f"p{rank}")
    return peer, Restored(SessionId("s"), MODEL, 4, rank, blocks, cut, rest)


def sent(core: HeadCore) -> list[Step]:
    """Send what may be sent."""
    steps = []
    while (chunk := core.next_chunk()) is not None:
        assert core.attempt is not None
        message = core.attempt.send_chunk(chunk, None, 0.0).message
        assert isinstance(message, Step)
        steps.append(message)
    return steps


def answered(core: HeadCore, steps: Sequence[Step]) -> None:
    """Have the tail answer steps with tokens where it was asked for some."""
    for step in steps:
        sampled = (Sampled(7),) if step.sample else ()
        core.on_result(
            PeerId("p2"), Result(SessionId("s"), MODEL, 4, 2, step.step, 0.1, sampled), 1.0
        )


def go_on(core: HeadCore, tokens: int) -> None:
    """Answer so many steps of one token, the first of which is out."""
    for _ in range(tokens):
        assert core.attempt is not None
        first = core.attempt._flights[0].step
        message = Result(SessionId("s"), MODEL, 4, 2, first, 0.1, (Sampled(7),))
        core.on_result(PeerId("p2"), message, 1.0)
        while not core.over and core.take(1.0)[0] is not None:
            pass


def usage(core: HeadCore) -> Usage:
    """Return what is told at the end."""
    while (event := core.take(1.0)[0]) is not None:
        if isinstance(event, Finished):
            return event.usage
    raise AssertionError("it is not over")


def test_nothing_is_sent_before_all_ranks_have_spoken() -> None:
    core = head(1000)
    _, wish = begin(core, 15)
    assert isinstance(wish, Restore)
    assert (wish.n, wish.rank, wish.sources) == (960, 0, ())
    assert core.next_chunk() is None
    assert not core.on_restored(*word(0, 15))
    assert not core.on_restored(*word(2, 9))
    assert core.next_chunk() is None
    assert core.on_restored(*word(1, 14))
    assert [(s.step, s.position, s.n) for s in sent(core)] == [(0, 576, 424)]
    assert not core.on_restored(*word(1, 14))


@pytest.mark.parametrize(
    ("prompt", "said", "cut", "position"),
    [
        (1000, (15, 15, 15), 64, 896),
        (1000, (15, 15, 15), 512, 512),
        (1000, (15, 7, 15), 512, 0),
        (1000, (0, 15, 15), 64, 0),
        (1024, (16, 16, 16), 64, 960),
        (64, (1, 1, 1), 64, 0),
    ],
)
def test_the_least_word_and_the_greatest_cut_count(
    prompt: int, said: tuple[int, ...], cut: int, position: int
) -> None:
    core = head(prompt)
    begin(core, prompt // 64)
    for rank, blocks in enumerate(said):
        core.on_restored(*word(rank, blocks, cut=cut if rank == 1 else 64))
    assert sent(core)[0].position == position


def test_whoever_is_not_the_rank_is_not_heard() -> None:
    core = head(1000)
    begin(core, 15)
    for rank in range(3):
        assert not core.on_restored(*word(rank, 15, sender=f"p{(rank + 1) % 3}"))
        assert not core.on_restored(*word(rank + 3, 15, sender=f"p{rank}"))
    core.on_restored(*word(0, 15))
    core.on_restored(*word(1, 15))
    core.on_restored(*word(0, 1))  # the first word counts
    assert core.on_restored(*word(2, 15))
    assert sent(core)[0].position == 896


@pytest.mark.parametrize(
    ("blocks", "cut"), [(-1, 64), (16, 64), (2**60, 64), (3, 0), (3, 65), (3, -64)]
)
def test_a_word_that_cannot_be_ends_the_session(blocks: int, cut: int) -> None:
    core = head(1000)
    begin(core, 15)
    assert core.on_restored(*word(1, blocks, cut=cut))
    with pytest.raises(CorruptData) as caught:
        core.take(0.0)
    assert caught.value.code == "bad_result"
    assert not core.on_restored(*word(0, 15))


def test_a_wait_ends_without_blocks() -> None:
    wait = Restoring(PLACEMENT, 3, 100.0)
    assert wait.until == 100.0 + RESTORE_SECONDS
    wait.take(*word(0, 3))
    assert wait.position(500, 500) == 0
    core = head(1000)
    begin(core, 15)
    core.on_restored(*word(0, 15))
    assert core.attempt is not None
    core.attempt.start(0)
    assert [s.position for s in sent(core)] == [0, 512]
    assert not core.on_restored(*word(1, 15))
    assert not core.on_restored(*word(2, 15))


def test_cached_tokens_are_those_of_the_first_attempt_that_computed_something() -> None:
    core = head(300, budget=3)
    begin(core, 4)
    assert core.interrupt(LOST, 0.0)
    begin(core, 4)
    for rank in range(3):
        core.on_restored(*word(rank, 3))
    core.interrupt(LOST, 0.0)  # it was lost before it had computed anything
    assert core.failovers == 0
    assert not core.known
    begin(core, 4)
    for rank in range(3):
        core.on_restored(*word(rank, 2))
    answered(core, sent(core))
    go_on(core, 2)
    told = usage(core)
    assert (told.cached_tokens, told.recomputed_tokens, told.failovers) == (128, 0, 0)


def test_recomputed_tokens_are_those_that_were_fed_again() -> None:
    core = head(300, budget=150)
    begin(core, 0)
    answered(core, sent(core))
    go_on(core, 99)  # 300 of the prompt and 99 of the answer are computed, 100 are known
    assert core.interrupt(LOST, 0.0)
    assert core.known
    _, wish = begin(core, 6)
    assert isinstance(wish, Restore)
    assert set(wish.sources) == {"p0", "p1", "p2"}
    for rank in range(3):
        core.on_restored(*word(rank, 6))
    steps = sent(core)
    assert [(s.position, s.n) for s in steps] == [(384, 8), (392, 8)]
    answered(core, steps[:1])
    core.interrupt(LOST, 0.0)  # 8 were computed again for nothing
    begin(core, 6)
    for rank in range(3):
        core.on_restored(*word(rank, 5))
    steps = sent(core)
    assert steps[0].position == 320
    answered(core, steps)
    go_on(core, 49)
    told = usage(core)
    assert (told.cached_tokens, told.failovers) == (0, 2)
    assert told.recomputed_tokens == 8 + (399 - 320)


def test_the_tokens_of_the_answer_are_in_the_wish_of_a_later_attempt() -> None:
    core = head(100)
    begin(core, 0)
    answered(core, sent(core))
    go_on(core, 39)
    core.interrupt(LOST, 0.0)
    out = core.begin(SessionId("s"), PLACEMENT, None, 0.0, 2)
    assert unpack_tokens(out[1].tail, 128).tolist() == [*range(100), *[7] * 28]


class Promising(NullShelf):
    """Promises the same for whatever it is asked."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.asked: list[tuple[Digest, tuple[bytes, ...], range]] = []

    def promises(self, model: Digest, chain: Sequence[bytes], layers: range) -> int:
        self.asked.append((model, tuple(chain), layers))
        return self.blocks


@pytest.mark.parametrize(
    ("prompt", "promised", "known", "asked"),
    [
        (1000, 3, False, 3),
        (1000, 99, False, 14),
        (1000, 0, False, 0),
        (1000, 0, True, 14),
        (64, 9, False, 0),
        (63, 9, True, 0),
    ],
)
def test_a_new_session_asks_for_what_is_promised_and_a_known_one_for_all(
    prompt: int, promised: int, known: bool, asked: int
) -> None:
    shelf = Promising(promised)
    tokens = np.arange(prompt, dtype=np.int32)
    assert worth_asking(ROOT, tokens, prompt, PLACEMENT, shelf, known=known) == asked
    if shelf.asked:
        chain = block_chain(ROOT, tokens[: 64 * 14], prompt)
        assert shelf.asked == [(MODEL, chain, range(3))]
    assert worth_asking(b"", tokens, prompt, PLACEMENT, shelf, known=True) == 0


# ---- the rest behind the last block, when an epoch ends ---------------------------------------


def answering(prompt: int, tokens: int) -> HeadCore:
    """Return a session that has so many tokens of its answer and is told that it moves."""
    core = head(prompt)
    begin(core, 0)
    answered(core, sent(core))
    go_on(core, tokens - 1)
    closing = [out.message for out in core.interrupt(MOVED, 1.0)]
    assert [message.parts for message in closing if isinstance(message, CloseSession)] == [True] * 3
    return core


@pytest.mark.parametrize(
    ("prompt", "tokens", "blocks", "rest"),
    [(100, 50, 2, 21), (100, 29, 2, 0), (100, 1, 1, 36), (20, 30, 0, 49), (64, 1, 1, 0)],
)
def test_a_session_that_moves_asks_for_all_that_was_computed(
    prompt: int, tokens: int, blocks: int, rest: int
) -> None:
    core = answering(prompt, tokens)
    _, wish = core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    assert isinstance(wish.message, Restore)
    assert (wish.message.n, wish.message.rest) == (64 * blocks, rest)
    owners = tuple(Held(PeerId(f"p{r}"), r, r + 1) for r in range(3))
    assert wish.message.held == (owners if rest else ())
    told = unpack_tokens(wish.tail, 64 * blocks, rest).tolist()
    assert told == [*core.prompt.tolist(), *[7] * tokens][:-1]
    for rank in range(3):
        core.on_restored(*word(rank, blocks, rest=rest))
    assert [(s.position, s.n) for s in sent(core)] == [(prompt + tokens - 1, 1)]


@pytest.mark.parametrize(
    ("said", "position"),
    [
        (((2, 21), (2, 20), (2, 21)), 148),
        (((2, 21), (2, 0), (2, 21)), 128),
        (((2, 21), (1, 0), (2, 21)), 0),  # 36 rows of the prompt would follow: too few
        (((0, 0), (1, 0), (2, 21)), 0),
    ],
)
def test_the_shortest_rest_counts(said: tuple[tuple[int, int], ...], position: int) -> None:
    core = answering(100, 50)
    core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    for rank, (blocks, rest) in enumerate(said):
        core.on_restored(*word(rank, blocks, rest=rest))
    assert sent(core)[0].position == position


def test_inside_the_prompt_only_the_end_of_a_block_will_do() -> None:
    core = answering(100, 1)
    core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    for rank in range(3):
        core.on_restored(*word(rank, 1, rest=30))
    assert sent(core)[0].position == 0


@pytest.mark.parametrize(("blocks", "rest"), [(2, 22), (2, -1), (1, 1), (0, 21), (3, 0)])
def test_a_rest_that_cannot_be_ends_the_session(blocks: int, rest: int) -> None:
    core = answering(100, 50)
    core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    assert core.on_restored(*word(1, blocks, rest=rest))
    assert core.over
    assert core.outcome == "failed"


def test_only_what_moves_has_a_rest() -> None:
    core = answering(100, 50)
    core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    closing = core.interrupt(MOVED, 1.0)  # the next rank was not ready: it had computed nothing
    assert [out.message.parts for out in closing if isinstance(out.message, CloseSession)] == [
        False
    ] * 3
    _, wish = core.begin(SessionId("s"), PLACEMENT, None, 1.0)
    assert isinstance(wish.message, Restore)
    assert wish.message.rest == 21, "those of before still have it"
    for rank in range(3):
        core.on_restored(*word(rank, 2, rest=21))
    answered(core, sent(core))
    core.interrupt(LOST, 1.0)
    (_,) = core.begin(SessionId("s"), PLACEMENT, None, 1.0)
