"""Drafts from a smaller model of the same vocabulary, loaded whole in a runner on this node.

A guess is what the smaller model would say with the session's own sampling parameters: the same
noise at the same position, so that the two models agree as often as they can.  Its sequence holds
the session's tokens and what was guessed last; what turned out otherwise is trimmed before the
next draft.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.inference.backend import (
    PREFILL_CHUNK,
    BackendInfo,
    FreeSequence,
    OpenSequence,
    SequenceOp,
    StepInput,
    StepOutput,
    TrimSequence,
)
from pyagent_node.inference.drafting.calibration import Calibration, Judge
from pyagent_node.inference.drafting.growth import WIDTH, Candidate, Growth
from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft
from pyagent_node.inference.drafting.tree import ROOT
from pyagent_node.inference.sampling import Sampled, SamplingParams

MAX_PADDING: Final = 1024
"""Models of one vocabulary differ by so many unused tokens at its end, at most."""


class DraftRunner(Protocol):
    """A whole model behind an asynchronous interface (see ``inference.backend``)."""

    @property
    def info(self) -> BackendInfo:
        """What the model says of itself."""
        ...

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute ``steps`` as one batch."""
        ...

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations in order."""
        ...


def check_vocabulary(name: str, own: Sequence[bytes], target: Sequence[bytes]) -> None:
    """Check that two models mean the same by a token's number.

    Tokens without text (control tokens, padding) are not compared.  Raises :class:`Unsupported`
    (``vocabulary_mismatch``) naming the first difference.
    """

    def refuse(what: str) -> Unsupported:
        return Unsupported(
            f"The model {name} cannot draft for this model: {what}.",
            code="vocabulary_mismatch",
            remedy="Use a drafter of the same family, with the same tokenizer.",
            drafter=name,
        )

    if abs(len(own) - len(target)) > MAX_PADDING:
        raise refuse(f"it has {len(own)} tokens, this one {len(target)}")
    for token, (mine, wanted) in enumerate(zip(own, target, strict=False)):
        if mine != wanted and mine and wanted:
            raise refuse(f"its token {token} is {mine[:32]!r}, this one's {wanted[:32]!r}")


class _Slots:
    """The sequences of a runner: free ones, and those that may still hold something."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count))[::-1]
        self.used: set[int] = set()


