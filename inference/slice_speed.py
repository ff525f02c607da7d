"""A short run of a freshly loaded slice: how long a token takes, alone and in a piece of a prompt.

The shortest of a few runs counts, since other slices load and measure at the same time.  Slow
slices are measured with fewer runs: it takes about :data:`BUDGET_SECONDS`, and never less than one
token.  The slice is empty afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import trio

from pyagent_node.inference.backend import (
    BackendInfo,
    OpenSequence,
    ResetSequences,
    SequenceOp,
    StepInput,
    StepOutput,
    TrimSequence,
)
from pyagent_node.inference.sampling import SamplingParams

BUDGET_SECONDS: Final = 0.4
RUNS: Final = 6
"""Single tokens that are computed."""
PIECE: Final = 32
"""Rows of a piece of a prompt."""
PIECES: Final = 2
RESET_SECONDS: Final = 2.0
"""Longest time to empty the slice when the run was cancelled."""


class SliceTimes(NamedTuple):
    """Seconds of a token alone, of its layers alone, and in a piece of a prompt.

    ``layers`` equals ``token`` without the output head; ``prompt`` is ``None`` if not measured.
    """

    token: float
    layers: float
    prompt: float | None


class Measurable(Protocol):
    """What is measured (a ``SliceRunner``)."""

    @property
    def info(self) -> BackendInfo:
        """What the slice says of itself."""
        ...

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations."""
        ...

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute."""
        ...


async def measure_slice(runner: Measurable) -> SliceTimes:
    """Measure a slice that nobody uses yet; raises what the runner raises."""
    info = runner.info
    whole = info.slice.first == 0 and info.slice.head
    began = trio.current_time()
    sampling = SamplingParams(temperature=0.0) if info.slice.head else None
    await runner.apply([OpenSequence(0, sampling)])

    async def run(position: int, rows: int, *, sample: bool = info.slice.head) -> float:
        numbers = np.arange(rows, dtype=np.int32)
        noise = np.sin(np.arange(rows * info.n_embd, dtype=np.float32))
        step = StepInput(
            seq=0,
            position=position,
            tokens=numbers % max(1, info.n_vocab),
            activations=None if whole else noise.reshape(rows, info.n_embd),
            sample=sample,
        )
        start = trio.current_time()
        await runner.decode([step])
        return trio.current_time() - start

    try:
        alone = [await run(0, 1)]
        while len(alone) < min(RUNS, info.n_ctx):
            if trio.current_time() - began > BUDGET_SECONDS:
                break
            alone.append(await run(len(alone), 1))
        token = layers = min(alone)
        if info.slice.head:
            without: list[float] = []
            while not without or (
                len(without) < RUNS // 2 and trio.current_time() - began <= BUDGET_SECONDS
            ):
                await runner.apply([TrimSequence(0, 0)])
                without.append(await run(0, 1, sample=False))
            layers = min(token, *without)
        pieces: list[float] = []
        while len(pieces) < PIECES and info.n_ctx > PIECE:
            # a token of a piece takes a quarter of a token alone, or less
            if trio.current_time() - began + token * PIECE / 4 > 2 * BUDGET_SECONDS:
                break
            await runner.apply([TrimSequence(0, 0)])
            pieces.append(await run(0, PIECE) / PIECE)
    finally:
        with trio.move_on_after(RESET_SECONDS, shield=True):
            await runner.apply([ResetSequences()])
    return SliceTimes(
        max(token, 1e-9), max(layers, 1e-9), max(min(pieces), 1e-9) if pieces else None
    )
