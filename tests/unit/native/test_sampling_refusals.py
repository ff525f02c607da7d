"""Every kind of bad input to the sampler gets an error that names it; nothing panics."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pyagent_node import native

GOOD: dict[str, Any] = {
    "logits": np.array([0.5, 1.5, 1.0], np.float32),
    "history": np.array([1, 2], np.int32),
    "position": 3,
    "seed": 7,
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "bias_tokens": np.array([1], np.int32),
    "bias_values": np.array([2], np.float32),
    "top_logprobs": 2,
}


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("logits", f32(), ValueError, "logits is empty"),
    ("logits", f32(1, math.nan, 2), ValueError, r"logits\[1\] is NaN"),
    ("logits", f32(1, 2, math.inf), ValueError, r"logits\[2\] is inf"),
    ("logits", f32(*[-math.inf] * 3), ValueError, "every token has the logit -inf"),
    ("logits", np.zeros(2**24 + 1, np.float32), ValueError, "at most 16777216 tokens"),
    ("logits", np.zeros(3), TypeError, "logits must be .* of float32, not .* of float64"),
    ("logits", np.zeros(3, np.float16), TypeError, "of float16"),
    ("logits", np.zeros(3, ">f4"), TypeError, "of >f4"),
    ("logits", np.zeros((1, 3), np.float32), TypeError, "not a 2-dimensional array"),
    ("logits", np.float32(1), TypeError, "not float32"),
    ("logits", np.zeros(6, np.float32)[::2], ValueError, "logits must be contiguous"),
    ("logits", np.zeros(3, np.float32)[::-1], ValueError, "logits must be contiguous"),
    ("logits", np.zeros(13, np.uint8)[1:].view(np.float32), ValueError, "aligned"),
    ("logits", [0.5, 1.5], TypeError, "not list"),
    ("logits", None, TypeError, "not NoneType"),
    ("history", i32(0, 3), ValueError, r"history\[1\] is 3; tokens run from 0 to 2"),
    ("history", i32(-1), ValueError, r"history\[0\] is -1"),
    ("history", np.zeros(2, np.int64), TypeError, "history must be .* of int32"),
    ("history", i32(0, 1, 2, 1)[::2], ValueError, "history must be contiguous"),
    ("bias_tokens", i32(3), ValueError, r"bias_tokens\[0\] is 3"),
    ("bias_tokens", i32(-5), ValueError, r"bias_tokens\[0\] is -5"),
    ("bias_tokens", i32(), ValueError, "bias_tokens has 0 entries and bias_values 1"),
    ("bias_values", f32(math.nan), ValueError, r"bias_values\[0\] is NaN"),
    ("bias_values", f32(math.inf), ValueError, r"bias_values\[0\] is inf"),
    ("bias_values", np.zeros(1), TypeError, "bias_values must be .* of float32"),
    ("position", -1, ValueError, "position must lie between 0 and 18446744073709551615"),
    ("position", 2**64, ValueError, "position must lie between"),
    ("position", 1.5, TypeError, "position must be an integer, not float"),
    ("seed", -1, ValueError, "seed must lie between"),
    ("seed", 2**64, ValueError, "seed must lie between"),
    ("seed", "7", TypeError, "seed must be an integer, not str"),
    ("top_k", -1, ValueError, "top_k must lie between"),
    ("top_k", 2**40, ValueError, "top_k must lie between"),
    ("top_logprobs", -2, ValueError, r"top_logprobs \(or -1\) must lie between"),
    ("top_logprobs", None, TypeError, "top_logprobs"),
    ("temperature", -0.1, ValueError, "temperature is -0.1"),
    ("temperature", math.inf, ValueError, "temperature is inf"),
    ("temperature", "warm", TypeError, "temperature"),
    *[
        (name, value, ValueError, f"{name} is ")
        for name in ("top_p", "min_p")
        for value in (-0.1, 1.1, math.nan)
    ],
    *[
        (name, value, ValueError, f"{name} is ")
        for name in ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty")
        for value in (math.nan, -math.inf)
    ],
    ("repetition_penalty", 0.0, ValueError, "repetition_penalty is 0"),
]


def call(**changes: Any) -> tuple[int, float, list[tuple[int, float]]]:
    arguments = {**GOOD, **changes}
    places = [arguments.pop(name) for name in ("logits", "history", "position")]
    result: tuple[int, float, list[tuple[int, float]]] = native.sample(*places, **arguments)
    return result


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    REFUSED,
    ids=[f"{name}-{i}" for i, (name, *_) in enumerate(REFUSED)],
)
def test_bad_input_is_named(name: str, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(**{name: value})
    # Whatever was refused leaves nothing behind.
    assert call()[0] in range(3)


def test_more_than_there_is_means_all() -> None:
    assert call(top_k=100)[0] == call(top_k=0)[0]
    assert len(call(top_logprobs=100)[2]) == 3


def test_a_vocabulary_of_one_token() -> None:
    for temperature in (0.0, 1.0):
        shape = {"logits": f32(-9), "history": i32(0), "bias_tokens": i32(0)}
        assert call(**shape, temperature=temperature)[0] == 0


def test_numpy_scalars_are_welcome() -> None:
    assert call(seed=np.uint64(7), position=np.int64(3), temperature=np.float64(0.8)) == call()


def test_threads_do_not_meet() -> None:
    logits = [np.random.default_rng(i).standard_normal(5000).astype(np.float32) for i in range(8)]
    history = np.arange(500, dtype=np.int32)

    def run(i: int) -> list[int]:
        shape = {"logits": logits[i], "history": history, "presence_penalty": 0.5}
        return [call(**shape, position=position)[0] for position in range(50)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [run(i) for i in range(8)]


def test_read_only_arrays_are_welcome() -> None:
    logits = GOOD["logits"].copy()
    logits.flags.writeable = False
    assert call(logits=logits) == call()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, 0, 1), ValueError, "seed must lie between"),
        ((0, 2**64, 1), ValueError, "position must lie between"),
        ((0, 0, -1), ValueError, "n must lie between"),
        ((0, 0, 2**31), ValueError, "n is 2147483648; it may be at most 16777216"),
        ((0, 0, 2**32), ValueError, "n must lie between"),
        ((0, 0, "n"), TypeError, "n must be an integer, not str"),
    ],
)
def test_bad_noise_requests_are_named(
    arguments: tuple[Any, Any, Any], error: type[Exception], words: str
) -> None:
    gumbel: Callable[..., object] = native.gumbel
    with pytest.raises(error, match=words):
        gumbel(*arguments)
