"""The landmark form of chunks' KV against whole chunks and full prefill: bytes and quality.

Prompts of a few chunks of real text with a fact told in each.  Every chunk is computed alone, as
for joining, and its cells go into a prompt in several forms: whole, whole at lossy levels, and a
few cells alone, chosen by attention or, for comparison, without it.  Behind each prompt the facts
are asked for; how far the distributions of the words asked for and of their answers are from those
of the other ways says what a form costs.

    python -m pyagent_node.benchmarks.context_landmarks --model FILE
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple, cast

import click
import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.context_memory_text import FACTS
from pyagent_node.benchmarks.kv_texts import texts
from pyagent_node.inference.backend import (
    PREFILL_CHUNK,
    CellAttention,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    StepInput,
    Tokens,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.kv.chunks import alone, moved_to
from pyagent_node.inference.kv.landmarks import NEAR, PROBE, chosen, picked, places, spans_at
from pyagent_node.inference.kv.pieces import SKIP_TOKENS, Piece
from pyagent_node.inference.kv.pruning import Positions
from pyagent_node.inference.kv.ranges import part_of
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.sharding.kv_codec import EXACT, KvShape, Level, decode, encode
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS
from pyagent_node.sharding.kv_landmarks import pack, unpack

N_CTX: Final = 2048
OPENING: Final = "Sources:\n\n"
END: Final = 96
"""Rows at the end of a chunk that are measured, padding among them: 63 tokens at most."""
_PROMPT, _ALONE = 0, 1
Logs = NDArray[np.float64]


class Arm(NamedTuple):
    """A form of the chunks' KV: ``way`` "whole", or how ``cells`` of them are chosen."""

    way: str
    cells: int = 0
    level: Level = EXACT


ARMS: Final = (
    Arm("whole"),
    Arm("whole", 0, "int4"),
    Arm("whole", 0, "int3"),
    Arm("probe", 128),
    Arm("probe", 128, "int4"),
    Arm("probe", 64),
    Arm("probe", 32),
    Arm("again", 128),
    Arm("again", 64),
    Arm("end", 128),
    Arm("end", 64),
    Arm("even", 128),
    Arm("even", 64),
    Arm("none", NEAR),
)
"""``probe`` goes by the attention of a question behind the chunk (``kv.landmarks``), ``again`` by
that of the chunk's own tokens, read once more behind it (KVzip, arXiv:2505.23416), ``end`` by that
of the rows at its end; ``even`` takes cells at equal distances, ``none`` has the tokens that are
computed anew and the last few cells alone."""
FULL: Final = Arm("computed")
"""Nothing is joined."""


class FormRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a form comes to.

    ``bytes`` are the mean of a chunk, in all layers.  ``from_whole`` and ``from_full`` are the mean
    KL divergences, in nats, of the distributions behind the whole chunks and behind the computed
    prompt from those behind this form; ``answers_`` of the answers' first words alone.  ``right``
    is the share of facts told right, ``loss`` that of their words, in nats a token.
    """

    way: str
    cells: int
    level: str
    bytes: int
    from_whole: float
    from_full: float
    answers_from_whole: float
    answers_from_full: float
    right: float
    loss: float


class FormReport(msgspec.Struct, frozen=True, kw_only=True):
    """All rows; ``facts`` were asked for behind ``prompts`` of ``chunks`` chunks each."""

    bench: str
    model: str
    prompts: int
    chunks: int
    tokens: int
    skip: int
    facts: int
    rows: tuple[FormRow, ...]
    seconds: float


class _Fact(NamedTuple):
    question: Tokens
    answer: Tokens


class _Told(NamedTuple):
    """What is told behind a prompt: distributions of all words asked for, facts, losses.

    ``words`` are the tokens of each question.
    """

    logs: tuple[Logs, ...]
    words: tuple[int, ...]
    right: int
    loss: float


class _Made(NamedTuple):
    """A chunk computed alone: its cells, and where three sorts of rows attended."""

    kv: KvRange
    end: CellAttention
    probe: CellAttention
    again: CellAttention


class _Bench:
    def __init__(self, backend: LlamaBackend, opening: Tokens, probe: Tokens) -> None:
        shape = backend.info.kv_shape
        if shape is None or not backend.info.prunes:
            raise Unsupported("This model's cells cannot be chosen or moved.", code="no_pruning")
        self.backend = backend
        self.shape: KvShape = shape
        self.opening = opening
        self.probe = probe
        for seq in (_PROMPT, _ALONE):
            backend.apply(OpenSequence(seq))

    def _empty(self, seq: int) -> None:
        self.backend.apply(FreeSequence(seq))
        self.backend.apply(OpenSequence(seq))

    def feed(self, seq: int, tokens: Tokens, position: int) -> None:
        for at in range(0, len(tokens), PREFILL_CHUNK):
            part = tokens[at : at + PREFILL_CHUNK]
            self.backend.decode([StepInput(seq, position + at, part, None, sample=False)])

    def make(self, tokens: Tokens) -> _Made:
        """Compute a chunk as it is computed for joining, and see where it attends."""
        backend, padded = self.backend, alone(tokens, Piece(0, len(tokens)))
        self._empty(_ALONE)
        backend.apply(WatchSequence(_ALONE, 1, END))
        self.feed(_ALONE, padded, 0)
        end = backend.attention(_ALONE)
        kv = backend.export_kv(_ALONE, 0, len(padded))
        backend.apply(WatchSequence(_ALONE, 1, END))
        self.feed(_ALONE, self.probe, len(padded))
        probe = backend.attention(_ALONE)
        backend.apply(TrimSequence(_ALONE, len(padded)))
        backend.apply(WatchSequence(_ALONE, 1, len(tokens)))
        self.feed(_ALONE, tokens, len(padded))
        return _Made(kv, end, probe, backend.attention(_ALONE))

    # ---- forms -------------------------------------------------------------------------------

    def form(self, made: _Made, tokens: int, arm: Arm) -> tuple[KvRange, int]:
        """Return the cells of a chunk behind its first tokens in a form, and the form's bytes."""
        if arm.way == "whole":
            kv, size = self._coded(made.kv, arm.level)
            return part_of(kv, SKIP_TOKENS, tokens), size
        rest = part_of(made.kv, SKIP_TOKENS, tokens)
        kv = picked(rest, _choice(made, tokens, arm))
        return self._packed(kv, tokens, arm.level)

    def _coded(self, kv: KvRange, level: Level) -> tuple[KvRange, int]:
        """Return whole blocks as they come back at a level."""
        row, size, layers = self.shape.row_bytes, 0, list[LayerKv]()
        for layer in kv.layers:
            keys, values = b"", b""
            for at in range(0, kv.stop * row, BLOCK_TOKENS * row):
                span = slice(at, at + BLOCK_TOKENS * row)
                data = encode(
                    level,
                    layer.keys[span],
                    layer.values[span],
                    tokens=BLOCK_TOKENS,
                    shape=self.shape,
                    begins_text=at == 0,
                )
                size += len(data)
                rows = decode(level, data, tokens=BLOCK_TOKENS, shape=self.shape)
                keys, values = keys + rows.keys, values + rows.values
            layers.append(LayerKv(layer.layer, keys, values))
        return KvRange(kv.codec, kv.start, kv.stop, tuple(layers)), size

    def _packed(self, kv: KvRange, tokens: int, level: Level) -> tuple[KvRange, int]:
        """Return landmarks as they come back from their blocks."""
        at, row, size, layers = places(kv), self.shape.row_bytes, 0, list[LayerKv]()
        for layer in kv.layers:
            keys, values = b"", b""
            for first in range(0, len(at), BLOCK_TOKENS):
                part = at[first : first + BLOCK_TOKENS]
                span = slice(first * row, (first + len(part)) * row)
                data = pack(
                    level,
                    layer.keys[span],
                    layer.values[span],
                    places=part,
                    tokens=tokens,
                    shape=self.shape,
                )
                size += len(data)
                rows = unpack(level, data, shape=self.shape).rows
                keys, values = keys + rows.keys, values + rows.values
            layers.append(LayerKv(layer.layer, keys, values))
        return KvRange(kv.codec, kv.start, kv.stop, tuple(layers), kv.kept), size

    # ---- prompts -----------------------------------------------------------------------------

    def computed(self, chunks: Sequence[Tokens]) -> None:
        """Have the whole prompt computed."""
        self._empty(_PROMPT)
        self.feed(_PROMPT, cast("Tokens", np.concatenate([self.opening, *chunks])), 0)

    def joined(self, chunks: Sequence[Tokens], cells: Sequence[KvRange]) -> None:
        """Have the prompt's chunks joined, but for their first tokens, which are computed."""
        self._empty(_PROMPT)
        self.feed(_PROMPT, self.opening, 0)
        end = len(self.opening)
        for tokens, kv in zip(chunks, cells, strict=True):
            self.feed(_PROMPT, tokens[:SKIP_TOKENS], end)
            start, end = end + SKIP_TOKENS, end + len(tokens)
            layers = tuple(moved_to(kv, start, self.shape))
            moved = KvRange(kv.codec, start, end, layers, spans_at(kv, start))
            self.backend.import_kv(_PROMPT, moved, tokens[SKIP_TOKENS:])

    def told(self, facts: Sequence[_Fact]) -> _Told:
        """Ask for facts behind the prompt."""
        logs: list[Logs] = []
        right, loss = 0, 0.0
        for fact in facts:
            words = cast("Tokens", np.concatenate([fact.question, fact.answer]))
            found = _logs(self.backend.score(words[:-1], _PROMPT))
            answers = found[len(fact.question) - 1 :]
            right += answers.argmax(1).tolist() == fact.answer.tolist()
            loss -= float(answers[np.arange(len(fact.answer)), fact.answer].mean())
            logs.append(found)
        return _Told(tuple(logs), tuple(len(fact.question) for fact in facts), right, loss)


