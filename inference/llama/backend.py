"""``LlamaBackend``: a slice of a model in llama.cpp, behind the ``Backend`` port.

Equal to the bit with a plain llama.cpp process on the unsliced file, for any number of slices and
of concurrent sessions, on the terms of ``batching`` (which shapes are computed), ``context`` (how
the context is set up) and ``selftest`` (which shapes passed).  The plain process to compare with
has ``flash_attn=True, n_batch=512``, f16 KV, and ``n_threads=1`` once a context passes 256 tokens:
beyond that llama.cpp's own results depend on the number of threads, and ours are those of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from pyagent_node.base.errors import Conflict, CorruptData, InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    MAX_CALL_ROWS,
    MAX_DECODE_ROWS,
    MAX_DRAFTS,
    BackendInfo,
    CopySequence,
    FreeSequence,
    KvRange,
    OpenSequence,
    ResetSequences,
    SequenceOp,
    ShiftSequence,
    StepInput,
    StepOutput,
    Tokens,
    TrimSequence,
)
from pyagent_node.inference.llama import library
from pyagent_node.inference.llama.calls import CallRunner
from pyagent_node.inference.llama.cells import CODEC, GGML_F16, CellStore
from pyagent_node.inference.llama.context import LlamaContext, padded_cells
from pyagent_node.inference.llama.kv_state import CellLayout, RowKind
from pyagent_node.inference.llama.memory import available_memory, check_memory, memory_need
from pyagent_node.inference.llama.selftest import run_self_test
from pyagent_node.inference.llama.sequences import SequenceLog
from pyagent_node.inference.llama.shapes import ShapeBook
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import GgufHeader, read_header
from pyagent_node.inference.models.kv_rows import kv_shape
from pyagent_node.inference.models.layer_kinds import layers_of_every_kind
from pyagent_node.inference.models.slicing import SLICE_KEY
from pyagent_node.inference.trees import check_tree, decode_tree, reach
from pyagent_node.sharding.kv_codec import KvShape

MAX_N_SEQ: Final = 64
MAX_THREADS: Final = 512


class LlamaBackend:
    """A loaded slice.  One thread may use it; see the port for the meaning of the methods."""

    def __init__(
        self,
        path: Path,
        part: Slice,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        available: Callable[[], int] = available_memory,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load the slice ``part`` from ``path``: its own file, or the whole model's for all of it.

        ``n_ctx`` tokens are reserved for each of ``n_seq`` sequences.  Raises
        :class:`InvalidRequest` (``bad_parameter``, ``wrong_slice``), :class:`CorruptData`
        (``gguf_truncated``, ...), :class:`Unsupported` and :class:`LimitExceeded`
        (``not_enough_memory``).
        """
        header = read_header(path)
        shape = model_shape(header)
        _check_numbers(n_ctx=n_ctx, n_seq=n_seq, threads=threads, n_ctx_train=shape.n_ctx_train)
        _check_slice(header, part, shape.n_layers)
        cells = padded_cells(n_ctx)
        outputs = max(MAX_DECODE_ROWS, min(n_seq * MAX_DECODE_ROWS, MAX_CALL_ROWS))
        need = memory_need(
            header, cells=cells, n_seq=n_seq, n_vocab=shape.n_vocab, max_outputs=outputs
        )
        check_memory(need, available())
        self._part = part
        self._n_ctx = n_ctx
        self._whole = part.first == 0 and part.head
        self._model = library.load_model(path)
        try:
            self._context = LlamaContext(
                self._model,
                n_ctx=n_ctx,
                n_seq=n_seq,
                threads=threads,
                tapped=not part.head,
                max_outputs=outputs,
                early_layer=max(0, layers_of_every_kind(header) - 1),
            )
            try:
                findings = run_self_test(
                    self._context,
                    n_cells=cells,
                    tapped=not part.head,
                    takes_tokens=self._whole,
                    clock=clock,
                )
            except BaseException:
                self._context.close()
                raise
        except BaseException:
            self._model.close()
            raise
        shapes = ShapeBook(findings.widths, findings.failed, findings.slow, n_seq=n_seq)
        self._calls = CallRunner(self._context, shapes, findings.lone, head=part.head)
        self._logs: list[SequenceLog | None] = [None] * n_seq
        moving = findings.moving
        layout = moving.layout if moving.exact else None
        self._cells = CellStore(
            self._context,
            part,
            layout,
            moving.cache,
            appends=moving.appends,
            takes_tokens=self._whole,
        )
        self._info = BackendInfo(
            backend="llama.cpp",
            version=library.VERSION,
            device="cpu",
            slice=part,
            n_embd=self._model.n_embd,
            n_vocab=shape.n_vocab if part.head else 0,
            n_ctx=n_ctx,
            n_seq=n_seq,
            threads=threads,
            kv_bytes_per_token=need.kv // (cells * n_seq),
            memory_bytes=int(psutil.Process().memory_info().rss),
            batch_invariant_widths=findings.widths,
            kv_portable=moving.exact,
            kv_codec=CODEC if moving.exact else "",
            joint_shapes=shapes.joint,
            prefill_cut=findings.prefill_cut,
            kv_shape=_kv_shape(header, layout),
        )

    @property
    def info(self) -> BackendInfo:
        """What this slice says of itself; ``n_vocab`` is 0 without the output head."""
        return self._info

    def close(self) -> None:
        """Release the model; idempotent."""
        self._context.close()
        self._model.close()

    # ---- sequence operations ---------------------------------------------------------------

    def apply(self, op: SequenceOp) -> None:
        """Carry out one sequence operation.

        Raises :class:`InvalidRequest` (``bad_sequence``, ``no_sequence``, ``kv_range``,
        ``bad_parameter``), :class:`Conflict` (``sequence_in_use``), :class:`LimitExceeded`
        (``kv_full``) and :class:`Unsupported` (``no_shift``, ``kv_not_portable``).
        """
        match op:
            case OpenSequence(seq, sampling):
                self._check_seq(seq)
                if self._logs[seq] is not None:
                    raise Conflict(f"Sequence {seq} is in use.", code="sequence_in_use", seq=seq)
                if sampling is not None:
                    if not self._part.head:
                        raise InvalidRequest(
                            "This slice has no output head to sample from.",
                            code="bad_parameter",
                            parameter="sampling",
                        )
                    sampling.check(self._info.n_vocab)
                self._logs[seq] = SequenceLog(seq, self._n_ctx, sampling)
            case FreeSequence(seq):
                self._log(seq)
                self._context.drop(seq, 0)
                self._logs[seq] = None
            case ResetSequences():
                for seq in range(len(self._logs)):
                    self._context.drop(seq, 0)
                    self._logs[seq] = None
            case TrimSequence(seq, start):
                log = self._log(seq)
                if start < 0:
                    raise InvalidRequest(f"Trimming from {start}.", code="kv_range", seq=seq)
                self._truncate(log, start)
            case CopySequence(seq, source, start, stop):
                self._cells.copy(self._log(seq), self._log(source), start, stop)
            case ShiftSequence(seq, start, stop, delta):
                self._cells.shift(self._log(seq), start, stop, delta)

    def _check_seq(self, seq: int) -> None:
        if not 0 <= seq < len(self._logs):
            raise InvalidRequest(
                f"Sequence {seq} is not one of 0 to {len(self._logs) - 1}.",
                code="bad_sequence",
                seq=seq,
            )

    def _log(self, seq: int) -> SequenceLog:
        self._check_seq(seq)
        log = self._logs[seq]
        if log is None:
            raise InvalidRequest(f"Sequence {seq} is not open.", code="no_sequence", seq=seq)
        return log

    def _truncate(self, log: SequenceLog, start: int) -> None:
        if start < log.end:
            self._context.drop(log.seq, start)
            log.trim(start)

    # ---- decoding --------------------------------------------------------------------------

    def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Run the slice over ``steps``; see the port.

        Raises :class:`InvalidRequest` (``bad_step``, ``bad_tree``, ``no_sequence``),
        :class:`LimitExceeded` (``kv_full``), :class:`CorruptData` (``not_finite``) and
        :class:`Unavailable` (``decode_failed``); the named sequences are then as before.
        """
        logs = [self._check_step(step) for step in steps]
        if len({step.seq for step in steps}) != len(steps):
            raise InvalidRequest("A sequence appears twice in one batch.", code="bad_step")
        ends = [log.end for log in logs]
        chains = [index for index, step in enumerate(steps) if not step.parents]
        try:
            outputs = dict(
                zip(
                    chains,
                    self._calls.decode([steps[i] for i in chains], [logs[i] for i in chains]),
                    strict=True,
                )
            )
            for index, step in enumerate(steps):
                if step.parents:
                    outputs[index] = self._decode_tree(step, logs[index])
        except BaseException:
            for log, end in zip(logs, ends, strict=True):
                self._cells.doubt(log.seq)
                self._context.drop(log.seq, end)
                log.trim(end)
            raise
        return [outputs[index] for index in range(len(steps))]

    def _decode_tree(self, step: StepInput, log: SequenceLog) -> StepOutput:
        def chain(part: StepInput) -> StepOutput:
            (output,) = self._calls.decode([part], [log])
            return output

        def trim(start: int) -> None:
            self._truncate(log, start)

        return decode_tree(step, chain, trim)

    def _check_step(self, step: StepInput) -> SequenceLog:
        log = self._log(step.seq)
        n = len(step.tokens)

        def bad(what: str) -> InvalidRequest:
            return InvalidRequest(
                f"A step of sequence {step.seq} was refused: {what}.",
                code="bad_step",
                seq=step.seq,
            )

        if step.tokens.dtype != np.int32 or step.tokens.ndim != 1 or n == 0:
            raise bad("it must have tokens, in one row of int32")
        if step.position != log.end:
            raise bad(f"it begins at {step.position}, its sequence ends at {log.end}")
        if step.sample and log.sampling is None:
            raise bad("it asks for a token, but its sequence was opened without sampling")
        if step.drafts and not (0 < step.drafts <= min(MAX_DRAFTS, n - 1) and log.end > 0):
            raise bad(f"it cannot have {step.drafts} guesses among {n} tokens from {log.end} on")
        span = n
        if step.parents:
            check_tree(step.parents, step.tokens.tolist(), step.drafts)
            known = n - step.drafts
            if known > MAX_DECODE_ROWS:
                raise bad(f"{known} tokens cannot be followed by a tree")
            span = known + reach(step.parents, known, step.drafts)
        n_vocab = self._info.n_vocab if self._part.head else 2**31
        if int(step.tokens.min()) < 0 or int(step.tokens.max()) >= n_vocab:
            raise bad(f"a token is not one of 0 to {n_vocab - 1}")
        log.check_room(step.position, span)
        rows = step.activations
        if self._whole:
            if rows is not None:
                raise bad("the whole model takes tokens, not activations")
        elif rows is None or rows.shape != (n, self._info.n_embd) or rows.dtype != np.float32:
            raise bad(f"it needs float32 activations of shape ({n}, {self._info.n_embd})")
        elif not np.isfinite(rows).all():
            # NaN would stay behind in the cells and reach the next user of the sequence
            raise CorruptData(
                f"The activations for sequence {step.seq} are not all finite.", code="not_finite"
            )
        return log

    # ---- KV ranges -------------------------------------------------------------------------

    def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy cells out; see the port.

        Raises :class:`InvalidRequest` (``kv_range``, ``no_sequence``) and :class:`Unsupported`
        (``kv_not_portable``).
        """
        return self._cells.export(self._log(seq), start, stop)

    def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Write cells in; see the port.

        Raises :class:`InvalidRequest` (``kv_range``, ``no_sequence``), :class:`LimitExceeded`
        (``kv_full``), :class:`Unsupported` (``kv_codec``) and :class:`CorruptData`
        (``kv_malformed``, ``not_finite``).  On any of these the sequence is unchanged.
        """
        self._cells.load(self._log(seq), kv, tokens)


def _kv_shape(header: GgufHeader, layout: CellLayout | None) -> KvShape | None:
    """Return the shape of every layer's rows, when there is one."""
    shape = kv_shape(header)
    rows = RowKind(GGML_F16, shape.row_bytes)
    return shape if layout is not None and {*layout.keys, *layout.values} == {rows} else None


def _check_numbers(*, n_ctx: int, n_seq: int, threads: int, n_ctx_train: int) -> None:
    for name, value, high in (
        ("n_ctx", n_ctx, n_ctx_train),
        ("n_seq", n_seq, MAX_N_SEQ),
        ("threads", threads, MAX_THREADS),
    ):
        if not 1 <= value <= high:
            raise InvalidRequest(
                f"{name} is {value}; for this model it must lie between 1 and {high}.",
                code="bad_parameter",
                parameter=name,
            )


def _check_slice(header: GgufHeader, part: Slice, n_layers: int) -> None:
    """Check that the file holds the layers it is loaded for."""
    held = header.text(SLICE_KEY, str(Slice(0, n_layers, head=True)))
    if held != str(part):
        raise InvalidRequest(f"The file holds layers {held[:64]}, not {part}.", code="wrong_slice")
