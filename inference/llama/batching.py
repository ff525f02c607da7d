"""How steps become ``llama_decode`` calls, so that no session's bits depend on another's.

llama.cpp picks its kernels by the shape of a batch, and with the kernel the last bits of a result
change.  So a session's rows are only ever computed in shapes that follow from its own steps, or in
shapes that were measured to make no difference (see ``selftest``).  The rules:

* A step is cut at positions that are multiples of :data:`PREFILL_CHUNK`, as a plain llama.cpp
  process with ``n_batch = 512`` cuts a prompt.  A piece of more than :data:`MAX_DECODE_ROWS`
  tokens, or one that begins a sequence, is *prefill* and is computed alone.  (From 64 rows on
  flash attention works on tiles, whose results differ from those of single rows: which rows share
  a call matters there.)
* Smaller pieces are *decode rows*, and so are all rows of a step with guesses.  A piece of several
  rows is cut into measured widths, largest first; single rows of different sequences are computed
  together, again in measured widths.
* Only neighbouring sequences share a call: each has its own KV stream, and llama.cpp attends over a
  contiguous range of streams.  Whoever hands out sequences should prefer the lowest free one.

Every call is one ubatch of llama.cpp (equal rows a sequence, neighbours in order), so the rows of
the tapped tensor come out in the order of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pyagent_node.inference.backend import MAX_DECODE_ROWS, PREFILL_CHUNK

WIDTHS: Final = tuple(range(2, MAX_DECODE_ROWS + 1))
"""Widths that the self-test tries; 1 is the reference."""


class StepShape(NamedTuple):
    """What planning needs to know of a step."""

    seq: int
    position: int
    n: int
    drafts: int = 0


class Part(NamedTuple):
    """Rows ``[offset, offset + n)`` of step number ``step``."""

    step: int
    offset: int
    n: int


Call = tuple[Part, ...]
"""The parts of one ``llama_decode``: one part, or single rows of neighbouring sequences."""


def plan_calls(steps: Sequence[StepShape], widths: Sequence[int]) -> list[Call]:
    """Cut ``steps`` (of distinct sequences) into calls; ``widths`` are safe and contain 1.

    The parts of one step keep their order.
    """
    calls: list[Call] = []
    singles: list[tuple[int, int]] = []
    for index, step in enumerate(steps):
        if step.n == 1:
            singles.append((step.seq, index))
            continue
        for offset, n in _pieces(step):
            prefill = n > MAX_DECODE_ROWS and not step.drafts
            if prefill or step.position + offset == 0:
                calls.append((Part(index, offset, n),))
                continue
            at = offset
            for width in _cut(n, widths):
                calls.append((Part(index, at, width),))
                at += width
    for run in _neighbours(sorted(singles)):
        at = 0
        for width in _cut(len(run), widths):
            calls.append(tuple(Part(index, 0, 1) for _, index in run[at : at + width]))
            at += width
    return calls


def _pieces(step: StepShape) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the pieces between canonical boundaries."""
    offset = 0
    while offset < step.n:
        room = PREFILL_CHUNK - (step.position + offset) % PREFILL_CHUNK
        n = min(room, step.n - offset)
        yield offset, n
        offset += n


def _cut(n: int, widths: Sequence[int]) -> Iterator[int]:
    while n > 0:
        width = max(w for w in widths if w <= n)
        yield width
        n -= width


def _neighbours(singles: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Group (sequence, step) pairs, sorted, into runs of consecutive sequences."""
    run: list[tuple[int, int]] = []
    for item in singles:
        if run and item[0] != run[-1][0] + 1:
            yield run
            run = []
        run.append(item)
    if run:
        yield run