class ModelDrafter:
    """Guesses with a model; see the port.

    One task at a time may await it; ``extend`` may be called meanwhile.
    """

    def __init__(
        self, name: str, runner: DraftRunner, slots: _Slots, seq: int, sampling: SamplingParams
    ) -> None:
        self._name = name
        self._runner = runner
        self._slots = slots
        self._seq: int | None = seq
        self._sampling = msgspec.structs.replace(sampling, logprobs=True, top_logprobs=0)
        self._judge = Judge()
        self._calibration = Calibration()
        self._open = False
        self._history: list[int] = []
        self._held: list[int] = []
        self._agreed = 0
        """So many tokens of the history are what the sequence holds."""
        self._unsure = False
        """Whether the sequence may hold more than we know of: a decode was cancelled."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first."""
        self._history.extend(int(token) for token in tokens)
        self._agree()
        for outcome in self._judge.accepted(tokens):
            self._calibration.add(outcome.source, outcome.index, outcome.claim, hit=outcome.hit)

    def _agree(self) -> None:
        """Note what of the sequence is known to be right; tokens may come while one is awaited."""
        agreed, held, history = self._agreed, self._held, self._history
        stop = min(len(held), len(history))
        while agreed < stop and held[agreed] == history[agreed]:
            agreed += 1
        self._agreed = agreed

    async def prepare(self) -> None:
        """Read the session's tokens so far, so that the first draft need not wait for that.

        Errors as for :meth:`propose`.
        """
        if len(self._history) - self._agreed > 1:
            await self._feed(self._history[:-1], sample=False)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what the model would say; see the port.

        Raises :class:`LimitExceeded` (``kv_full``) when the session has outgrown it, and what a
        runner raises.
        """
        tokens: list[int] = []
        confidence: list[float] = []
        text = [*self._history, *(int(token) for token in ahead)]
        together = 1.0
        while text and len(tokens) < min(limit, MAX_DRAFT):
            sampled = await self._feed(text, sample=True)
            chance = _chance(sampled.logprob)
            together *= chance
            if tokens and together < floor:
                break
            tokens.append(sampled.token)
            confidence.append(chance)
            text.append(sampled.token)
        return Draft(tuple(tokens), tuple(confidence), self._name)

    def expect_trees(self) -> None:
        """Have the model say what comes next after its first choice, from the first token on."""
        self._sampling = msgspec.structs.replace(self._sampling, top_logprobs=WIDTH, noisy_top=True)

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what the model would say, and what it would say instead; see the port.

        Raises what :meth:`propose` raises.  Takes no more passes than a chain of as many guesses.
        """
        text = [*self._history, *(int(token) for token in ahead)]
        growth = Growth(limit, floor=floor)
        told = self._judge.position
        at = ROOT
        for _ in range(min(limit, MAX_DRAFT) if text else 0):
            path = growth.path(at)
            sampled = await self._feed([*text, *path], sample=True)
            # what has come meanwhile is not what the guesses were made for
            judged = (*ahead, *path) if self._judge.position == told else None
            growth.add(at, self._candidates(sampled, judged))
            following = growth.next()
            if following is None:
                break
            at = following
        return growth.draft(self._name)

    def _candidates(self, sampled: Sampled, before: Sequence[int] | None) -> list[Candidate]:
        """Return the choices for one place by how often such choices were right of late.

        They are judged when it is known what came ``before`` them and then.
        """
        found: list[Candidate] = []
        for rank, (token, logprob) in enumerate(sampled.top):
            chance = _chance(logprob)
            if before is not None:
                self._judge.wait_for(Draft((token,), (chance,), str(rank)), before)
            found.append(Candidate(token, self._calibration.probability(str(rank), 0, chance)))
        return found

    async def _feed(self, text: list[int], *, sample: bool) -> Sampled:
        """Make the sequence hold ``text``; return the token after it and its probability."""
        seq = self._seq
        if seq is None:
            raise InvalidRequest(f"The drafter {self._name} is closed.", code="closed")
        n_vocab = self._runner.info.n_vocab
        keep, stop = self._agreed, min(len(self._held), len(text) - 1)
        keep = min(keep, stop)
        while keep < stop and self._held[keep] == text[keep]:
            keep += 1
        new = np.array(text[keep:], np.int64)
        if int(new.min()) < 0 or int(new.max()) >= n_vocab:
            raise Unsupported(
                f"The text has a token that the drafter {self._name} does not know.",
                code="vocabulary_mismatch",
                drafter=self._name,
            )
        if len(text) > self._runner.info.n_ctx:
            raise LimitExceeded(
                f"The session has outgrown the {self._runner.info.n_ctx} tokens of the drafter"
                f" {self._name}.",
                code="kv_full",
                n_ctx=self._runner.info.n_ctx,
                needed=len(text),
            )
        await self._put_back(seq, keep)
        output = StepOutput()
        while keep < len(text):
            cut = min(len(text), keep + PREFILL_CHUNK - keep % PREFILL_CHUNK)
            part = np.array(text[keep:cut], np.int32)
            self._unsure = True
            step = StepInput(seq, keep, part, None, sample and cut == len(text))
            (output,) = await self._runner.decode([step])
            self._unsure = False
            self._held += text[keep:cut]
            keep = cut
        self._agree()
        if not sample:
            return Sampled(0)
        if not output.sampled:
            raise CorruptData("The drafter's runner gave no token.", code="malformed_message")
        (sampled,) = output.sampled
        return sampled

    async def _put_back(self, seq: int, keep: int) -> None:
        """Drop what the sequence holds beyond ``keep`` tokens; begin anew if that is none."""
        if self._open and keep and (self._unsure or keep < len(self._held)):
            await self._runner.apply([TrimSequence(seq, keep)])
        if not keep:
            if seq in self._slots.used:
                # whoever used it may have been cancelled before or after it was freed
                with contextlib.suppress(InvalidRequest):
                    await self._runner.apply([FreeSequence(seq)])
            self._slots.used.add(seq)
            await self._runner.apply([OpenSequence(seq, self._sampling)])
            self._open = True
        self._unsure = False
        del self._held[keep:]
        self._agreed = min(self._agreed, keep)

    async def aclose(self) -> None:
        """Give the sequence back; idempotent.  What it holds is dropped now or by its next user."""
        seq, self._seq = self._seq, None
        if seq is None:
            return
        try:
            if self._open:
                await self._runner.apply([FreeSequence(seq)])
                self._slots.used.discard(seq)
        finally:
            self._slots.free.append(seq)


def _chance(logprob: float | None) -> float:
    return math.exp(min(0.0, logprob or 0.0))


class ModelDrafters:
    """Drafters of one loaded model, a sequence each.

    ``runner`` holds the whole model, and ``pieces`` are the bytes of its tokens.
    """

    def __init__(self, name: str, runner: DraftRunner, pieces: Sequence[bytes]) -> None:
        """Raises :class:`InvalidRequest` (``wrong_slice``) when it is not the whole model."""
        part = runner.info.slice
        if part.first != 0 or not part.head:
            raise InvalidRequest(
                f"The drafter {name} was loaded in part; a drafter is a whole model.",
                code="wrong_slice",
            )
        self._name = name
        self._runner = runner
        self._pieces = pieces
        self._slots = _Slots(runner.info.n_seq)
        self._checked: Sequence[bytes] | None = None

    @property
    def name(self) -> str:
        """The model's name, by which requests choose it."""
        return self._name

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> ModelDrafter:
        """Return a drafter for a session; see the port for what is refused."""
        if pieces is not self._checked:
            check_vocabulary(self._name, self._pieces, pieces)
            self._checked = pieces
        if not self._slots.free:
            raise LimitExceeded(
                f"The drafter {self._name} serves {self._runner.info.n_seq} sessions, as many as"
                " it was loaded for.",
                code="too_many_drafters",
                drafter=self._name,
            )
        seq = self._slots.free.pop()
        return ModelDrafter(self._name, self._runner, self._slots, seq, sampling)
