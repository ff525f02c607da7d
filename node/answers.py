"""A generation as the client asks for it, and its answer as it comes back, line by line."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from pyagent_node.base.types import Placement
from pyagent_node.inference.generation import ChatMessage, FetchWhen, SpeculationUsage
from pyagent_node.node.api.citations import Citation
from pyagent_node.node.client_transport import ApiFailure, broken_off, decode, failure_of


class ContextChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From which context to answer, by how many chunks; ``exact``: nothing of them is joined."""

    name: str
    count: int | None = None
    exact: bool | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generation.  Exactly one of ``messages`` and ``prompt``; ``None`` is the API's default.

    The meanings are those of the OpenAI fields of the same names, and of
    :class:`~pyagent_node.inference.sampling.SamplingParams` for the rest.
    """

    model: str
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    cache_salt: str | None = None
    prompt_cache: bool | None = None
    cache_fetch: FetchWhen | None = None
    kv_budget: str | None = None
    context: ContextChoice | None = None


class Piece(msgspec.Struct, frozen=True):
    """Some more of an answer; ``text`` is empty while a token's text is held back.

    ``step_seconds`` and ``compute_seconds`` are the times of each token (see ``Generated``).
    """

    text: str
    token_ids: tuple[int, ...]
    step_seconds: tuple[float, ...] = ()
    compute_seconds: tuple[float, ...] = ()


class PrunedKv(msgspec.Struct, frozen=True):
    """What ranks hold of an answer's KV and what they gave up; a cell counts on every rank."""

    held_cells: int
    evicted_cells: int
    evicted_bytes: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, the last item of a stream; ``text`` is all of it.

    ``finish_reason`` is ``"stop"`` or ``"length"``; ``tokens_per_second`` counts the tokens after
    the first over the time after the first, measured in the daemon.  ``failovers`` counts how often
    the answer went on after it lost a rank or its head, ``recomputed_tokens`` what that cost, and
    ``stall_seconds`` is the longest pause between two tokens.  ``speculation`` says what guessing
    came to, if anybody guessed.  ``cached_tokens`` of the prompt did not have to be computed,
    the KV of ``joined_tokens`` was that of chunks of a context, which ``citations`` lists; of
    ``joined_landmarks`` of them some rank had landmarks only.  ``kv``
    is there where a ``kv_budget`` was asked for that ranks could keep.
    ``served_by`` are the exactness classes that computed the answer (``docs/backends.md``).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    ttft_seconds: float
    seconds: float
    tokens_per_second: float
    placement: Placement
    failovers: int = 0
    recomputed_tokens: int = 0
    stall_seconds: float = 0.0
    speculation: SpeculationUsage | None = None
    cached_tokens: int = 0
    joined_tokens: int = 0
    joined_landmarks: int = 0
    kv: PrunedKv | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    step_seconds: tuple[float, ...] = ()
    compute_seconds: tuple[float, ...] = ()


class _Details(msgspec.Struct, frozen=True):
    placement: Placement
    seed: int
    ttft_seconds: float
    seconds: float
    tokens_per_second: float
    failovers: int = 0
    recomputed_tokens: int = 0
    stall_seconds: float = 0.0
    speculation: SpeculationUsage | None = None


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0
    joined_tokens: int = 0
    joined_landmarks: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails = _PromptDetails()
    kv: PrunedKv | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    pyagent: _Details | None = None
    error: ApiFailure | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()


def read_answer(lines: Iterator[str], *, whole: bool = True) -> Iterator[Piece | Answer]:
    """Read what the daemon streams: pieces as they come, then the whole answer.

    A stream without the usage ends without it, unless it has to be ``whole``: then it was broken
    off (:class:`Unavailable`).
    """
    texts: list[str] = []
    tokens: list[int] = []
    reason = ""
    details: _Details | None = None
    usage: _Usage | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()
    done = False
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            done = True
            break
        chunk = decode(data, _Chunk)
        if chunk.error is not None:
            raise failure_of(chunk.error, 500)
        for choice in chunk.choices:
            text = (choice.delta.content if choice.delta else choice.text) or ""
            reason = choice.finish_reason or reason
            texts.append(text)
            tokens += choice.token_ids
            if text or choice.token_ids:
                yield Piece(text, choice.token_ids, choice.step_seconds, choice.compute_seconds)
        citations = chunk.citations or citations
        served_by = chunk.served_by or served_by
        usage = chunk.usage or usage
        details = chunk.pyagent or details
    if details is None or usage is None:
        if done and not whole:
            return
        raise broken_off()
    yield Answer(
        text="".join(texts),
        token_ids=tuple(tokens),
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        seed=details.seed,
        ttft_seconds=details.ttft_seconds,
        seconds=details.seconds,
        tokens_per_second=details.tokens_per_second,
        placement=details.placement,
        failovers=details.failovers,
        recomputed_tokens=details.recomputed_tokens,
        stall_seconds=details.stall_seconds,
        speculation=details.speculation,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        joined_tokens=usage.prompt_tokens_details.joined_tokens,
        joined_landmarks=usage.prompt_tokens_details.joined_landmarks,
        kv=usage.kv,
        citations=citations,
        served_by=served_by,
    )
