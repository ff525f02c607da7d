"""Runners as the daemon sees them: a slice or a vocabulary in a process of its own.

    async with open_slice_runner(spec) as runner:
        outputs = await runner.decode(steps)

One request runs at a time; callers wait in order.  A prompt longer than one chunk is sent chunk by
chunk, so nobody waits for more than one chunk of somebody else's, and cancelling takes effect
between two.  After a cancelled or failed ``decode`` trim or free its sequences.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
import trio

from pyagent_node.base.errors import CorruptData, InvalidRequest, RunnerFailed
from pyagent_node.base.limits import MAX_TAIL, MIB
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    PREFILL_CHUNK,
    BackendInfo,
    CellAttention,
    KvRange,
    KvUsage,
    SequenceOp,
    StepInput,
    StepOutput,
    Tokens,
)
from pyagent_node.inference.backend_names import DEFAULT
from pyagent_node.inference.call_times import CallTimes
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.kv.ranges import joined
from pyagent_node.inference.runner_health import Pace
from pyagent_node.inference.runner_packing import (
    pack_kv,
    pack_steps,
    unpack_attention,
    unpack_kv,
    unpack_outputs,
    unpack_pieces,
    unpack_tokens,
)
from pyagent_node.inference.runner_process import (
    CALL_SECONDS,
    LOAD_SECONDS,
    RunnerProcess,
    start_process,
)
from pyagent_node.inference.runner_protocol import (
    OPS_ENCODER,
    AnyReply,
    AnyRequest,
    Apply,
    AttentionReport,
    Chat,
    Decode,
    Decoded,
    Done,
    ExportedKv,
    ExportKv,
    GetAttention,
    GetKvUsage,
    GetPieces,
    ImportKv,
    KvUsageReport,
    LoadSlice,
    LoadTokenizer,
    PieceTable,
    Ping,
    SliceLoaded,
    Tail,
    Text,
    Tokenize,
    TokenizerInfo,
    TokenizerLoaded,
    TokenList,
)
from pyagent_node.inference.threads import default_threads

MAX_TEXT: Final = 8 * MIB
"""Bytes of text that a tokenizer takes at once."""
KV_PIECE_BYTES: Final = MAX_TAIL // 2
"""Bytes of KV that travel in one message; longer ranges go in several."""

R = TypeVar("R", bound=AnyReply)


class RunnerSpec(msgspec.Struct, frozen=True):
    """Which slice a runner is to load, and how.

    ``threads`` is what :func:`threads.default_threads` says where not given.  ``backend`` is one of
    ``backends.CHOICES``.
    """

    path: str
    slice: Slice
    n_ctx: int
    n_seq: int
    threads: int | None = None
    backend: str = DEFAULT


class Runner:
    """What runners of both kinds have in common."""

    def __init__(self, process: RunnerProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def failed(self) -> trio.Event:
        """Set when the process is gone."""
        return self._process.failed

    @property
    def failure(self) -> RunnerFailed | None:
        """Why it is gone; ``None`` while it lives."""
        return self._process.failure

    async def ping(self) -> None:
        """Wait for an answer; raises :class:`RunnerFailed`."""
        await self._ask(Ping(self._process.next_id()), Done)

    async def _ask(
        self,
        request: AnyRequest,
        expected: type[R],
        tail: Tail = b"",
        *,
        seconds: float = CALL_SECONDS,
    ) -> tuple[R, Tail]:
        reply, data = await self._process.call(request, tail, seconds=seconds)
        return _expect(reply, expected), data


class SliceRunner(Runner):
    """A loaded slice; the methods mean what the ``Backend`` port says, and raise what it says."""

    def __init__(self, process: RunnerProcess, info: BackendInfo) -> None:
        super().__init__(process)
        self._info = info
        self._pace = Pace()
        self.times = CallTimes()
        """How long computations took lately."""

    @property
    def info(self) -> BackendInfo:
        """What the slice says of itself."""
        return self._info

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Run the slice over ``steps`` and return their outputs in order.

        Raises what the backend raises, and :class:`RunnerFailed`.
        """
        small = [i for i, s in enumerate(steps) if s.drafts or len(s.tokens) <= MAX_DECODE_ROWS]
        if len(small) == len(steps):
            return await self._decode(steps)
        outputs: list[StepOutput | None] = [None] * len(steps)
        for index, step in enumerate(steps):
            if index not in small:
                outputs[index] = await self._prefill(step)
        if small:
            done = await self._decode([steps[i] for i in small])
            for index, output in zip(small, done, strict=True):
                outputs[index] = output
        return [output for output in outputs if output is not None]

    async def _prefill(self, step: StepInput) -> StepOutput:
        """Run one long step, piece by piece."""
        at = 0
        parts: list[StepOutput] = []
        while at < len(step.tokens):
            position = step.position + at
            stop = min(len(step.tokens), at + PREFILL_CHUNK - position % PREFILL_CHUNK)
            rows = None if step.activations is None else step.activations[at:stop]
            last = stop == len(step.tokens)
            piece = StepInput(step.seq, position, step.tokens[at:stop], rows, step.sample and last)
            parts += await self._decode([piece])
            at = stop
        arrays = [part.activations for part in parts if part.activations is not None]
        return StepOutput(np.concatenate(arrays) if arrays else None, parts[-1].sampled)

    async def _decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        headers, tail = pack_steps(steps)
        rows, began = sum(len(step.tokens) for step in steps), trio.current_time()
        reply, data = await self._ask(
            Decode(self._process.next_id(), headers),
            Decoded,
            tail,
            seconds=self._pace.patience(rows, CALL_SECONDS),
        )
        took = trio.current_time() - began
        self._pace.took(rows, took)
        self.times.took(rows, took)
        return unpack_outputs(reply.outputs, data, self._info.n_embd)

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations in order; what came before a refused one is done."""
        tail = OPS_ENCODER.encode(list(ops))
        await self._ask(Apply(self._process.next_id()), Done, tail)

    async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy the cells of tokens ``[start, stop)`` out."""
        pieces: list[KvRange] = []
        for first, last in self._kv_pieces(start, stop):
            request = ExportKv(self._process.next_id(), seq, first, last)
            reply, data = await self._ask(request, ExportedKv)
            kv, _ = unpack_kv(reply.codec, first, last, reply.layers, data, with_tokens=False)
            pieces.append(kv)
        return joined(pieces)

    async def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Write cells in; when a later part of a long range is refused the earlier ones stay.

        A range with gaps travels in one message, so it must fit in one.
        """
        pieces = [(kv.start, kv.stop)] if kv.kept else self._kv_pieces(kv.start, kv.stop)
        for first, last in pieces:
            inside = tokens[first - kv.start : last - kv.start]
            packed = pack_kv(kv, inside, start=first, stop=last)
            request = ImportKv(
                self._process.next_id(), seq, kv.codec, first, last, packed.layers, kv.kept
            )
            await self._ask(request, Done, packed.tail)

    async def attention(self, seq: int) -> CellAttention:
        """Return where a watched sequence attended."""
        request = GetAttention(self._process.next_id(), seq)
        reply, data = await self._ask(request, AttentionReport)
        return unpack_attention(reply.n, reply.layers, reply.rows, data)

    async def kv_usage(self, seq: int) -> KvUsage:
        """Return what the cells of a sequence take."""
        reply, _ = await self._ask(GetKvUsage(self._process.next_id(), seq), KvUsageReport)
        return reply.usage

    def _kv_pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        step = max(1, KV_PIECE_BYTES // max(1, self._info.kv_bytes_per_token))
        return [(at, min(at + step, stop)) for at in range(start, stop, step)] or [(start, stop)]


class TokenizerRunner(Runner):
    """The vocabulary of a model."""

    def __init__(self, process: RunnerProcess, info: TokenizerInfo) -> None:
        super().__init__(process)
        self._info = info

    @property
    def info(self) -> TokenizerInfo:
        """What the vocabulary says of itself."""
        return self._info

    async def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Return the tokens of ``text``.

        ``add_special`` adds BOS and EOS where the model wants them; ``parse_special`` reads control
        tokens spelled out in the text as such: never give it text of a stranger.  Raises
        :class:`InvalidRequest` (``bad_text``, ``text_too_long``).
        """
        request = Tokenize(self._process.next_id(), add_special, parse_special)
        _, data = await self._ask(request, TokenList, _utf8(text))
        return _token_list(data)

    async def pieces(self) -> list[bytes]:
        """Return the bytes of every token; control tokens have none."""
        reply, data = await self._ask(GetPieces(self._process.next_id()), PieceTable)
        return unpack_pieces(reply.n, data)

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the tokens of a conversation in the model's template, ready for the answer.

        Control tokens spelled out in a message are read as plain text.  Raises
        :class:`Unsupported` (``no_chat_template``), :class:`InvalidRequest` (``bad_messages``,
        ``text_too_long``) and :class:`LimitExceeded` (``template_limit``).
        """
        _, data = await self._chat(messages, as_tokens=True, expected=TokenList)
        return _token_list(data)

    async def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the text of a conversation in the model's template; errors as for :meth:`chat`.

        For people to look at: tokenise a conversation with :meth:`chat`, which cannot be tricked.
        """
        _, data = await self._chat(messages, as_tokens=False, expected=Text)
        return bytes(data).decode()

    async def _chat(
        self, messages: Sequence[ChatMessage], *, as_tokens: bool, expected: type[R]
    ) -> tuple[R, Tail]:
        for message in messages:
            _utf8(message.role)
            _utf8(message.content)
        tail = OPS_ENCODER.encode(list(messages))
        _check_text(len(tail))
        request = Chat(self._process.next_id(), as_tokens, time.time())
        return await self._ask(request, expected, tail)


