"""What a user of the engine sees: requests, streamed tokens, the end of a generation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec

from pyagent_node.base.types import Digest, Placement, SessionId
from pyagent_node.inference.kv.budgets import Evicted, Pruning
from pyagent_node.inference.kv.pieces import JoinPlan
from pyagent_node.inference.sampling import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LABEL_LENGTH = 16384
NO_SPECULATION = "none"
AUTO_SPECULATION = "auto"

FetchWhen = Literal["auto", "always", "never"]
"""Whether KV blocks come from other nodes: where that is expected to pay, in any case, or not."""


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class GenerationRequest(msgspec.Struct, frozen=True):
    """One generation.  Exactly one of ``messages``, ``prompt`` and ``tokens`` is given.

    ``model`` is a name or a digest.  ``messages`` go through the model's own chat template,
    ``prompt`` is tokenised as it is (with the model's BOS where it asks for one), ``tokens`` are
    used unchanged.  ``max_tokens`` ``None`` means up to the context length.

    ``session`` is the stable id of the session (``None``: the engine draws one); ``label`` goes
    unread into the session's journal, and comes back with it.

    ``speculation`` says who guesses tokens ahead: nobody (:data:`NO_SPECULATION`), whoever is best
    (:data:`AUTO_SPECULATION`), or a drafter by its name; ``None``: as the node is set.  It changes
    no token, only how soon they come.  ``draft_length`` fixes how many guesses a step carries and
    ``draft_depth`` how many steps are in flight; where the first is ``None`` both are decided as
    it goes.  With ``draft_tree`` that many guesses form a tree, where the drafter can make one.

    With ``prompt_cache`` the KV of the prompt is kept, and used again for requests that begin with
    the same tokens and have the same ``cache_salt``; it changes no token either.  ``cache_fetch``
    says whether it may come from other nodes: "auto" where that is expected to be faster than
    computing it, "always" or "never".

    ``join`` names pieces of ``tokens`` whose KV may be that of the pieces alone (``kv.chunks``):
    it is made where it is not there yet, among those with the same ``cache_salt``.  This *does*
    change the answer.  The KV of such a prompt is not kept.

    With ``pruning`` the ranks give up cells that little attention rests on (``kv.pruning``), from
    the end of the prompt on.  This changes the answer, too, and its KV is neither kept nor found.
    """

    model: str
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    tokens: tuple[int, ...] | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    sampling: SamplingParams = SamplingParams()
    session: SessionId | None = None
    label: str = ""
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    cache_salt: str = ""
    prompt_cache: bool = True
    join: JoinPlan | None = None
    cache_fetch: FetchWhen = "auto"
    pruning: Pruning | None = None


class TopLogprob(msgspec.Struct, frozen=True):
    """One alternative at a position: its token, bytes and log-probability."""

    token: int
    piece: bytes
    logprob: float


class Generated(msgspec.Struct, frozen=True, omit_defaults=True):
    """One token of the answer.

    ``text`` is what may be shown now: it is held back while it could be the beginning of a stop
    string or of an incomplete UTF-8 character, so it may be empty or hold several tokens' text.
    ``piece`` are this token's own bytes.  ``step_seconds`` is the time from sending the step to
    having its result and ``compute_seconds`` what the ranks computed of that; both are 0 for the
    first token, which took the prompt's time.
    """

    token: int
    text: str
    piece: bytes
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()
    step_seconds: float = 0.0
    compute_seconds: float = 0.0


class SpeculationUsage(msgspec.Struct, frozen=True):
    """What guessing came to in one generation, by its head.

    ``passes`` are the steps that continued the answer, ``drafted`` the guesses that were sent,
    ``accepted`` those that were right; ``cancelled`` are steps sent for nothing, ``reused`` those
    of the passes that were sent before the one they follow was answered.  ``failed`` says that
    the drafter was given up on the way.  ``length`` and ``depth`` are what the controller
    chose last: guesses a step and steps in flight; it expected ``predicted_tokens_per_second`` of
    the passes so far, and ``predicted_plain_tokens_per_second`` without guesses.
    """

    drafter: str
    passes: int
    drafted: int
    accepted: int
    cancelled: int
    failed: bool
    length: int
    depth: int
    predicted_tokens_per_second: float
    predicted_plain_tokens_per_second: float
    reused: int = 0

    @property
    def acceptance(self) -> float:
        """The share of guesses that were right; 0 when there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """What a step added to the answer; 0 when there was none."""
        return (self.passes + self.accepted) / self.passes if self.passes else 0.0


class Usage(msgspec.Struct, frozen=True):
    """Token counts and times of one generation (seconds on the monotonic clock).

    ``failovers`` counts how often the generation lost ranks that had computed something of it (or
    its head) and went on without them, ``recomputed_tokens`` what was computed again for that.
    ``stall_seconds`` is the longest pause between two tokens, as far as the reader was there.
    ``speculation`` is ``None`` for an answer without.  ``cached_tokens`` are those tokens of the
    prompt whose KV was there already and did not have to be computed; ``joined_tokens`` those
    whose KV was taken over from pieces, so that the answer is not that of the whole prompt, and
    ``joined_landmarks`` those of them of which some rank took over the landmarks only.
    ``evicted`` is what ranks gave up of its KV, ``None`` where nothing was to be.
    ``classes`` are the exactness classes of the backends that served it, in the order of their
    first tokens (``BackendInfo.exactness``).
    """

    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    seconds: float
    failovers: int = 0
    recomputed_tokens: int = 0
    stall_seconds: float = 0.0
    speculation: SpeculationUsage | None = None
    cached_tokens: int = 0
    joined_tokens: int = 0
    joined_landmarks: int = 0
    evicted: Evicted | None = None
    classes: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first over the time after the first; 0 when there was none."""
        rest = self.seconds - self.ttft_seconds
        return max(0, self.completion_tokens - 1) / rest if rest > 0 else 0.0


class Finished(msgspec.Struct, frozen=True):
    """The last event of a stream; ``text`` is what was held back and turned out to be wanted."""

    reason: Literal["stop", "length"]
    text: str
    usage: Usage
    placement: Placement


GenerationEvent = Generated | Finished


class SessionView(msgspec.Struct, frozen=True):
    """A session as ``status`` shows it.

    Its head knows how often it changed ranks, whether it is ``suspended``: waiting for some, and
    what guessing has come to so far.
    """

    session: SessionId
    model: str
    epoch: int
    head: str
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    failovers: int = 0
    suspended: bool = False
    speculation: SpeculationUsage | None = None


class LoadedModel(msgspec.Struct, frozen=True):
    """A model that can be asked now."""

    name: str
    digest: Digest
    n_ctx: int
    created: int
    placement: Placement


class Engine(Protocol):
    """Answers generation requests over the current placements."""

    def models(self) -> list[LoadedModel]:
        """Return the models with a live placement."""
        ...

    def sessions(self) -> list[SessionView]:
        """Return the sessions this node heads or serves."""
        ...

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Run one generation; leaving the context cancels it on every rank.

        The request is checked and the prompt prefilled inside; errors come from entering or from
        iterating: :class:`NotFound` (``model_not_found``), :class:`InvalidRequest`
        (``bad_parameter``, ``prompt_too_long`` with facts ``prompt_tokens`` and ``n_ctx``),
        :class:`LimitExceeded` (``too_many_sessions``), :class:`Conflict` (``session_exists``,
        ``model_unloaded``), :class:`Unavailable`, :class:`RunnerFailed` (facts ``rank``,
        ``peer_id`` and ``reason``).  Errors of ranks are shown when nothing took over in time.
        """
        ...

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Return the tokens of ``text`` without any added ones; none is read as a control token."""
        ...

    async def chat(self, model: str, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the tokens of a conversation in the model's template, ready for the answer."""
        ...
