"""A toy model for the simulator: exact, tiny, and sensitive to every mistake of a pipeline.

Activations are small integers held in float32, so arithmetic is exact and any cut of the layers
gives the same result.  As with a real backend, what a row becomes depends on the kernel that it
goes through: rows of a piece of at least 64, which begins at a multiple of 64, go one way however
the prompt is cut; those of other pieces another, by the length of the piece; single rows and rows
of decoding a third.  Each layer mixes a token with its position, the layer's number and a
position-weighted sum over all earlier tokens of the sequence, so a wrong order, a lost or repeated
step, a foreign slot or a skipped layer changes every later token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice, repeat
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, RunnerFailed, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    PREFILL_CHUNK,
    Activations,
    BackendInfo,
    CellAttention,
    FreeSequence,
    KvRange,
    LayerKv,
    OpenSequence,
    ResetSequences,
    SequenceOp,
    StepInput,
    StepOutput,
    Tokens,
    TrimSequence,
)
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.inference.trees import check_tree, decode_tree
from pyagent_node.native import sample

PRIME: Final = 32749
"""Activations are residues of this prime, so that products fit an int64 and values a float32."""
N_EMBD: Final = 6
N_VOCAB: Final = 130
END_TOKEN: Final = 129
BOS_TOKEN: Final = 128

TOY_CELLS: Final = "toy/1/i2"
"""The toy's cell format: the row that a token brings to a layer, its first half for a key and the
other for a value, as little-endian 16-bit integers."""
TILE: Final = 64
"""Rows that a long piece of a prompt is computed in."""
_CELL: Final = np.dtype("<i2")
_HALF: Final = N_EMBD // 2

_Ints = NDArray[np.int64]

_ROLLED: Final[Sequence[_Ints]] = [np.roll(np.arange(N_EMBD), k) for k in range(N_EMBD)]
"""Indices that turn a row by so many places."""
_WEIGHTS: Final[_Ints] = np.arange(1, N_VOCAB + 1, dtype=np.int64)[:, None] * np.arange(
    3, 3 + N_EMBD
)
"""Of the output head."""


def toy_vocabulary() -> Vocabulary:
    """Return the toy's tokens: ASCII characters, a BOS and an end token without text."""
    pieces = tuple(bytes([i]) for i in range(128))
    return Vocabulary(pieces=(*pieces, b"", b""), end_tokens=frozenset({END_TOKEN}))


class ToyEmbeddings:
    """The toy's embedding table."""

    def rows(self, tokens: Tokens) -> Activations:
        """Return the rows of ``tokens``."""
        ids = tokens.astype(np.int64)[:, None]
        rows: _Ints = (ids * 31 + np.arange(1, N_EMBD + 1) * 977) % PRIME
        return rows.astype(np.float32)


class ToyTokenizer:
    """One token a character."""

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the characters' codes, with BOS before them if ``add_special``."""
        ids = [min(ord(c), 127) for c in text]
        return [BOS_TOKEN, *ids] if add_special else ids

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return ``role:content`` lines."""
        text = "".join(f"{m.role}:{m.content}\n" for m in messages)
        return await self.tokenize(text, add_special=False, parse_special=False)


def _attend(past: _Ints, row: _Ints, position: int) -> _Ints:
    """Return a layer's state with one token's cell added."""
    state: _Ints = (past + row * (position + 1)) % PRIME
    return state


def _way(position: int, n: int, *, decoding: bool) -> int:
    """Return the kernel by which the rows of a piece of ``n`` from ``position`` on are computed."""
    if decoding or n <= MAX_DECODE_ROWS:
        return 0
    return 1 if n >= TILE and position % TILE == 0 else n + 1


def _prompt_ways(n: int) -> list[int]:
    """Return the kernel of each row of a prompt that is computed whole."""
    ways: list[int] = []
    for start in range(0, n, PREFILL_CHUNK):
        rows = min(PREFILL_CHUNK, n - start)
        ways += [_way(start, rows, decoding=False)] * rows
    return ways


def _layer(layer: int, position: int, past: _Ints, row: _Ints, way: int) -> tuple[_Ints, _Ints]:
    """Return the row after ``layer``, and the layer's state with this token added."""
    state = _attend(past, row, position)
    mixed = row * (layer + 3) + state[_ROLLED[layer % N_EMBD]] + position * 7 + layer + way * 5
    return mixed % PRIME, state


