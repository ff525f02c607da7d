"""Seeded sampling against its plain reference, and its statistics against the exact softmax."""

from __future__ import annotations

import math
from collections import Counter
from typing import TypedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyagent_node import native

from . import reference

U64 = st.integers(0, 2**64 - 1)


class Shape(TypedDict):
    """The keyword arguments of ``sample`` that shape the choice."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    bias_tokens: NDArray[np.int32]
    bias_values: NDArray[np.float32]


NO_TOKENS = np.zeros(0, np.int32)
PLAIN = Shape(
    seed=7,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    bias_tokens=NO_TOKENS,
    bias_values=np.zeros(0, np.float32),
)


def chosen(
    logits: NDArray[np.float32],
    history: NDArray[np.int32] = NO_TOKENS,
    position: int = 0,
    **changes: object,
) -> int:
    """The token that the native module chooses."""
    shape: Shape = {**PLAIN, **changes}  # type: ignore[typeddict-item]
    return native.sample(logits, history, position, **shape, top_logprobs=-1)[0]


@given(U64, U64, st.integers(0, 100))
def test_gumbel_equals_the_reference(seed: int, position: int, n: int) -> None:
    expected = [reference.gumbel(seed, position, token) for token in range(n)]
    noise = native.gumbel(seed, position, n)
    assert noise.shape == (n,)
    assert noise.dtype == np.float64
    np.testing.assert_allclose(noise, expected, rtol=0, atol=1e-12)


GOLDEN = [
    "-0x1.4d5d5c6c2a20fp-1",
    "-0x1.409110743f743p-1",
    "0x1.a200cbf75a56ap+1",
    "0x1.445874e772cf2p-1",
    "-0x1.d4a2bed0f049ep-1",
    "0x1.05fc0f6147fd8p+1",
]


def test_gumbel_has_the_bits_it_always_had() -> None:
    # If this fails, the same seed no longer gives the same text: a break of the main promise.
    noise = native.gumbel(0x0123456789ABCDEF, 2**40 + 17, 6)
    assert [float(value).hex() for value in noise] == GOLDEN


def test_gumbel_is_gumbels_distribution() -> None:
    noise = np.concatenate([native.gumbel(5, position, 1000) for position in range(50)])
    # exp(-exp(-x)) of a Gumbel variable is uniform: chi-squared over 50 bins, 1 in a million.
    counts, _ = np.histogram(np.exp(-np.exp(-noise)), bins=50, range=(0, 1))
    expected = len(noise) / 50
    assert float(((counts - expected) ** 2 / expected).sum()) < 111.0


LOGIT = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -math.inf, 3.4e38, -3.4e38]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.int32], int, Shape]:
    """Logits, history, position and parameters of all kinds."""
    logits = draw(
        st.lists(LOGIT, min_size=1, max_size=60).filter(lambda x: any(v > -math.inf for v in x))
    )
    token = st.integers(0, len(logits) - 1)
    history = draw(st.lists(token, max_size=20))
    bias = draw(st.dictionaries(token, st.floats(-100, 100, width=32), max_size=5))
    off = st.just
    shape = Shape(
        seed=draw(U64),
        temperature=draw(st.one_of(st.sampled_from([0.0, 1e-300, 1.0, 1e3]), st.floats(0.1, 4.0))),
        top_k=draw(st.one_of(off(0), st.integers(1, 70), off(2**31 - 1))),
        top_p=draw(st.one_of(off(1.0), st.floats(0, 1))),
        min_p=draw(st.one_of(off(0.0), st.floats(0, 1))),
        repetition_penalty=draw(st.one_of(off(1.0), st.floats(0.01, 100))),
        frequency_penalty=draw(st.one_of(off(0.0), st.floats(-2, 2))),
        presence_penalty=draw(st.one_of(off(0.0), st.floats(-2, 2))),
        bias_tokens=np.array(list(bias), np.int32),
        bias_values=np.array(list(bias.values()), np.float32),
    )
    return np.array(logits, np.float32), np.array(history, np.int32), draw(U64), shape


@pytest.mark.slow
@settings(max_examples=500)
@given(cases())
def test_sample_equals_the_reference(
    case: tuple[NDArray[np.float32], NDArray[np.int32], int, Shape],
) -> None:
    logits, history, position, shape = case
    expected = reference.sample(logits, history, position, **shape)
    assert native.sample(logits, history, position, **shape, top_logprobs=-1)[0] == expected


LARGE: dict[str, dict[str, float]] = {
    "plain": {},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "wide_top_p": {"top_p": 0.9999, "temperature": 2.0},
    "min_p": {"min_p": 0.02},
    "all": {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("changes", LARGE.values(), ids=LARGE.keys())
def test_a_large_vocabulary_gives_the_reference_tokens(changes: dict[str, float]) -> None:
    generator = np.random.default_rng(3)
    for position in range(2):
        logits = (generator.standard_normal(20_011) * 3).astype(np.float32)
        history = generator.integers(0, 20_011, 300).astype(np.int32)
        shape: Shape = {**PLAIN, **changes}  # type: ignore[typeddict-item]
        expected = reference.sample(logits, history, position, **shape)
        assert chosen(logits, history, position, **changes) == expected


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_k": 40}, {"top_p": 0.9}])
def test_runners_up_are_ranked_by_logits_and_noise(changes: dict[str, float]) -> None:
    generator = np.random.default_rng(2)
    for position in range(50):
        logits = (generator.standard_normal(250) * 3).astype(np.float32)
        shape: Shape = {**PLAIN, **changes}  # type: ignore[typeddict-item]
        token, logprob, top = native.sample(
            logits, NO_TOKENS, position, **shape, top_logprobs=3, noisy=True
        )
        alone = native.sample(logits, NO_TOKENS, position, **shape, top_logprobs=0)
        assert (token, logprob) == alone[:2] == top[0]
        scores = logits.astype(np.float64)
        if shape["temperature"]:
            scores = scores / shape["temperature"]
            scores += native.gumbel(shape["seed"], position, len(logits))
            if shape["top_p"] < 1:
                continue  # how many are left is another test's
            if shape["top_k"]:
                scores[np.argsort(-logits, kind="stable")[shape["top_k"] :]] = -np.inf
        ranked = np.argsort(-scores, kind="stable")[:3].tolist()
        assert [one for one, _ in top] == ranked


def test_the_noise_is_that_of_gumbel() -> None:
    generator = np.random.default_rng(1)
    for position in range(300):
        logits = (generator.standard_normal(3001) * 2).astype(np.float32)
        scores = logits.astype(np.float64) / 0.8 + native.gumbel(9, position, 3001)
        assert chosen(logits, position=position, seed=9, temperature=0.8) == scores.argmax()


EXACT: dict[str, dict[str, object]] = {
    "softmax": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.3},
    "repetition": {"repetition_penalty": 1.7},
    "frequency": {"frequency_penalty": 0.4},
    "presence": {"presence_penalty": 0.9},
    "bias": {
        "bias_tokens": np.array([9, 0], np.int32),
        "bias_values": np.array([4.0, -1.5], np.float32),
    },
    "all": {
        "temperature": 1.4,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "bias_tokens": np.array([11], np.int32),
        "bias_values": np.array([3.0], np.float32),
    },
}
HISTORY = np.array([0, 2, 2, 2, 5, 8, 8], np.int32)
LOGITS = np.array([1.5 - 0.5 * token for token in range(12)], np.float32)
N = 20_000


def far_off(changes: dict[str, object], bent: float = 0.0) -> tuple[float, float]:
    """Chi-squared of 20,000 tokens against the exact probabilities, and its bound.

    A share ``bent`` of the tokens is replaced by the likeliest one.
    """
    shape: dict[str, object] = {**PLAIN, **changes}
    shape.pop("seed")
    exact = reference.distribution(LOGITS, HISTORY, **shape)
    tokens = [chosen(LOGITS, HISTORY, position, seed=11, **changes) for position in range(N)]
    tokens[: int(bent * N)] = [next(iter(exact))] * int(bent * N)
    counts = Counter(tokens)
    assert counts.keys() <= exact.keys()
    statistic = sum((counts[t] - N * p) ** 2 / (N * p) for t, p in exact.items())
    return statistic, reference.chi_squared_bound(len(exact) - 1)


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT.keys())
def test_the_tokens_follow_the_exact_distribution(changes: dict[str, object]) -> None:
    # A right sampler fails with one seed in a million; the seed is fixed, so it never flakes.
    statistic, bound = far_off(changes)
    assert statistic < bound


@pytest.mark.parametrize("changes", [EXACT["softmax"], EXACT["all"]])
def test_a_bias_of_five_in_a_hundred_shows(changes: dict[str, object]) -> None:
    statistic, bound = far_off(changes, bent=0.05)
    assert statistic > bound


def test_seeds_and_positions_give_independent_tokens() -> None:
    logits = np.zeros(1000, np.float32)
    by_seed = {chosen(logits, seed=seed) for seed in range(50)}
    by_position = {chosen(logits, position=position) for position in range(50)}
    assert len(by_seed) > 40
    assert len(by_position) > 40


def test_ties_go_to_the_lowest_token() -> None:
    logits = np.array([1, 5, 5, -0.0], np.float32)
    assert chosen(logits, temperature=0.0) == 1
    assert {chosen(logits, position=position, top_k=1) for position in range(20)} == {1}
    zeros = np.array([-0.0, 0.0], np.float32)
    assert {chosen(zeros, position=position, top_p=0.0) for position in range(20)} == {0}


def test_a_masked_token_is_never_chosen() -> None:
    logits = np.array([-math.inf, 0, 40, 0], np.float32)
    banned = {
        "bias_tokens": np.array([2], np.int32),
        "bias_values": np.array([-math.inf], np.float32),
    }
    tokens = {chosen(logits, position=i, **banned) for i in range(200)}
    assert tokens == {1, 3}


def test_history_tokens_are_penalised_in_the_stated_order() -> None:
    history = np.array([0, 0, 2], np.int32)
    logits = np.array([4.0, 1.0, -1.0], np.float32)
    shape = {"temperature": 0.0, "repetition_penalty": 2.0, "frequency_penalty": 0.25}
    # 4 / 2 - 2 * 0.25 = 1.5, still ahead of 1; a presence penalty of 0.6 changes that.
    assert chosen(logits, history, **shape) == 0
    assert chosen(logits, history, **shape, presence_penalty=0.6) == 1


@given(st.lists(LOGIT.filter(lambda x: abs(x) < 1e30), min_size=1, max_size=40), st.integers(0, 50))
def test_logprobs_are_of_the_raw_distribution(values: list[float], top: int) -> None:
    logits = np.array(values, np.float32)
    expected = reference.logprobs(logits)
    shaped: Shape = {
        **PLAIN,
        "temperature": 0.3,
        "top_k": 3,
        "bias_tokens": np.array([0], np.int32),
        "bias_values": np.array([5], np.float32),
    }
    token, logprob, likeliest = native.sample(
        logits, np.array([0], np.int32), 3, **shaped, top_logprobs=top
    )
    assert logprob == pytest.approx(expected[token], rel=1e-12, abs=1e-12)
    order = sorted(range(len(values)), key=lambda t: (-values[t], t))[:top]
    assert [t for t, _ in likeliest] == order
    assert [p for _, p in likeliest] == pytest.approx([expected[t] for t in order], abs=1e-12)


def test_logprobs_leave_out_what_cannot_happen() -> None:
    logits = np.array([-math.inf, 2.0, -math.inf], np.float32)
    assert native.sample(logits, NO_TOKENS, 0, **PLAIN, top_logprobs=3) == (1, 0.0, [(1, 0.0)])
    token, logprob, top = native.sample(logits, NO_TOKENS, 0, **PLAIN, top_logprobs=-1)
    assert (token, top) == (1, [])
    assert math.isnan(logprob)
