"""What the levels of the KV codec save and cost: bytes, seconds, and perplexity on real text.

As a program (``python -m pyagent_node.benchmarks.kv_codec``) it answers one JSON ``CodecJob`` from
stdin with one JSON ``CodecResult``, so that llama.cpp never runs in the process that asks.

The KV of a text's first tokens is computed in f16, cut into blocks of 64 tokens and a layer, goes
through the codec and back into llama.cpp, and the tokens that follow are scored with it.  The
baseline is llama.cpp with its own smaller KV types, from the first token to the last.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.benchmarks.apart import answer, measured_apart
from pyagent_node.benchmarks.kv_model import PlainContext, PlainModel
from pyagent_node.benchmarks.kv_texts import texts
from pyagent_node.benchmarks.kv_types import CodecJob, CodecResult, CodecRow, QualityRow
from pyagent_node.inference.llama.kv_state import Cells, SequenceState
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.kv_rows import kv_shape
from pyagent_node.sharding.kv_codec import EXACT, LEVELS, KvShape, Level, Rows, decode, encode
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

_F16, _Q4_0, _Q8_0 = 1, 2, 8
"""Values of ``ggml_type``."""
OWN: Final = {"q8_0": _Q8_0, "q4_0": _Q4_0}
"""llama.cpp's own smaller KV."""
SECONDS: Final = 3600.0
_TIMED_BLOCKS: Final = 240


class _Text(NamedTuple):
    name: str
    tokens: list[int]


