"""The ``Drafter`` port: what guesses the next tokens of a session.

A head has one drafter a session.  It tells it every accepted token, the prompt first, and asks it
for guesses; what is guessed is checked by the tail, so a drafter can be wrong, late or dead without
changing the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import msgspec

from pyagent_node.inference.sampling import SamplingParams

MAX_DRAFT: Final = 64
"""No draft is longer; a head cuts what a drafter gives beyond."""


class Draft(msgspec.Struct, frozen=True):
    """A chain of guesses, or a tree of them.

    ``confidence`` has one entry a token: the probability that the token is accepted given that
    those before it were.  ``source`` says who guessed: ``"suffix"``, or a model's name.

    In a tree ``parents`` has for each guess the index of the one that it follows, -1 where it
    follows the text.  Guesses are in preorder (see ``inference.trees``), siblings of different
    tokens, the likelier first; each one's confidence is given that the one that it follows is
    right.
    """

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    source: str = ""
    parents: tuple[int, ...] = ()

    def cut(self, length: int) -> Draft:
        """Return the first ``length`` guesses."""
        if length >= len(self.tokens):
            return self
        length = max(0, length)
        return Draft(
            self.tokens[:length], self.confidence[:length], self.source, self.parents[:length]
        )

    @property
    def straight(self) -> Draft:
        """The chain of first guesses: all of it where it is one."""
        if not self.parents:
            return self
        n = next((i for i, at in enumerate(self.parents) if at != i - 1), len(self.tokens))
        return Draft(self.tokens[:n], self.confidence[:n], self.source)


def usable(draft: Draft, *, n_vocab: int, limit: int) -> Draft:
    """Return the part of ``draft`` that can be sent, whatever a drafter made of it.

    Cut at ``limit``, before the first token that is not of the vocabulary, and where the
    confidences end; a confidence that is no probability counts as 0.
    """
    tokens: list[int] = []
    confidence: list[float] = []
    for token, value in zip(draft.tokens, draft.confidence, strict=False):
        if len(tokens) >= min(limit, MAX_DRAFT) or not 0 <= token < n_vocab:
            break
        tokens.append(int(token))
        confidence.append(min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0)
    return Draft(tuple(tokens), tuple(confidence), draft.source)


class Drafter(Protocol):
    """Guesses the tokens of one session.  One task at a time may use it."""

    @property
    def name(self) -> str:
        """The name it was chosen by."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first.  Cheap, and does not fail."""
        ...

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return up to ``limit`` guesses for what comes after the history and ``ahead``.

        ``ahead`` are guesses in flight: tokens that follow the history and are not accepted yet.
        It may stop at a guess that, with all before it, is less likely than ``floor``.  Raises
        :class:`PyAgentError` when it cannot go on; it is then of no more use.
        """
        ...

    async def aclose(self) -> None:
        """Release what it holds; idempotent."""
        ...


@runtime_checkable
class PreparedDrafter(Protocol):
    """A drafter that has to read a prompt before it can guess, as a model does."""

    async def prepare(self) -> None:
        """Read the tokens so far; takes as long as it takes, and may be cancelled.

        Meant for the time in which the session's own ranks read the prompt; a first draft without
        it takes that much longer.  Raises :class:`PyAgentError` as ``propose`` does.
        """
        ...


@runtime_checkable
class TreeDrafter(Protocol):
    """A drafter whose guesses can form a tree."""

    def expect_trees(self) -> None:
        """Make ready for :meth:`propose_tree`; called before anything else, if at all."""
        ...

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return up to ``limit`` guesses that form a tree; otherwise as ``propose``."""
        ...


class DrafterFactory(Protocol):
    """Makes the drafters of one kind."""

    @property
    def name(self) -> str:
        """The name that requests choose it by."""
        ...

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> Drafter:
        """Return a drafter for a session of the model whose tokens have the bytes ``pieces``.

        ``sampling`` are the session's own parameters, with its seed.  Sessions of different
        ``tenant`` never see each other's text.  Does no work yet.  Raises :class:`Unsupported`
        (``vocabulary_mismatch``) when its tokens are not those of the model, and
        :class:`LimitExceeded` (``too_many_drafters``).
        """
        ...


class Plan(msgspec.Struct, frozen=True):
    """What the controller says of the next step.

    ``length`` is the most guesses to ask a drafter for, 0 for none at all; ``depth`` how many steps
    may be in flight, at least 1; one that is sent while others are begins with a guess of the token
    that the one before it will end with, so ask for one more for it.  ``floor`` goes to
    :meth:`Drafter.propose`.  ``tree`` asks for guesses that form a tree, of a drafter that can.
    """

    length: int = 0
    depth: int = 1
    floor: float = 0.0
    tree: bool = False


class Pass(msgspec.Struct, frozen=True):
    """What one step took, told to the controller with its result.

    ``width`` tokens were computed, ``drafts`` of them guesses, ``accepted`` of which were right;
    ``gained`` tokens were added to the answer (0 for a step that was cancelled).  ``seconds`` went
    by from sending the step to its result, of which the ranks computed for ``compute_seconds``
    (all of them together; 0: not known).  ``draft_seconds`` went into guessing for it.
    ``in_flight`` steps were under way when it was sent, itself among them.  ``elapsed`` seconds
    passed since the result before it (0 for the first).  ``crowded`` says that ranks may still have
    been computing steps that are void when it was sent.
    """

    width: int
    seconds: float
    drafts: int = 0
    accepted: int = 0
    gained: int = 1
    compute_seconds: float = 0.0
    draft_seconds: float = 0.0
    in_flight: int = 1
    elapsed: float = 0.0
    crowded: bool = False


class Forecast(msgspec.Struct, frozen=True):
    """What the controller believes, for ``usage``, ``status`` and benches.

    A pass of width w takes ``pass_seconds + token_seconds * w``; a guess takes ``draft_seconds``.
    ``acceptance`` is the share of guesses sent that were accepted, ``tokens_per_pass`` what a pass
    adds to the answer.  The rates are predictions: tokens a second with ``plan`` and without
    guessing.  ``explored_seconds`` is what trying out has cost so far beyond plain decoding.
    """

    plan: Plan
    pass_seconds: float
    token_seconds: float
    draft_seconds: float
    acceptance: float
    tokens_per_pass: float
    tokens_per_second: float
    plain_tokens_per_second: float
    explored_seconds: float
