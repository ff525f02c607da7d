"""The model drafter and the combined one, with the toy model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, RunnerFailed, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import SequenceOp, StepInput, StepOutput
from pyagent_node.inference.drafting.combined import CombinedDrafter, CombinedDrafters
from pyagent_node.inference.drafting.model import ModelDrafter, ModelDrafters, check_vocabulary
from pyagent_node.inference.drafting.port import Draft, PreparedDrafter
from pyagent_node.inference.drafting.suffix import SuffixDrafter, SuffixDrafters
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.simulations.backend import ToyRunner, toy_generate, toy_vocabulary

LAYERS = 3
PIECES = toy_vocabulary().pieces
PROMPT = [ord(c) for c in "the quick brown fox"]
WARM = SamplingParams(seed=7, temperature=0.8, top_k=40, repetition_penalty=1.1)
COLD = SamplingParams(temperature=0.0)


def toy(n_seq: int = 2, n_ctx: int = 4096) -> ToyRunner:
    return ToyRunner(Slice(0, LAYERS, True), whole=True, n_seq=n_seq, n_ctx=n_ctx, one_way=True)


def answer(n: int, sampling: SamplingParams) -> list[int]:
    tokens = toy_generate(LAYERS, PROMPT, n, sampling, one_way=True)
    assert len(tokens) == n
    return tokens


@pytest.mark.parametrize("sampling", [WARM, COLD])
async def test_a_model_guesses_itself(sampling: SamplingParams) -> None:
    """With the noise of the positions it says what the same model as a target would say."""
    wanted = answer(20, sampling)
    drafter = ModelDrafters("toy", toy(), PIECES).for_model(PIECES, sampling)
    drafter.extend(PROMPT)
    assert isinstance(drafter, PreparedDrafter)
    await drafter.prepare()
    draft = await drafter.propose([], 6)
    assert draft.tokens == tuple(wanted[:6])
    assert draft.source == drafter.name == "toy"
    assert all(0 < c <= 1 for c in draft.confidence)
    assert (await drafter.propose(wanted[:9], 3)).tokens == tuple(wanted[9:12])
    drafter.extend(wanted[:8])
    assert (await drafter.propose([], 4)).tokens == tuple(wanted[8:12])
    assert (await drafter.propose([], 0)).tokens == ()
    assert len((await drafter.propose([], 9, floor=0.9999)).tokens) == 1


Round = tuple[int, list[int], bool | None, int]


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 127), max_size=2),
            st.sampled_from([None, True, False]),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=7,
    )
)
def test_its_kv_keeps_in_step_with_what_is_accepted(rounds: list[Round]) -> None:
    """Right and wrong guesses ahead, any number accepted, cancelled drafts: always the same."""
    wanted = answer(40, WARM)

    async def play() -> None:
        runner = toy()
        drafter = ModelDrafters("toy", runner, PIECES).for_model(PIECES, WARM)
        drafter.extend(PROMPT)
        known = 0
        for right, wrong, stalls, accepted in rounds:
            ahead = [*wanted[known : known + right], *wrong]
            if stalls is not None:
                runner.seconds = 1.0 if stalls else 0.0
                with trio.move_on_after(1.5):
                    await drafter.propose(ahead, 3)
                runner.seconds = 0.0
            drafter.extend(wanted[known : known + accepted])
            known += accepted
            draft = await drafter.propose([], 2)
            assert draft.tokens == tuple(wanted[known : known + 2])

    trio.run(play, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_it_goes_on_only_with_what_is_new(autojump_clock: trio.testing.MockClock) -> None:
    runner = toy()
    wanted = answer(12, COLD)
    drafter = ModelDrafters("toy", runner, PIECES).for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    await drafter.propose([], 4)
    assert runner.tokens_done == len(PROMPT) + 3
    drafter.extend(wanted[:5])
    await drafter.propose([], 1)
    assert runner.tokens_done == len(PROMPT) + 5


async def test_tokens_that_come_while_it_thinks_do_not_confuse_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    runner = toy()
    wanted = answer(12, COLD)
    drafter = ModelDrafters("toy", runner, PIECES).for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    runner.seconds = 1.0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drafter.propose, [5, 6, 7], 2)
        await trio.sleep(0.5)
        drafter.extend(wanted[:4])
    assert (await drafter.propose([], 3)).tokens == tuple(wanted[4:7])


async def test_sessions_have_sequences_of_their_own_and_give_them_back() -> None:
    runner = toy(n_seq=2)
    factory = ModelDrafters("toy", runner, PIECES)
    first, second = (factory.for_model(PIECES, COLD) for _ in range(2))
    with pytest.raises(LimitExceeded, match="serves 2 sessions") as info:
        factory.for_model(PIECES, COLD)
    assert info.value.code == "too_many_drafters"
    wanted = answer(6, COLD)
    for drafter in (first, second):
        drafter.extend(PROMPT)
        assert (await drafter.propose([], 3)).tokens == tuple(wanted[:3])
    assert runner.open_slots == 2
    await first.aclose()
    await first.aclose()
    assert runner.open_slots == 1
    with pytest.raises(InvalidRequest, match="closed"):
        await first.propose([], 1)
    third = factory.for_model(PIECES, WARM)
    third.extend(PROMPT)
    assert (await third.propose([], 3)).tokens == tuple(answer(3, WARM))
    await second.aclose()
    await third.aclose()
    assert runner.open_slots == 0


async def test_a_sequence_that_was_not_freed_is_freed_by_its_next_user(
    autojump_clock: trio.testing.MockClock,
) -> None:
    runner = toy(n_seq=1)
    factory = ModelDrafters("toy", runner, PIECES)
    drafter = factory.for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    await drafter.propose([], 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await drafter.aclose()
    assert runner.open_slots == 1
    following = factory.for_model(PIECES, COLD)
    following.extend(PROMPT)
    assert (await following.propose([], 3)).tokens == tuple(answer(3, COLD))


async def test_what_it_cannot_do_is_said() -> None:
    short = ModelDrafters("toy", toy(n_ctx=20), PIECES).for_model(PIECES, COLD)
    short.extend(PROMPT)
    with pytest.raises(LimitExceeded, match="outgrown the 20 tokens"):
        await short.propose([1, 2], 4)
    drafter = ModelDrafters("toy", toy(), PIECES).for_model(PIECES, COLD)
    drafter.extend([1, 2, 4000])
    with pytest.raises(Unsupported, match="does not know"):
        await drafter.propose([], 1)
    runner = toy()
    drafter = ModelDrafters("toy", runner, PIECES).for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    runner.kill()
    with pytest.raises(RunnerFailed):
        await drafter.propose([], 1)
    with pytest.raises(InvalidRequest, match="in part"):
        ModelDrafters("toy", ToyRunner(Slice(1, 3, True)), PIECES)


def test_another_vocabulary_is_refused_by_name() -> None:
    factory = ModelDrafters("small-model", toy(), PIECES)
    other = (*PIECES[:65], b"Z", *PIECES[66:])
    with pytest.raises(Unsupported, match=r"small-model cannot draft.*token 65 is b'A'") as info:
        factory.for_model(other, COLD)
    assert info.value.code == "vocabulary_mismatch"
    with pytest.raises(Unsupported, match="it has 130 tokens, this one 5000"):
        factory.for_model([b"x"] * 5000, COLD)
    # padding and control tokens have no text that could differ
    check_vocabulary("m", [b"a", b"", b"c"], [b"a", b"b", b"c", b"", b""])


class Scripted:
    """A model that always says the same."""

    name = "scripted"

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.asked = 0
        self.closed = False

    def extend(self, tokens: Sequence[int]) -> None:
        """Nothing to learn."""

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        self.asked += 1
        return self.draft.cut(limit)

    async def aclose(self) -> None:
        self.closed = True


async def test_the_surer_of_both_guesses() -> None:
    model = Scripted(Draft((90, 91, 92), (0.6, 0.6, 0.6), "scripted"))
    drafter = CombinedDrafter("both", SuffixDrafter(), model)
    drafter.extend(range(60))
    for _ in range(4):
        assert (await drafter.propose([], 3)).source == "scripted"
    drafter.extend([7, 8, 9, 10, 11, 12, 13])
    drafter.extend([14, 15, 16])
    asked = model.asked
    draft = await drafter.propose([], 3)
    assert draft.tokens == (17, 18, 19)
    assert draft.source == "suffix"
    assert model.asked == asked, "a sure look at the text makes the model needless"
    await drafter.prepare()
    await drafter.aclose()
    assert model.closed


async def test_a_model_that_is_never_right_loses_to_the_text() -> None:
    model = Scripted(Draft((90, 91, 92), (0.95, 0.95, 0.95), "scripted"))
    drafter = CombinedDrafter("both", SuffixDrafter(), model)
    sources: list[str] = []
    drafter.extend([1, 2, 3, 4, 5, 1, 2])
    for i in range(40):
        sources.append((await drafter.propose([], 3)).source)
        drafter.extend([(2 + i) % 5 + 1])
    assert set(sources[-20:]) == {"suffix"}


@pytest.mark.parametrize("early", [True, False])
async def test_a_model_that_fails_leaves_the_text_to_guess(early: bool) -> None:
    runner = toy()
    model = ModelDrafters("toy", runner, PIECES).for_model(PIECES, COLD)
    drafter = CombinedDrafter("both", SuffixDrafter(), model)
    drafter.extend([*range(60), 7, 8, 9, 10])
    if early:
        runner.kill()
    await drafter.prepare()
    if not early:
        runner.kill()
    for _ in range(3):
        draft = await drafter.propose([], 3)
        assert (draft.tokens, draft.source) == ((11, 12, 13), "suffix")
    with contextlib.suppress(RunnerFailed):  # there is nothing left to free
        await drafter.aclose()


async def test_both_together_are_made_for_a_model() -> None:
    factory = CombinedDrafters("both", SuffixDrafters(), ModelDrafters("toy", toy(), PIECES))
    assert factory.name == "both"
    drafter = factory.for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    await drafter.prepare()
    assert (await drafter.propose([], 4)).tokens == tuple(answer(4, COLD))
    await drafter.aclose()
    with pytest.raises(Unsupported):
        factory.for_model([b"x"] * 5000, COLD)


async def test_a_runner_that_answers_nothing_is_an_error() -> None:
    class Silent(ToyRunner):
        async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
            await trio.lowlevel.checkpoint()
            return [StepOutput()]

        async def apply(self, ops: Sequence[SequenceOp]) -> None:
            await trio.lowlevel.checkpoint()

    runner = Silent(Slice(0, LAYERS, True), whole=True)
    drafter: ModelDrafter = ModelDrafters("toy", runner, PIECES).for_model(PIECES, COLD)
    drafter.extend(PROMPT)
    with pytest.raises(Exception, match="gave no token"):
        await drafter.propose([], 1)