class _Scores:
    """What one way of keeping KV makes of all texts."""

    def __init__(self) -> None:
        self.losses: list[NDArray[np.float64]] = []
        self.divergences: list[float] = []
        self.bytes = 0

    def add(
        self, logits: NDArray[np.float32], targets: list[int], exact: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """Note one text; returns the logarithms of the probabilities, shape (n, n_vocab)."""
        wide = logits.astype(np.float64)
        wide -= wide.max(1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(1, keepdims=True))
        self.losses.append(-wide[np.arange(len(targets)), targets])
        if exact is not None:
            self.divergences.append(float((np.exp(exact) * (exact - wide)).sum(1).mean()))
        return wide


def _chosen(model: PlainModel, job: CodecJob) -> list[_Text]:
    need = job.prefix + job.scored + 1
    found: list[_Text] = []
    for name, text in texts():
        tokens = model.tokens(text)
        if len(tokens) >= need:
            found.append(_Text(name, tokens[:need]))
        if len(found) == job.texts:
            break
    return found


def _blocks(state: SequenceState) -> list[tuple[int, Rows]]:
    """Return the blocks of a sequence, each with its number, layer by layer."""
    cells = state.cells
    return [
        (start, Rows(*(rows[start : start + BLOCK_TOKENS].tobytes() for rows in pair)))
        for pair in zip(cells.keys, cells.values, strict=True)
        for start in range(0, len(cells.positions), BLOCK_TOKENS)
    ]


def _through(state: SequenceState, level: Level, shape: KvShape) -> tuple[SequenceState, int]:
    """Return the state with its rows encoded and decoded, and the bytes that it took."""
    size = 0
    layers: list[list[Rows]] = []
    for start, rows in _blocks(state):
        tokens = len(rows.keys) // shape.row_bytes
        block = encode(level, *rows, tokens=tokens, shape=shape, begins_text=start == 0)
        size += len(block)
        if start == 0:
            layers.append([])
        layers[-1].append(decode(level, block, tokens=tokens, shape=shape))

    def joined(pick: Callable[[Rows], bytes]) -> tuple[NDArray[np.uint8], ...]:
        count = len(state.cells.positions)
        return tuple(
            np.frombuffer(b"".join(pick(rows) for rows in layer), np.uint8).reshape(count, -1)
            for layer in layers
        )

    keys, values = joined(lambda rows: rows.keys), joined(lambda rows: rows.values)
    return SequenceState(Cells(state.cells.positions, keys, values), state.layout), size


def _quality(
    model: PlainModel, chosen: list[_Text], job: CodecJob, shape: KvShape, kept: list[SequenceState]
) -> tuple[QualityRow, ...]:
    """Score all texts in every way; the f16 states of the prefixes are put into ``kept``."""
    scores: dict[tuple[str, str], _Scores] = {
        **{("codec", level): _Scores() for level in LEVELS},
        **{("llama.cpp", name): _Scores() for name in OWN},
    }
    n_ctx = job.prefix + job.scored + BLOCK_TOKENS
    n_ctx += -n_ctx % 256
    contexts = {
        number: PlainContext(model, kind=number, n_ctx=n_ctx, threads=job.threads)
        for number in (_F16, *OWN.values())
    }
    for text in chosen:
        prefix, rest = text.tokens[: job.prefix], text.tokens[job.prefix :]
        plain = contexts[_F16]
        plain.clear()
        plain.feed(prefix, 0, logits=False)
        state = plain.cells()
        kept.append(state)
        exact: NDArray[np.float64] | None = None
        for level in LEVELS:
            lossy, size = _through(state, level, shape)
            plain.load(lossy)
            logits = plain.feed(rest[:-1], job.prefix, logits=True)
            assert logits is not None, "they were asked for"
            score = scores["codec", level]
            score.bytes += size
            found = score.add(logits, rest[1:], exact)
            exact = found if level == EXACT else exact
        for name, number in OWN.items():
            own = contexts[number]
            own.clear()
            own.feed(prefix, 0, logits=False)
            score = scores["llama.cpp", name]
            score.bytes += own.cells().layout.cell_bytes * job.prefix
            logits = own.feed(rest[:-1], job.prefix, logits=True)
            assert logits is not None, "they were asked for"
            score.add(logits, rest[1:], exact)
    for context in contexts.values():
        context.close()
    base = np.concatenate(scores["codec", EXACT].losses)
    tokens = job.prefix * len(chosen)
    whole = kept[0].layout.cell_bytes * tokens
    rows: list[QualityRow] = []
    for (how, kind), score in scores.items():
        losses = np.concatenate(score.losses)
        growth = losses - base
        rows.append(
            QualityRow(
                how=how,
                kind=kind,
                ratio=whole / score.bytes,
                bytes_per_token=score.bytes / tokens,
                perplexity=math.exp(float(losses.mean())),
                cost=math.expm1(float(growth.mean())),
                cost_error=float(growth.std()) / math.sqrt(len(growth)),
                divergence=statistics.fmean(score.divergences) if score.divergences else 0.0,
            )
        )
    return tuple(rows)


def _codec(states: list[SequenceState], shape: KvShape, rounds: int) -> tuple[CodecRow, ...]:
    """Time the levels in turn, on blocks of all texts."""
    every = [rows for state in states for _, rows in _blocks(state)]
    raw = every[:: max(1, len(every) // _TIMED_BLOCKS)]
    raw = [rows for rows in raw if len(rows.keys) == BLOCK_TOKENS * shape.row_bytes]
    nbytes = sum(len(rows.keys) + len(rows.values) for rows in raw)
    spent: dict[Level, list[tuple[float, float]]] = {level: [] for level in LEVELS}
    last: dict[Level, tuple[list[bytes], list[Rows]]] = {}
    for _ in range(rounds + 1):
        for level in LEVELS:
            began = time.thread_time()
            blocks = [encode(level, *rows, tokens=BLOCK_TOKENS, shape=shape) for rows in raw]
            middle = time.thread_time()
            found = [decode(level, block, tokens=BLOCK_TOKENS, shape=shape) for block in blocks]
            spent[level].append((middle - began, time.thread_time() - middle))
            last[level] = blocks, found

    def off(pick: Callable[[Rows], bytes], found: list[Rows]) -> float:
        wanted = np.frombuffer(b"".join(map(pick, raw)), "<f2").astype(np.float64)
        got = np.frombuffer(b"".join(map(pick, found)), "<f2").astype(np.float64)
        return float(np.sqrt(np.square(got - wanted).sum() / np.square(wanted).sum()))

    rows: list[CodecRow] = []
    for level, (blocks, found) in last.items():
        size = sum(map(len, blocks))
        # the first round warms up
        encoding, decoding = zip(*spent[level][1:], strict=True)
        rows.append(
            CodecRow(
                level=level,
                ratio=nbytes / size,
                bytes_per_token=size / (len(raw) * BLOCK_TOKENS),
                encode_mb_per_second=nbytes / 1e6 / statistics.median(encoding),
                decode_mb_per_second=nbytes / 1e6 / statistics.median(decoding),
                key_error=off(lambda rows: rows.keys, found),
                value_error=off(lambda rows: rows.values, found),
            )
        )
    return tuple(rows)


def measure(job: CodecJob) -> CodecResult:
    """Measure in this process, which llama.cpp may print from and abort."""
    shape = kv_shape(read_header(Path(job.path)))
    model = PlainModel(job.path)
    chosen = _chosen(model, job)
    states: list[SequenceState] = []
    quality = _quality(model, chosen, job, shape, states)
    model.close()
    return CodecResult(
        texts=tuple(text.name for text in chosen),
        scored_tokens=len(chosen) * job.scored,
        codec=_codec(states, shape, job.rounds),
        quality=quality,
    )


def measure_apart(job: CodecJob) -> CodecResult:
    """Measure in a child process; raises :class:`RunnerFailed` when it dies or takes too long."""
    return measured_apart("pyagent_node.benchmarks.kv_codec", job, CodecResult, seconds=SECONDS)


if __name__ == "__main__":
    answer(CodecJob, measure)
