"""From the parts of a call to the arrays that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import Activations, StepInput, Tokens
from pyagent_node.inference.stepping.batching import Call, Part


class Rows(NamedTuple):
    """The rows of one call; every array has length n (activations: shape (n, n_embd)).

    Exactly one of ``tokens`` and ``activations`` is given.  ``wanted`` marks the rows whose logits
    are needed; a context with a tap ignores it and gives every row.
    """

    seqs: NDArray[np.int32]
    positions: NDArray[np.int32]
    tokens: Tokens | None
    activations: Activations | None
    wanted: NDArray[np.int8]


def call_rows(call: Call, steps: Sequence[StepInput]) -> Rows:
    """Return the rows of one call of the plan for ``steps``."""
    if len(call) == 1:
        return _part_rows(call[0], steps)
    parts = [_part_rows(part, steps) for part in call]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    activations = [part.activations for part in parts if part.activations is not None]
    return Rows(
        np.concatenate([part.seqs for part in parts]),
        np.concatenate([part.positions for part in parts]),
        np.concatenate(tokens) if tokens else None,
        np.concatenate(activations) if activations else None,
        np.concatenate([part.wanted for part in parts]),
    )


def _part_rows(part: Part, steps: Sequence[StepInput]) -> Rows:
    step = steps[part.step]
    span = slice(part.offset, part.offset + part.n)
    start = step.position + part.offset
    wanted = np.zeros(part.n, np.int8)
    if step.sample:
        wanted[max(0, len(step.tokens) - step.drafts - 1 - part.offset) :] = 1
    return Rows(
        np.full(part.n, step.seq, np.int32),
        np.arange(start, start + part.n, dtype=np.int32),
        np.ascontiguousarray(step.tokens[span]) if step.activations is None else None,
        None if step.activations is None else np.ascontiguousarray(step.activations[span]),
        wanted,
    )


def with_companion(rows: Rows) -> Rows:
    """Return a lone row and a copy of it at the next position."""
    return Rows(
        np.repeat(rows.seqs, 2),
        np.array([rows.positions[0], rows.positions[0] + 1], np.int32),
        None if rows.tokens is None else np.repeat(rows.tokens, 2),
        None if rows.activations is None else np.repeat(rows.activations, 2, axis=0),
        np.array([rows.wanted[0], 0], np.int8),
    )
