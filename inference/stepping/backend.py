"""``SliceBackend``: what every backend does alike, between the port and the rows of a call.

It checks operations and steps, keeps the log of each sequence, computes trees by chains, and puts
sequences back when a call fails.  A backend brings a :class:`Computer` (rows in, activations or
logits out) and :class:`CellMover` (its cells, in and out).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import Conflict, CorruptData, InvalidRequest
from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    MAX_DRAFTS,
    BackendInfo,
    CellAttention,
    CopySequence,
    FreeSequence,
    KvRange,
    KvUsage,
    OpenSequence,
    PruneSequence,
    ResetSequences,
    SequenceOp,
    ShiftSequence,
    StepInput,
    StepOutput,
    Tokens,
    TrimSequence,
    WatchSequence,
)
from pyagent_node.inference.stepping.calls import CallRunner, Computer
from pyagent_node.inference.stepping.pruning import Pruner, check_watch, kept_cells, no_pruning
from pyagent_node.inference.stepping.rows import Rows
from pyagent_node.inference.stepping.sequences import SequenceLog
from pyagent_node.inference.trees import check_tree, decode_tree, reach

MAX_N_SEQ: Final = 64
MAX_THREADS: Final = 512


class CellMover(Protocol):
    """Moves the cells of a context; errors as for the port's methods of these names."""

    def copy(self, log: SequenceLog, source: SequenceLog, start: int, stop: int) -> None:
        """Append cells of another sequence."""
        ...

    def shift(self, log: SequenceLog, start: int, stop: int, delta: int) -> None:
        """Move positions."""
        ...

    def export(self, log: SequenceLog, start: int, stop: int) -> KvRange:
        """Return the cells of positions ``[start, stop)``."""
        ...

    def load(self, log: SequenceLog, kv: KvRange, tokens: Tokens) -> None:
        """Append cells that came from elsewhere."""
        ...

    def doubt(self, seq: int) -> None:
        """Note that a call on this sequence has failed half-way."""
        ...