def _logits(row: _Ints) -> NDArray[np.float32]:
    mixed = ((_WEIGHTS * row).sum(axis=1) * _WEIGHTS[:, 0]) % PRIME
    logits: NDArray[np.float32] = (mixed / PRIME * 8).astype(np.float32)
    logits[END_TOKEN] -= 4
    return logits


def toy_sample(
    logits: NDArray[np.float32], history: Sequence[int], params: SamplingParams
) -> Sampled:
    """Sample as a runner does."""
    bias = sorted(params.logit_bias.items())
    token, logprob, top = sample(
        logits,
        np.array(history, dtype=np.int32),
        len(history),
        seed=params.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        bias_tokens=np.array([t for t, _ in bias], dtype=np.int32),
        bias_values=np.array([b for _, b in bias], dtype=np.float32),
        top_logprobs=params.top_logprobs if params.logprobs else -1,
        **({"noisy": True} if params.noisy_top else {}),
    )
    return Sampled(token, logprob if params.logprobs else None, tuple(top))


def toy_generate(
    n_layers: int, prompt: Sequence[int], n: int, params: SamplingParams, *, one_way: bool = False
) -> list[int]:
    """Return what the whole toy model answers: the reference for every pipeline of it.

    With ``one_way`` as it does where all rows go through the same kernel.
    """
    return list(islice(toy_tokens(n_layers, prompt, params, one_way=one_way), n))


def toy_tokens(
    n_layers: int, prompt: Sequence[int], params: SamplingParams, *, one_way: bool = False
) -> Iterator[int]:
    """Yield the tokens of the whole toy model's answer, up to its end."""
    states = [np.zeros(N_EMBD, dtype=np.int64) for _ in range(n_layers)]
    history: list[int] = []
    ways = [0] * len(prompt) if one_way else _prompt_ways(len(prompt))
    pending = list(zip(prompt, ways, strict=True))
    while True:
        row = np.zeros(N_EMBD, dtype=np.int64)
        for token, way in pending:
            row = _embed(token)
            for layer in range(n_layers):
                row, states[layer] = _layer(layer, len(history), states[layer], row, way)
            history.append(token)
        token = toy_sample(_logits(row), history, params).token
        if token == END_TOKEN:
            return
        yield token
        pending = [(token, 0)]


def _embed(token: int) -> _Ints:
    row: _Ints = ToyEmbeddings().rows(np.array([token], dtype=np.int32))[0].astype(np.int64)
    return row


class _Slot:
    def __init__(self, layers: int, sampling: SamplingParams | None) -> None:
        self.sampling = sampling
        self.history: list[int] = []
        self.states = [np.zeros(N_EMBD, dtype=np.int64) for _ in range(layers)]
        self.before: list[list[_Ints]] = []
        """The states before each token of the history."""
        self.rows: list[list[_Ints]] = []
        """What each token of the history brought to each layer: its cells."""

    def trim(self, start: int) -> None:
        if start < len(self.history):
            self.states = self.before[start]
            del self.history[start:], self.before[start:], self.rows[start:]

    def add(self, token: int, rows: list[_Ints], states: list[_Ints]) -> None:
        """Append a token with its cells, and the states that it leads to, one a layer."""
        self.before.append(self.states)
        self.states = states
        self.rows.append(rows)
        self.history.append(token)


