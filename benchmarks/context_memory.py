"""Memory against context length with pruning off and on, and what that costs in quality.

As a program (``python -m pyagent_node.benchmarks.context_memory``) it answers one JSON
``MemoryJob`` from stdin with one JSON ``MemoryResult``, so that llama.cpp never runs in the process
that asks.

One text is computed from front to back.  At each length its following tokens are predicted and
facts told in it are asked for: with all cells, with those that the policy keeps of them
(``kv.pruning``), and with the first and the last ones alone.  Then it is computed once more as
a rank computes the prompt of a session whose budget is rolling.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.apart import answer, measured_apart
from pyagent_node.benchmarks.context_memory_text import MAX_TOKENS, Planted, Text, plant
from pyagent_node.benchmarks.context_memory_types import (
    OFF,
    ONCE,
    RECENT,
    ROLLING,
    MemoryJob,
    MemoryResult,
    MemoryRow,
)
from pyagent_node.benchmarks.kv_texts import texts
from pyagent_node.benchmarks.served_pruning import ServedPrompt
from pyagent_node.inference.backend import (
    PREFILL_CHUNK,
    CellAttention,
    CopySequence,
    FreeSequence,
    OpenSequence,
    PruneSequence,
    StepInput,
    Tokens,
    WatchSequence,
)
from pyagent_node.inference.kv.budgets import SINKS, Pruning, budget
from pyagent_node.inference.kv.pruning import kept, ranges
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header

SECONDS: Final = 3600.0
QUESTION: Final = 32
"""The most tokens of a question and its answer."""
_FULL, _OTHER = 0, 1


class _Scores(NamedTuple):
    """What a set of cells makes of the following tokens, and of the facts."""

    logs: NDArray[np.float64]
    perplexity: float
    right: float
    loss: float


class _Bench:
    def __init__(self, backend: LlamaBackend, text: Text, job: MemoryJob) -> None:
        self.backend = backend
        self.text = text
        self.tokens: Tokens = np.array(text.tokens, np.int32)
        self.job = job
        self.pruning = Pruning(job.cells)
        self.rows: list[MemoryRow] = []
        self.sampled = 0
        self.exact: dict[int, _Scores] = {}
        """By length, those with all cells."""

    # ---- computing ---------------------------------------------------------------------------

    def feed(self, seq: int, tokens: Tokens, position: int) -> None:
        self.backend.decode([StepInput(seq, position, tokens, None, sample=False)])

    def attention(self, seq: int) -> CellAttention:
        found = self.backend.attention(seq)
        self.sampled += found.rows
        return found

    def chosen(self, found: CellAttention, seen: int) -> tuple[tuple[int, int], ...]:
        most = budget(self.pruning, seen)
        return ranges(kept(found.positions, found.mass.sum(0), found.seen, most=most))

    def again(self, stop: int) -> None:
        """Have the first ``stop`` cells of the full sequence in the other one."""
        self.backend.apply(FreeSequence(_OTHER))
        self.backend.apply(OpenSequence(_OTHER))
        self.backend.apply(CopySequence(_OTHER, _FULL, 0, stop))

    def pieces(self) -> list[tuple[int, int]]:
        """Return the pieces in which the text is computed, cut at every length too."""
        end = max(self.job.lengths)
        cuts = sorted({0, *range(0, end, PREFILL_CHUNK), *self.job.lengths})
        return list(pairwise(cuts))

    # ---- scoring -----------------------------------------------------------------------------

    def score(self, seq: int, end: int) -> _Scores:
        follow = self.tokens[end : end + self.job.scored + 1]
        logs = _logs(self.backend.score(follow[:-1], seq))
        losses = -logs[np.arange(len(logs)), follow[1:]]
        facts = self.text.asked(end, self.job.asked)
        told = [self.ask(seq, fact, fact.question) for fact in facts]
        return _Scores(
            logs,
            float(np.exp(losses.mean())),
            sum(right for right, _ in told) / max(1, len(told)),
            sum(loss for _, loss in told) / max(1, len(told)),
        )

    def ask(self, seq: int, fact: Planted, rest: Sequence[int]) -> tuple[bool, float]:
        """Return whether the fact's last words are told behind ``rest``, and their mean loss."""
        tokens = np.array([*rest, *fact.answer], np.int32)
        logs = _logs(self.backend.score(tokens[:-1], seq)[len(rest) - 1 :])
        right = logs.argmax(1).tolist() == list(fact.answer)
        return right, float(-logs[np.arange(len(fact.answer)), fact.answer].mean())

    def asked_before(self, end: int) -> tuple[float, float]:
        """Return what :meth:`score` says of facts, where the question is among the last tokens."""
        told: list[tuple[bool, float]] = []
        for fact in self.text.asked(end, self.job.asked):
            self.again(end)
            self.backend.apply(WatchSequence(_OTHER))
            begin = np.array(fact.question[:-1], np.int32)
            self.feed(_OTHER, begin, end)
            found = self.attention(_OTHER)
            self.backend.apply(WatchSequence(_OTHER, 0))
            self.backend.apply(PruneSequence(_OTHER, self.chosen(found, end)))
            told.append(self.ask(_OTHER, fact, fact.question[-1:]))
        return sum(right for right, _ in told) / len(told), sum(x for _, x in told) / len(told)

    def note(
        self,
        arm: str,
        seq: int,
        end: int,
        asked: tuple[float, float] | None = None,
        most: int | None = None,
    ) -> _Scores:
        usage = self.backend.kv_usage(seq)
        if usage.cells == end and end in self.exact:  # nothing was given up: the same bits
            scores = self.exact[end]
        else:
            scores = self.score(seq, end)
        exact = self.exact.setdefault(end, scores).logs
        self.rows.append(
            MemoryRow(
                tokens=end,
                arm=arm,
                cells=usage.cells,
                bytes=usage.bytes,
                resident=usage.resident or 0,
                most=end if most is None else most,
                most_bytes=(end if most is None else most) * self.backend.info.kv_bytes_per_token,
                perplexity=scores.perplexity,
                divergence=float((np.exp(exact) * (exact - scores.logs)).sum(1).mean()),
                facts=len(self.text.asked(end, self.job.asked)),
                later=scores.right,
                later_loss=scores.loss,
                asked=asked[0] if asked else None,
                asked_loss=asked[1] if asked else None,
            )
        )
        return scores

    # ---- the arms ----------------------------------------------------------------------------

    def whole(self) -> None:
        """Compute the text with all cells; at each length, take some of them away from a copy."""
        backend = self.backend
        backend.apply(OpenSequence(_FULL))
        backend.apply(OpenSequence(_OTHER))
        for start, stop in self.pieces():
            if stop in self.job.lengths:
                backend.apply(WatchSequence(_FULL))
            self.feed(_FULL, self.tokens[start:stop], start)
            if stop not in self.job.lengths:
                continue
            keep = self.chosen(self.attention(_FULL), stop)
            backend.apply(WatchSequence(_FULL, 0))
            scores = self.note(OFF, _FULL, stop)
            self.rows[-1] = msgspec.structs.replace(
                self.rows[-1], asked=scores.right, asked_loss=scores.loss
            )
            most = budget(self.pruning, stop)
            asked = self.asked_before(stop) if stop > most else (scores.right, scores.loss)
            self.again(stop)
            backend.apply(PruneSequence(_OTHER, keep))
            self.note(ONCE, _OTHER, stop, asked)
            cells = backend.kv_usage(_OTHER).cells
            self.again(stop)
            if cells < stop:
                recent = ((0, SINKS), (stop - cells + SINKS, stop))
                backend.apply(PruneSequence(_OTHER, recent))
            self.note(RECENT, _OTHER, stop)
        backend.apply(FreeSequence(_FULL))
        backend.apply(FreeSequence(_OTHER))

    def rolling(self) -> None:
        """Compute the text as a rank does whose session has a rolling budget."""
        backend = self.backend
        backend.apply(OpenSequence(_FULL))
        prompt = ServedPrompt(
            backend, _FULL, self.job.cells, len(self.tokens), n_ctx=backend.info.n_ctx
        )
        prompt.watch()
        for start, stop in self.pieces():
            self.feed(_FULL, self.tokens[start:stop], start)
            prompt.read(start, stop)
            if stop in self.job.lengths:  # what is scored is not to be measured
                backend.apply(WatchSequence(_FULL, 0))
                self.note(ROLLING, _FULL, stop, most=prompt.most)
                prompt.watch()
        self.sampled += prompt.rows
        backend.apply(FreeSequence(_FULL))