def _choice(made: _Made, tokens: int, arm: Arm) -> Positions:
    """Return the places of the cells of an arm, behind those that are computed anew."""
    if arm.way == "even":
        return np.linspace(SKIP_TOKENS, tokens - 1, arm.cells).round().astype(np.int32)
    if arm.way == "none":
        return np.arange(tokens - arm.cells, tokens, dtype=np.int32)
    where = {"probe": made.probe, "again": made.again, "again-peak": made.again}
    seen = where.get(arm.way, made.end)
    mass = seen.peak if arm.way.endswith("peak") else seen.mass.sum(0)
    return chosen(seen.positions, mass, seen.seen, start=SKIP_TOKENS, stop=tokens, cells=arm.cells)


def row_of(
    arm: Arm, told: Sequence[_Told], whole: Sequence[_Told], full: Sequence[_Told], size: int
) -> FormRow:
    """Return what was told behind the prompts of an arm, against two others."""

    def apart(others: Sequence[_Told]) -> tuple[float, float]:
        every, firsts = list[NDArray[np.float64]](), list[float]()
        for exact, other in zip(others, told, strict=True):
            for wanted, found, words in zip(exact.logs, other.logs, other.words, strict=True):
                rows = _apart(wanted, found)
                every.append(rows)
                firsts.append(float(rows[words - 1]))
        return round(float(np.concatenate(every).mean()), 4), round(float(np.mean(firsts)), 4)

    facts = sum(len(each.logs) for each in told)
    from_whole, from_full = apart(whole), apart(full)
    return FormRow(
        way=arm.way,
        cells=arm.cells,
        level=arm.level,
        bytes=size,
        from_whole=from_whole[0],
        from_full=from_full[0],
        answers_from_whole=from_whole[1],
        answers_from_full=from_full[1],
        right=round(sum(each.right for each in told) / facts, 4),
        loss=round(sum(each.loss for each in told) / facts, 4),
    )


def _logs(logits: NDArray[np.float32]) -> Logs:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide


def _apart(exact: Logs, other: Logs) -> NDArray[np.float64]:
    """Return the KL divergence of each row of ``other`` from that of ``exact``."""
    return cast("NDArray[np.float64]", (np.exp(exact) * (exact - other)).sum(1))


