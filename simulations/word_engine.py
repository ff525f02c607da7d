"""An engine without a model: deterministic, so that what the API makes of it can be checked."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import trio

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.generation import (
    NO_SPECULATION,
    ChatMessage,
    Finished,
    Generated,
    GenerationEvent,
    GenerationRequest,
    LoadedModel,
    SessionView,
    SpeculationUsage,
    TopLogprob,
    Usage,
)
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.node.session_recovery import session_not_found

DIGEST = Digest("ab" * 32)
PEER = PeerId("12D3KooWTest")
N_CTX = 64


def _guesses(request: GenerationRequest) -> SpeculationUsage | None:
    """Return made-up counts for a request with a drafter."""
    if request.speculation in (None, NO_SPECULATION):
        return None
    return SpeculationUsage(request.speculation, 4, 10, 6, 1, False, 3, 2, 20.0, 10.0)


class WordEngine:
    """Generates one word a token, chosen by a hash of prompt, seed and position.

    A token is the index of its word.  ``gate`` (when set) is waited for before each token, so a
    test can hold a generation; ``cancelled`` counts generations left before their end.
    """

    words = (*(f"w{i} " for i in range(100)), "é ", "🦀 ")

    def __init__(self) -> None:
        self.caches = False
        """Whether prompts that were asked before count as cached, all but a token."""
        self._known: set[tuple[str, object]] = set()
        self.running = 0
        self.started = 0
        self.cancelled = 0
        self.idle = trio.Event()
        self.gate: Callable[[int], trio.Event | None] | None = None
        self.fail_at: dict[int, PyAgentError | Exception] = {}
        self.loaded = True
        self.limit = 100
        self.requests: list[GenerationRequest] = []

    def placement(self) -> Placement:
        """Return the one placement: a single rank."""
        return Placement(
            DIGEST, 7, (Rank(0, Slice(0, 30, True), PEER),), n_ctx=N_CTX, n_seq=self.limit
        )

    def _cached(self, request: GenerationRequest, prompt: int) -> int:
        """Return how much of a prompt was asked for before, and note it."""
        name = (request.cache_salt, request.prompt or request.tokens or request.messages)
        if not request.prompt_cache or not self.caches:
            return 0
        cached = prompt - 1 if name in self._known else 0
        self._known.add(name)
        return cached

    def models(self) -> list[LoadedModel]:
        """Return the model ``words``, unless ``loaded`` is off."""
        if not self.loaded:
            return []
        return [LoadedModel("words", DIGEST, N_CTX, 1700000000, self.placement())]

    def sessions(self) -> list[SessionView]:
        """Return one view for each running generation."""
        return [
            SessionView(SessionId("0" * 32), "words", 7, PEER, 1, 1, 1.0)
            for _ in range(self.running)
        ]

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Return one number a word."""
        return [len(word) for word in text.split()]

    async def chat(self, model: str, messages: Sequence[ChatMessage]) -> list[int]:
        """Return a number for each role, those of the words, and one at the end."""
        tokens: list[int] = []
        for message in messages:
            tokens += [90 + len(message.role), *await self.tokenize(model, message.content)]
        return [*tokens, 99]

    def prompt_length(self, request: GenerationRequest) -> int:
        """Return the words (or tokens) of the prompt."""
        if request.tokens is not None:
            return len(request.tokens)
        if request.prompt is not None:
            return len(request.prompt.split())
        return sum(len(m.content.split()) for m in request.messages or ())

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Generate words; see the class."""
        return self._generate(request)

    @asynccontextmanager
    async def _generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self.requests.append(request)
        if request.model not in ("words", DIGEST):
            raise NotFound("no such model", code="model_not_found")
        request.sampling.check(len(self.words))
        prompt = self.prompt_length(request)
        if prompt >= N_CTX:
            raise InvalidRequest(
                f"The prompt has {prompt} tokens; the context holds {N_CTX}.",
                code="prompt_too_long",
                prompt_tokens=prompt,
                n_ctx=N_CTX,
            )
        if self.running >= self.limit:
            raise LimitExceeded("full", code="too_many_sessions")
        self.running += 1
        self.started += 1
        self.idle = trio.Event()
        ended = False

        async def events() -> AsyncGenerator[GenerationEvent, None]:
            nonlocal ended
            began = trio.current_time()
            limit = min(request.max_tokens or N_CTX, N_CTX - prompt)
            text = ""
            count = 0
            reason = "length"
            for position in range(limit):
                if self.gate is not None:
                    event = self.gate(position)
                    if event is not None:
                        await event.wait()
                await trio.lowlevel.checkpoint()
                if position in self.fail_at:
                    raise self.fail_at[position]
                token = self.choose(request, position)
                word = self.words[token]
                count += 1
                text += word
                hit = next((s for s in request.stop if s in text), None)
                top = tuple(
                    TopLogprob(t, self.words[t].encode(), -float(i + 1))
                    for i, t in enumerate(
                        (token + k) % len(self.words) for k in range(request.sampling.top_logprobs)
                    )
                )
                yield Generated(
                    token,
                    "" if hit else word,
                    word.encode(),
                    -1.0 if request.sampling.logprobs else None,
                    top,
                )
                if hit:
                    reason = "stop"
                    break
            now = trio.current_time() - began
            ended = True
            yield Finished(
                "stop" if reason == "stop" else "length",
                "",
                Usage(
                    prompt,
                    count,
                    now,
                    now,
                    speculation=_guesses(request),
                    cached_tokens=self._cached(request, prompt),
                ),
                self.placement(),
            )

        stream = events()
        try:
            yield stream
        finally:
            await stream.aclose()
            self.running -= 1
            if not ended:
                self.cancelled += 1
            if not self.running:
                self.idle.set()

    def resume(
        self, journal: SessionJournal, after: int
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Refuse: nothing is ever taken over from another node."""
        raise session_not_found(journal.session)

    def fail(self, session: SessionId, error: PyAgentError) -> bool:
        """Know no session of others."""
        return False

    def choose(self, request: GenerationRequest, position: int) -> int:
        """Return the token at ``position``; the seed counts when the temperature does."""
        if request.sampling.logit_bias:
            return max(request.sampling.logit_bias.items(), key=lambda item: item[1])[0]
        source = f"{request.messages}{request.prompt}{request.tokens}"
        if request.sampling.temperature > 0:
            source += str(request.sampling.seed)
        digest = hashlib.sha256(f"{source}{position}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % len(self.words)