def _logs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide


def fitting(lengths: Sequence[int], n_ctx: int, after: int) -> tuple[int, ...]:
    """Return the lengths, those that are too long for the model as long as they can be."""
    most = min(n_ctx - after, MAX_TOKENS)
    return tuple(sorted({min(length, most) for length in lengths}))


def measure(job: MemoryJob) -> MemoryResult:
    """Measure in this process, which llama.cpp may print from and abort.

    Raises :class:`InvalidRequest` (``bad_parameter``) for a model that has less room than the
    shortest of the lengths, and what loading the model raises.
    """
    began = time.perf_counter()
    path = Path(job.path)
    shape = model_shape(read_header(path))
    after = job.scored + 1 + QUESTION
    lengths = fitting(job.lengths, shape.n_ctx_train, after)
    if lengths[0] < min(job.lengths):
        raise InvalidRequest("The model's context is too short.", code="bad_parameter")
    with closing(LlamaTokenizer(path)) as vocabulary:

        def tokenise(words: str) -> list[int]:
            found = vocabulary.tokenize(words.encode(), add_special=False, parse_special=False)
            return cast("list[int]", found.tolist())

        text = plant((each for _, each in texts()), max(lengths) + after, tokenise)
    part = Slice(0, shape.n_layers, head=True)
    n_ctx = max(lengths) + after
    with closing(LlamaBackend(path, part, n_ctx=n_ctx, n_seq=2, threads=job.threads)) as backend:
        bench = _Bench(backend, text, msgspec.structs.replace(job, lengths=lengths))
        bench.whole()
        bench.rolling()
    return MemoryResult(
        rows=tuple(bench.rows), sampled=bench.sampled, seconds=time.perf_counter() - began
    )


def measure_apart(job: MemoryJob) -> MemoryResult:
    """Measure in a child process; raises :class:`RunnerFailed` when it dies or takes too long."""
    return measured_apart(
        "pyagent_node.benchmarks.context_memory", job, MemoryResult, seconds=SECONDS
    )


if __name__ == "__main__":
    answer(MemoryJob, measure)
