"""Guesses that form a tree: what makes one, how it is walked, how it is computed.  Pure.

The guesses of a step are its last tokens.  Without ``parents`` each follows the token before it, a
*chain*.  With them guess number i follows the token at index ``parents[i]`` of the step's tokens,
the last one that is no guess or a guess before it, and its position is that token's plus one.

Guesses come in preorder: each one behind the one that it follows and all that follows its earlier
siblings.  Hence the first child of a token, if there is one, comes right behind it; the first
children from the last known token on are the *principal path*, the first guesses of the step.
Siblings differ, so that the tokens that come true say which guesses did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.backend import Activations, StepInput, StepOutput

Parents = Sequence[int]
_SHOWN: Final = 64


class Run(NamedTuple):
    """Tokens ``[offset, stop)`` of a step, each of which follows the one before it.

    The first is at the step's position plus ``depth``.
    """

    offset: int
    stop: int
    depth: int


def check_tree(parents: Parents, tokens: Sequence[int], drafts: int) -> None:
    """Check that the last ``drafts`` of a step's ``tokens`` form a tree, with a token before them.

    Raises :class:`InvalidRequest` (``bad_tree``), whose fact ``reason`` is one of ``length`` (not
    as many parents as guesses), ``parent`` (no token of the step that may be followed),
    ``cycle`` (a guess that follows itself or a later one), ``order`` (not in preorder) and
    ``siblings`` (two of the same token).
    """
    if len(parents) != drafts or not 0 < drafts < len(tokens):
        raise _bad("length", f"{len(parents)} parents are given for {drafts} guesses")
    root = len(tokens) - drafts - 1
    path = [root]
    seen: set[tuple[int, int]] = set()
    for index, parent in enumerate(parents):
        own = root + 1 + index
        if not root <= parent < len(tokens):
            raise _bad("parent", f"guess {index} follows token {str(parent)[:_SHOWN]}")
        if parent >= own:
            raise _bad("cycle", f"guess {index} follows itself or a later one")
        while path and path[-1] != parent:
            path.pop()
        if not path:
            raise _bad("order", f"guess {index} is not where preorder has it")
        path.append(own)
        child = parent, int(tokens[own])
        if child in seen:
            raise _bad("siblings", f"guess {index} is the same as one beside it")
        seen.add(child)


def _bad(reason: str, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"The guesses of a step form no tree: {what}.",
        code="bad_tree",
        parameter="parents",
        reason=reason,
    )


def principal(parents: Parents, known: int, drafts: int) -> int:
    """Return how many guesses the principal path has; ``known`` tokens come before the guesses."""
    if not parents:
        return drafts
    return next((i for i, parent in enumerate(parents) if parent != known - 1 + i), drafts)


def depths(parents: Parents, known: int) -> list[int]:
    """Return for each guess how many guesses lead to it, itself among them."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent - known] + 1 if parent >= known else 1)
    return found


def reach(parents: Parents, known: int, drafts: int) -> int:
    """Return how many guesses the longest path has."""
    return max(depths(parents, known), default=0) if parents else drafts


def child(parents: Parents, tokens: Sequence[int], known: int, at: int, token: int) -> int | None:
    """Return the index of the guess ``token`` that follows the token at index ``at``."""
    for index, parent in enumerate(parents, known):
        if parent == at and tokens[index] == token:
            return index
    return None


def follow(parents: Parents, tokens: Sequence[int], drafts: int, came: Sequence[int]) -> list[int]:
    """Return which guesses came true, in order, as indices among the guesses.

    ``came`` are the tokens that follow the last known one.
    """
    known = len(tokens) - drafts
    if not parents:
        parents = range(known - 1, len(tokens) - 1)
    path: list[int] = []
    at = known - 1
    for token in came:
        found = child(parents, tokens, known, at, token)
        if found is None:
            break
        at = found
        path.append(at - known)
    return path


def runs(parents: Parents, known: int) -> list[Run]:
    """Return the runs of a tree in the order in which they are computed.

    Depth first, later siblings before earlier ones: the principal path is last, and every other run
    begins where the one before it, or a part of that, ends.
    """
    n = known + len(parents)
    follows: list[list[int]] = [[] for _ in range(n)]
    for index, parent in enumerate(parents, known):
        follows[parent].append(index)
    found: list[Run] = []
    todo = [(0, 0)]
    while todo:
        offset, depth = todo.pop()
        stop = max(offset + 1, known)
        while len(follows[stop - 1]) == 1:
            stop += 1
        found.append(Run(offset, stop, depth))
        # the last one pushed is computed next
        todo += [(first, depth + stop - offset) for first in follows[stop - 1]]
    return found


Decode = Callable[[StepInput], StepOutput]
"""Computes a chain where its sequence ends."""
Trim = Callable[[int], None]
"""Drops the cells of the sequence at positions ``[start, ...)``."""


def decode_tree(step: StepInput, decode: Decode, trim: Trim) -> StepOutput:
    """Compute a step whose guesses form a tree by chains of its tokens.

    Where it is to sample, only what the sampled tokens lead into is computed, and the cells end
    behind the guesses that came true.  Otherwise each token is computed once, over the cells of its
    own path and no others, and the cells end with the principal path.
    """
    return _sampled(step, decode) if step.sample else _every(step, decode, trim)


def _every(step: StepInput, decode: Decode, trim: Trim) -> StepOutput:
    known = len(step.tokens) - step.drafts
    out: Activations | None = None
    for run in runs(step.parents, known):
        trim(step.position + run.depth)
        part = _part(step, run.offset, run.stop, step.position + run.depth)
        rows = decode(part).activations
        if rows is not None:
            if out is None:
                out = np.empty((len(step.tokens), rows.shape[1]), np.float32)
            out[run.offset : run.stop] = rows
    return StepOutput(out)


def _sampled(step: StepInput, decode: Decode) -> StepOutput:
    known, parents, position = len(step.tokens) - step.drafts, step.parents, step.position
    tokens: list[int] = step.tokens.tolist()
    offset, stop = 0, known + principal(parents, known, step.drafts)
    output = StepOutput()
    while True:
        part = _part(step, offset, stop, position)
        sampled = decode(part).sampled
        output = StepOutput(None, output.sampled + sampled)
        last = stop - part.drafts - 1 + len(sampled) - 1
        found = child(parents, tokens, known, last, sampled[-1].token)
        if found is None:
            return output
        position += last + 1 - offset
        offset, stop = found, found + 1
        while stop < len(tokens) and parents[stop - known] == stop - 1:
            stop += 1


def _part(step: StepInput, offset: int, stop: int, position: int) -> StepInput:
    """Return the tokens ``[offset, stop)`` as a chain; its first one is known."""
    known = len(step.tokens) - step.drafts
    rows = step.activations
    return StepInput(
        step.seq,
        position,
        step.tokens[offset:stop],
        None if rows is None else rows[offset:stop],
        step.sample,
        stop - max(offset + 1, known),
    )
