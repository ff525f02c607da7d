"""Backends side by side on the same weights: speed, numbers, and KV that goes from one to another.

    python -m pyagent_node.benchmarks.backend_arms MODEL.gguf

Backends take turns in one process, so that a busy machine is unfair to all of them alike; figures
are medians over the rounds.  ``bench backends`` has each alone, beside its library's own loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.backends import perplexity
from pyagent_node.benchmarks.texts import TEXTS
from pyagent_node.inference import backends
from pyagent_node.inference.backend import FreeSequence, OpenSequence, StepInput, Tokens
from pyagent_node.inference.backend_names import BACKENDS, BackendName
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.stepping.backend import SliceBackend

GREEDY: Final = SamplingParams(temperature=0.0)


class ArmResult(msgspec.Struct, frozen=True):
    """One backend; ``max_logit_diff`` is from the first, over the text that perplexity is of."""

    name: str
    version: str
    device: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    perplexity: float
    max_logit_diff: float


class KvResult(msgspec.Struct, frozen=True):
    """KV that ``giver`` made of a prompt, in ``taker``, against the taker's own.

    ``max_logprob_diff`` (nats) is of the likeliest next tokens; ``same`` are the tokens of ``of``
    that came alike, up to the first that did not.
    """

    giver: str
    taker: str
    max_logprob_diff: float
    same: int
    of: int


class Report(msgspec.Struct, frozen=True):
    """What the program prints."""

    backends: tuple[ArmResult, ...]
    kv: tuple[KvResult, ...]


class Times(NamedTuple):
    """Seconds until the first token, seconds for the others, and the tokens."""

    prefill_seconds: float
    decode_seconds: float
    tokens: list[int]


class BackendArm:
    """A backend of ours, with the whole model."""

    def __init__(self, name: BackendName, path: Path, *, n_ctx: int, threads: int) -> None:
        part = Slice(0, model_shape(read_header(path)).n_layers, True)
        made = backends.open_backend(name, path, part, n_ctx=n_ctx, n_seq=2, threads=threads)
        self.backend = cast(SliceBackend, made)
        self.name: str = name
        self.version = made.info.version
        self.device = made.info.device

    def run(self, prompt: Sequence[int], n: int) -> Times:
        """Generate ``n`` tokens behind ``prompt``."""
        self.backend.apply(OpenSequence(0, GREEDY))
        begun = time.perf_counter()
        tokens = self.go_on(0, 0, prompt, 1)
        first = time.perf_counter()
        tokens += self.go_on(0, len(prompt), tokens, n - 1)
        ended = time.perf_counter()
        self.backend.apply(FreeSequence(0))
        return Times(first - begun, ended - first, tokens)

    def go_on(self, seq: int, position: int, tokens: Sequence[int], n: int) -> list[int]:
        """Feed ``tokens`` and return the ``n`` that follow."""
        found: list[int] = []
        row = np.array(tokens, np.int32)
        for _ in range(n):
            (output,) = self.backend.decode([StepInput(seq, position, row, None, True)])
            found.append(output.sampled[0].token)
            position += len(row)
            row = np.array(found[-1:], np.int32)
        return found

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits behind each token."""
        return self.backend.score(np.array(tokens, np.int32))


def measure(
    arms: Sequence[BackendArm], prompt: Sequence[int], n: int, rounds: int
) -> list[ArmResult]:
    """Run every backend in turn, ``rounds`` times after one that does not count."""
    times: list[list[Times]] = [[] for _ in arms]
    for _ in range(rounds + 1):
        for arm, mine in zip(arms, times, strict=True):
            mine.append(arm.run(prompt, n))
    reference: NDArray[np.float32] | None = None
    results: list[ArmResult] = []
    for arm, mine in zip(arms, times, strict=True):
        found = arm.logits(prompt)
        reference = found if reference is None else reference
        results.append(
            ArmResult(
                arm.name,
                arm.version,
                arm.device,
                statistics.median(len(prompt) / t.prefill_seconds for t in mine[1:]),
                statistics.median((n - 1) / t.decode_seconds for t in mine[1:]),
                perplexity(found, tuple(prompt)),
                float(np.abs(found - reference).max()),
            )
        )
    return results


def hand_over(giver: BackendArm, taker: BackendArm, prompt: Tokens, n: int) -> KvResult:
    """Compute a prompt in one backend and go on in another."""
    body, last = prompt[:-1], prompt[-1:].tolist()
    giver.backend.apply(OpenSequence(0, GREEDY))
    giver.go_on(0, 0, body.tolist(), 1)
    kv = giver.backend.export_kv(0, 0, len(body))
    giver.backend.apply(FreeSequence(0))
    answers: list[list[int]] = []
    wide = SamplingParams(temperature=0.0, logprobs=True, top_logprobs=20)
    tops: list[dict[int, float]] = []
    for borrowed in (False, True):
        taker.backend.apply(OpenSequence(1, wide))
        if borrowed:
            taker.backend.import_kv(1, kv, body)
        else:
            taker.go_on(1, 0, body.tolist(), 1)
        (output,) = taker.backend.decode(
            [StepInput(1, len(body), np.array(last, np.int32), None, True)]
        )
        sampled = output.sampled[0]
        tops.append(dict(sampled.top))
        answers.append([sampled.token, *taker.go_on(1, len(prompt), [sampled.token], n - 1)])
        taker.backend.apply(FreeSequence(1))
    both = sorted(tops[0].keys() & tops[1].keys())
    rows = [np.array([top[token] for token in both]) for top in tops]
    same = next((i for i, (a, b) in enumerate(zip(*answers, strict=True)) if a != b), n)
    diff = float(np.abs(rows[0] - rows[1]).max())
    return KvResult(giver.name, taker.name, diff, same, n)


def main() -> int:
    """Measure what is installed and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    tokenizer = LlamaTokenizer(options.model)
    text = " ".join(TEXTS["prose"]).encode()
    prompt = tokenizer.tokenize(text, add_special=True, parse_special=False)[: options.prompt]
    n_ctx = len(prompt) + options.tokens + 8
    installed = {state.name for state in backends.survey() if state.installed}
    ours = [
        BackendArm(name, options.model, n_ctx=n_ctx, threads=options.threads)
        for name in BACKENDS
        if name in installed
    ]
    results = measure(ours, prompt.tolist(), options.tokens, options.rounds)
    pairs = [hand_over(a, b, prompt, options.tokens) for a in ours for b in ours if a is not b]
    report = Report(tuple(results), tuple(pairs))
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