@contextlib.asynccontextmanager
async def open_slice_runner(spec: RunnerSpec) -> AsyncIterator[SliceRunner]:
    """Start a process, load a slice in it and end the process with the context.

    Raises what loading raises (see ``backends.open_backend``) and :class:`RunnerFailed`.
    """
    part = spec.slice
    threads = default_threads() if spec.threads is None else spec.threads
    async with start_process(f"layers {part} of {Path(spec.path).name}") as process:
        request = LoadSlice(
            process.next_id(), spec.path, part, spec.n_ctx, spec.n_seq, threads, spec.backend
        )
        reply, _ = await process.call(request, seconds=LOAD_SECONDS, watched=False)
        yield SliceRunner(process, _expect(reply, SliceLoaded).info)


@contextlib.asynccontextmanager
async def open_tokenizer_runner(path: str) -> AsyncIterator[TokenizerRunner]:
    """Start a process, load the vocabulary of a GGUF file in it and end it with the context.

    The file may be a head slice, or any file with the tokenizer's metadata.  Errors as for
    :func:`open_slice_runner`, and :class:`Unsupported` (``no_vocabulary``).
    """
    async with start_process(f"the vocabulary of {Path(path).name}") as process:
        request = LoadTokenizer(process.next_id(), path)
        reply, _ = await process.call(request, seconds=LOAD_SECONDS, watched=False)
        yield TokenizerRunner(process, _expect(reply, TokenizerLoaded).info)


def _expect(reply: AnyReply, expected: type[R]) -> R:
    if not isinstance(reply, expected):
        raise CorruptData(
            f"A runner answered with {type(reply).__name__}, not {expected.__name__}.",
            code="malformed_message",
        )
    return reply


def _token_list(tail: Tail) -> list[int]:
    tokens: list[int] = unpack_tokens(tail).tolist()
    return tokens


def _utf8(text: str) -> bytes:
    _check_text(len(text))
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            "The text holds half a surrogate pair and is no valid Unicode.", code="bad_text"
        ) from None
    _check_text(len(data))
    return data


def _check_text(size: int) -> None:
    if size > MAX_TEXT:
        raise InvalidRequest(
            f"The text has {size} bytes; at most {MAX_TEXT} are taken.",
            code="text_too_long",
            size=size,
            limit=MAX_TEXT,
        )