def chunks_of(
    vocabulary: LlamaTokenizer, count: int, size: int
) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """Yield ``count`` chunks of ``size`` tokens with a fact in each, its question and answer."""

    def tokenise(words: str) -> list[int]:
        found = vocabulary.tokenize(words.encode(), add_special=False, parse_special=False)
        return cast("list[int]", found.tolist())

    filler: list[int] = []
    for _, text in texts():
        if len(filler) >= count * size:
            break
        filler += tokenise(text)[: 2 * size]
    for number, (told, word) in enumerate(FACTS[:count]):
        question, answer = tokenise(f"\n\nNote: {told}"), tokenise(word)
        fact = [*question, *answer, *tokenise(".\n\n")]
        part = filler[number * size : (number + 1) * size]
        at = (number * 7 % 10 + 1) * (size - len(fact)) // 12  # all over the chunks
        made = [*part[:at], *fact, *part[at : size - len(fact)]]
        yield np.array(made, np.int32), np.array(question, np.int32), np.array(answer, np.int32)


def measure(
    path: Path,
    *,
    prompts: int,
    chunks: int,
    size: int,
    threads: int,
    arms: Sequence[Arm] = ARMS,
) -> FormReport:
    """Measure ``arms``, of which the first is the whole form.

    Raises what loading the model raises, and :class:`Unsupported` (``no_pruning``).
    """
    began = time.perf_counter()
    with closing(LlamaTokenizer(path)) as vocabulary:
        every = list(chunks_of(vocabulary, prompts * chunks, size))
        opening = vocabulary.tokenize(OPENING.encode(), add_special=True, parse_special=False)
        probe = vocabulary.tokenize(PROBE.encode(), add_special=False, parse_special=False)
    found: dict[Arm | None, list[_Told]] = {None: [], **{arm: [] for arm in arms}}
    sizes: dict[Arm, int] = dict.fromkeys(arms, 0)
    part = Slice(0, model_shape(read_header(path)).n_layers, head=True)
    with closing(LlamaBackend(path, part, n_ctx=N_CTX, n_seq=2, threads=threads)) as backend:
        bench = _Bench(backend, opening, probe)
        for first in range(0, len(every), chunks):
            batch = every[first : first + chunks]
            parts = [tokens for tokens, _, _ in batch]
            facts = [_Fact(question, answer) for _, question, answer in batch]
            made = [bench.make(tokens) for tokens in parts]
            bench.computed(parts)
            found[None].append(bench.told(facts))
            for arm in arms:
                forms = [bench.form(each, size, arm) for each in made]
                sizes[arm] += sum(each for _, each in forms)
                bench.joined(parts, [kv for kv, _ in forms])
                found[arm].append(bench.told(facts))
    full, whole = found[None], found[arms[0]]
    whole_size = sizes[arms[0]] // len(every)
    rows = [row_of(FULL, found[None], whole, full, whole_size)]
    rows += [row_of(arm, found[arm], whole, full, sizes[arm] // len(every)) for arm in arms]
    return FormReport(
        bench="context-landmarks",
        model=path.name,
        prompts=prompts,
        chunks=chunks,
        tokens=size,
        skip=SKIP_TOKENS,
        facts=len(every),
        rows=tuple(rows),
        seconds=round(time.perf_counter() - began, 1),
    )


@click.command()
@click.option("--model", required=True, type=Path, help="A GGUF file of a whole model.")
@click.option("--prompts", default=4, type=click.IntRange(1, 24), help="Prompts.")
@click.option("--chunks", default=3, type=click.IntRange(1, 6), help="Chunks in each.")
@click.option("--tokens", default=256, type=click.IntRange(200, 300), help="Tokens of a chunk.")
@click.option("--threads", default=2, type=click.IntRange(1, 64), help="Threads of llama.cpp.")
def main(*, model: Path, prompts: int, chunks: int, tokens: int, threads: int) -> None:
    """Measure, and print one line of JSON; see the module."""
    if prompts * chunks > len(FACTS):
        raise click.UsageError(f"There are {len(FACTS)} facts, one for a chunk.")
    report = measure(model, prompts=prompts, chunks=chunks, size=tokens, threads=threads)
    click.echo(msgspec.json.encode(report).decode())


if __name__ == "__main__":
    main()