class SliceBackend(ABC):
    """Implements the ``Backend`` port but for closing.  One thread may use it."""

    def __init__(
        self,
        info: BackendInfo,
        context: Computer,
        calls: CallRunner,
        cells: CellMover,
        pruner: Pruner | None = None,
    ) -> None:
        assert info.prunes == (pruner is not None), "a backend says what it can do"
        self._pruner = pruner
        self._info = info
        self._context = context
        self._calls = calls
        self._cells = cells
        self._logs: list[SequenceLog | None] = [None] * info.n_seq

    @property
    def info(self) -> BackendInfo:
        """What this slice says of itself; ``n_vocab`` is 0 without the output head."""
        return self._info

    @abstractmethod
    def close(self) -> None:
        """Release the model; idempotent."""

    # ---- sequence operations ---------------------------------------------------------------

    def apply(self, op: SequenceOp) -> None:
        """Carry out one sequence operation.

        Raises :class:`InvalidRequest` (``bad_sequence``, ``no_sequence``, ``kv_range``,
        ``bad_parameter``), :class:`Conflict` (``sequence_in_use``, ``kv_pruned``),
        :class:`LimitExceeded` (``kv_full``) and :class:`Unsupported` (``no_shift``,
        ``kv_not_portable``, ``no_pruning``).
        """
        match op:
            case OpenSequence(seq, sampling):
                self._check_seq(seq)
                if self._logs[seq] is not None:
                    raise Conflict(f"Sequence {seq} is in use.", code="sequence_in_use", seq=seq)
                if sampling is not None:
                    if not self._info.slice.head:
                        raise InvalidRequest(
                            "This slice has no output head to sample from.",
                            code="bad_parameter",
                            parameter="sampling",
                        )
                    sampling.check(self._info.n_vocab)
                self._logs[seq] = SequenceLog(
                    seq, self._info.n_ctx, sampling, self._info.n_ctx_train
                )
            case FreeSequence(seq):
                self._log(seq)
                self._free(seq)
            case ResetSequences():
                for seq in range(len(self._logs)):
                    self._free(seq)
            case TrimSequence(seq, start):
                log = self._log(seq)
                if start < 0:
                    raise InvalidRequest(f"Trimming from {start}.", code="kv_range", seq=seq)
                log.check_trim(start)
                self._truncate(log, start)
            case CopySequence(seq, source, start, stop):
                log, giver = self._log(seq), self._log(source)
                giver.check_whole()
                self._cells.copy(log, giver, start, stop)
            case ShiftSequence(seq, start, stop, delta):
                log = self._log(seq)
                log.check_whole()
                if self._pruner is not None:
                    self._pruner.forget(seq)
                self._cells.shift(log, start, stop, delta)
            case WatchSequence(seq, every, window):
                log = self._log(seq)
                check_watch(seq, every, window)
                if self._pruner is None:
                    raise no_pruning()
                self._pruner.forget(seq)
                if every:
                    self._pruner.watch(log, every, window)
            case PruneSequence(seq, keep):
                log = self._log(seq)
                if self._pruner is None:
                    raise no_pruning()
                self._pruner.prune(log, kept_cells(log, keep))

    def _free(self, seq: int) -> None:
        if self._pruner is not None:
            self._pruner.forget(seq)
        self._context.drop(seq, 0)
        self._logs[seq] = None

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
            self._trim(log, start)

    def _trim(self, log: SequenceLog, start: int) -> None:
        log.trim(start)
        if self._pruner is not None:
            self._pruner.trimmed(log)

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
                self._trim(log, end)
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
        n_vocab = self._info.n_vocab if self._info.slice.head else 2**31
        if int(step.tokens.min()) < 0 or int(step.tokens.max()) >= n_vocab:
            raise bad(f"a token is not one of 0 to {n_vocab - 1}")
        log.check_room(step.position, span)
        rows = step.activations
        if self._info.slice.first == 0 and self._info.slice.head:
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

    def score(self, tokens: Tokens, seq: int | None = None) -> NDArray[np.float32]:
        """Return the logits behind each token of a text, shape (n, n_vocab): for measuring.

        The text follows what sequence ``seq`` holds, which is as before in the end (if it was
        pruned, too).  Without one slot 0 is used, and must not be open: else :class:`Conflict`
        (``sequence_in_use``).  Raises :class:`InvalidRequest` (``bad_parameter``) for a slice.
        """
        if self._info.slice.first or not self._info.slice.head:
            raise InvalidRequest("Only a whole model scores texts.", code="bad_parameter")
        if seq is None and self._logs[0] is not None:
            raise Conflict("Sequence 0 is in use.", code="sequence_in_use", seq=0)
        log = SequenceLog(0, self._info.n_ctx, None) if seq is None else self._log(seq)
        slot, end = log.seq, log.end
        log.check_room(end, len(tokens))
        found: list[NDArray[np.float32]] = []
        try:
            for at in range(0, len(tokens), MAX_DECODE_ROWS):
                piece = tokens[at : at + MAX_DECODE_ROWS]
                n = len(piece)
                positions = np.arange(end + at, end + at + n, dtype=np.int32)
                rows = Rows(np.full(n, slot, np.int32), positions, piece, None, np.ones(n, np.int8))
                self._context.decode(rows, None, lone_threads=1)
                found += [self._context.logits(row).copy() for row in range(n)]
        finally:
            self._context.drop(slot, end)
        return np.stack(found)

    # ---- KV ranges -------------------------------------------------------------------------

    def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy cells out; see the port.

        Raises :class:`InvalidRequest` (``kv_range``, ``no_sequence``), :class:`Conflict`
        (``kv_pruned``) and :class:`Unsupported` (``kv_not_portable``).
        """
        log = self._log(seq)
        log.check_whole()
        return self._cells.export(log, start, stop)

    def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Write cells in; see the port.

        Raises :class:`InvalidRequest` (``kv_range``, ``no_sequence``), :class:`LimitExceeded`
        (``kv_full``), :class:`Unsupported` (``kv_codec``, ``no_pruning``) and :class:`CorruptData`
        (``kv_malformed``, ``not_finite``).  On any of these the sequence is unchanged.
        """
        log = self._log(seq)
        if kv.kept and self._pruner is None:
            raise no_pruning()
        self._cells.load(log, kv, tokens)

    # ---- attention -------------------------------------------------------------------------

    def attention(self, seq: int) -> CellAttention:
        """Return where a watched sequence attended; see the port.

        Raises :class:`InvalidRequest` (``no_sequence``, ``not_watched``) and :class:`Unsupported`
        (``no_pruning``).
        """
        log = self._log(seq)
        if self._pruner is None:
            raise no_pruning()
        return self._pruner.attention(log)

    def kv_usage(self, seq: int) -> KvUsage:
        """Return what the cells of a sequence take; raises :class:`InvalidRequest`."""
        log = self._log(seq)
        if self._pruner is None:
            return KvUsage(log.count, log.count * self._info.kv_bytes_per_token, None, pruned=False)
        return self._pruner.usage(log)


def check_numbers(*, n_ctx: int, n_seq: int, threads: int, n_ctx_train: int) -> None:
    """Check what a slice is to be loaded with; raises :class:`InvalidRequest`."""
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