class ToyRunner:
    """A runner of one slice of the toy, with the simulator's clock for a processor.

    ``seconds`` is what one decode takes.  ``widths`` records the size of each step of each decode.
    With ``one_way`` all rows go through the same kernel, however a text is cut.
    It refuses anything that a stage must never ask for.  As with a process, a decode that nobody
    waits for any more is finished all the same, and what comes next waits for that.
    """

    def __init__(
        self,
        part: Slice,
        *,
        whole: bool = False,
        n_ctx: int = 4096,
        n_seq: int = 8,
        seconds: float = 0.0,
        one_way: bool = False,
        exactness: str = "",
        prefill_cut: int = 64,
    ) -> None:
        self.seconds = seconds
        self._one_way = one_way
        self.failed = trio.Event()
        self.failure: RunnerFailed | None = None
        self.widths: list[list[int]] = []
        self.tokens_done = 0
        self.refused = ""
        """What it was asked last that a stage must never ask for."""
        self._part = part
        self._whole = whole
        self._slots: dict[int, _Slot] = {}
        self._lock = trio.Lock()
        self._abandoned: tuple[StepInput, ...] = ()
        self._until = 0.0
        self.info = BackendInfo(
            backend="toy",
            version="1",
            device="cpu",
            slice=part,
            n_embd=N_EMBD,
            n_vocab=N_VOCAB,
            n_ctx=n_ctx,
            n_seq=n_seq,
            threads=1,
            kv_bytes_per_token=8 * N_EMBD * (part.last - part.first),
            memory_bytes=1,
            batch_invariant_widths=(1, 2, 4, 8),
            kv_portable=True,
            kv_codec=TOY_CELLS,
            prefill_cut=prefill_cut,
            joint_shapes=((2, 4), (4, 4), (8, 4)),
            exactness=exactness,
        )

    @property
    def open_slots(self) -> int:
        """How many slots are in use."""
        return len(self._slots)

    def kill(self, reason: str = "SIGKILL") -> None:
        """Die as a killed process does."""
        self.failure = RunnerFailed(f"The runner was killed by {reason}.", reason=reason)
        self.failed.set()

    def _refuse(self, why: str) -> InvalidRequest:
        self.refused = why
        return InvalidRequest(why)

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations."""
        await trio.lowlevel.checkpoint()
        async with self._lock:
            await self._drain()
            for op in ops:
                self._apply(op)

    def _apply(self, op: SequenceOp) -> None:
        if isinstance(op, OpenSequence):
            if op.seq in self._slots or not 0 <= op.seq < self.info.n_seq:
                raise self._refuse(f"slot {op.seq} cannot be opened")
            self._slots[op.seq] = _Slot(self._part.last - self._part.first, op.sampling)
        elif isinstance(op, FreeSequence):
            if self._slots.pop(op.seq, None) is None:
                raise self._refuse(f"slot {op.seq} is not open")
        elif isinstance(op, ResetSequences):
            self._slots.clear()
        elif isinstance(op, TrimSequence):
            trimmed = self._slots.get(op.seq)
            held = 0 if trimmed is None else len(trimmed.history)
            if trimmed is None or not 0 < op.start < held:
                raise self._refuse(f"trimming {held} tokens to {op.start}")
            trimmed.trim(op.start)

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute one batch."""
        if self._lock.locked() and not self._abandoned:
            raise self._refuse("two decodes at once")
        async with self._lock:
            await self._drain()
            self._abandoned = (*steps,)
            self._until = trio.current_time() + self.seconds
            return await self._finish()

    async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy the cells of tokens out."""
        await trio.lowlevel.checkpoint()
        async with self._lock:
            await self._drain()
            slot = self._slots.get(seq)
            if slot is None or not 0 <= start < stop <= len(slot.history):
                raise self._refuse(f"cells {start} to {stop} of slot {seq} are not there")
            layers: list[LayerKv] = []
            for index, layer in enumerate(range(self._part.first, self._part.last)):
                rows = np.array([cells[index] for cells in slot.rows[start:stop]]).astype(_CELL)
                layers.append(LayerKv(layer, rows[:, :_HALF].tobytes(), rows[:, _HALF:].tobytes()))
            return KvRange(TOY_CELLS, start, stop, tuple(layers))

    async def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Append cells to a sequence that ends where they begin."""
        await trio.lowlevel.checkpoint()
        async with self._lock:
            await self._drain()
            slot = self._slots.get(seq)
            n = kv.stop - kv.start
            if slot is None or kv.start != len(slot.history) or len(tokens) != n:
                raise self._refuse(f"cells {kv.start} to {kv.stop} do not fit slot {seq}")
            if kv.codec != TOY_CELLS:
                raise Unsupported("not the toy's cells", code="kv_codec")
            layers = list(range(self._part.first, self._part.last))
            if [part.layer for part in kv.layers] != layers:
                raise CorruptData("the cells are of other layers", code="kv_malformed")
            rows = [_joined(part, n) for part in kv.layers]
            for i, token in enumerate(tokens.tolist()):
                cells, at = [of_layer[i] for of_layer in rows], len(slot.history)
                slot.add(token, cells, list(map(_attend, slot.states, cells, repeat(at))))

    async def attention(self, seq: int) -> CellAttention:
        """Refuse: the toy attends to everything alike."""
        await trio.lowlevel.checkpoint()
        raise Unsupported("The toy does not measure attention.", code="no_pruning")

    async def _drain(self) -> None:
        """Let a decode end that nobody waits for; nobody is told how it went."""
        if not self._abandoned:
            self._check_alive()
            return
        with contextlib.suppress(InvalidRequest):
            await self._finish()

    async def _finish(self) -> list[StepOutput]:
        """Wait for the decode in progress and return its outputs."""
        with trio.move_on_at(self._until):
            await self.failed.wait()
        await trio.lowlevel.checkpoint()
        self._check_alive()
        steps, self._abandoned = self._abandoned, ()
        if not steps:
            return []
        self.widths.append([len(s.tokens) for s in steps])
        if len({s.seq for s in steps}) != len(steps):
            raise self._refuse("one sequence twice in a batch")
        return [self._step(s) for s in steps]

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _step(self, step: StepInput) -> StepOutput:
        if not step.parents:
            return self._chain(step)
        slot, tokens = self._slot(step), step.tokens.tolist()
        check_tree(step.parents, tokens, step.drafts)
        before = slot.history[:]
        output = decode_tree(step, self._chain, slot.trim)
        assert slot.history[: len(before)] == before, "nothing known is taken back"
        return output

    def _slot(self, step: StepInput) -> _Slot:
        slot = self._slots.get(step.seq)
        held = -1 if slot is None else len(slot.history)
        if slot is None or step.position != held:
            raise self._refuse(f"position {step.position} after {held} tokens")
        return slot

    def _chain(self, step: StepInput) -> StepOutput:
        slot = self._slot(step)
        if (step.activations is None) != self._whole:
            raise self._refuse("activations are for slices, tokens for a whole model")
        rows = ToyEmbeddings().rows(step.tokens) if self._whole else step.activations
        assert rows is not None, "checked above"
        out = np.empty((len(step.tokens), N_EMBD), dtype=np.float32)
        if step.drafts and not (0 < step.drafts < len(step.tokens) and slot.history):
            raise self._refuse(f"{step.drafts} guesses among {len(step.tokens)} tokens")
        if step.sample and not self._part.head:
            raise self._refuse("a slice without the output head cannot sample")
        self.tokens_done += len(step.tokens)
        sampled: list[Sampled] = []
        way = _way(len(slot.history), len(step.tokens), decoding=self._one_way or step.drafts > 0)
        for i, token in enumerate(step.tokens):
            if sampled and sampled[-1].token != token:
                break
            row = rows[i].astype(np.int64)
            cells: list[_Ints] = []
            states: list[_Ints] = []
            for index, layer in enumerate(range(self._part.first, self._part.last)):
                cells.append(row)
                row, state = _layer(layer, len(slot.history), slot.states[index], row, way)
                states.append(state)
            slot.add(int(token), cells, states)
            out[i] = row
            if step.sample and i >= len(step.tokens) - step.drafts - 1:
                assert slot.sampling is not None, "a head slot is opened with sampling"
                sampled.append(toy_sample(_logits(row), slot.history, slot.sampling))
        return StepOutput(None if self._part.head else out, tuple(sampled))


def _joined(part: LayerKv, n: int) -> _Ints:
    """Return the rows of one layer's cells, shape (n, N_EMBD)."""
    size = n * _HALF * _CELL.itemsize
    if (len(part.keys), len(part.values)) != (size, size):
        raise CorruptData("the cells have another size", code="kv_malformed")
    halves = [np.frombuffer(data, _CELL).reshape(n, _HALF) for data in (part.keys, part.values)]
    rows: _Ints = np.concatenate(halves, axis=1).astype(np.int64)
    return rows
