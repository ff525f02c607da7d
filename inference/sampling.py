"""Sampling parameters and results, shared by the HTTP API, the pipeline and the backends."""

from __future__ import annotations

import math

import msgspec

from pyagent_node.base.errors import InvalidRequest

MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a token is chosen from logits; the order of the steps is fixed.

    Logit bias, then repetition, frequency and presence penalties over the tokens of the session so
    far, then division by ``temperature``, then top-k, top-p and min-p, then position-seeded Gumbel
    noise and argmax.  ``temperature == 0`` is a plain argmax after bias and penalties.
    ``seed`` is an unsigned 64-bit integer; ``top_k == 0``, ``top_p == 1`` and ``min_p == 0`` mean
    off.  ``top_logprobs`` asks for that many alternatives (log-probabilities are of the
    model's own distribution, before bias, penalties, temperature and truncation): the likeliest, or
    with ``noisy_top`` those that the noise puts first, as a drafter wants them.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    logprobs: bool = False
    top_logprobs: int = 0
    noisy_top: bool = False

    def check(self, n_vocab: int) -> None:
        """Check every field against its range.

        Raises :class:`InvalidRequest` (``bad_parameter``) naming the field, its value and range.
        """
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("seed", self.seed, 0, 2**64 - 1),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS),
            ("logit_bias", len(self.logit_bias), 0, MAX_LOGIT_BIAS),
        )
        for name, value, low, high in ranges:
            if not (math.isfinite(value) and low <= value <= high):
                raise InvalidRequest(
                    f"{name} is {value!r}; it must lie between {low} and {high}.",
                    code="bad_parameter",
                    parameter=name,
                )
        for token, bias in self.logit_bias.items():
            if not (0 <= token < n_vocab and math.isfinite(bias) and -100.0 <= bias <= 100.0):
                raise InvalidRequest(
                    f"logit_bias[{token}] is {bias!r}; tokens run from 0 to {n_vocab - 1}"
                    " and biases from -100 to 100.",
                    code="bad_parameter",
                    parameter="logit_bias",
                )


class Sampled(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sampled token; ``top`` holds (token, log-probability) pairs, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
