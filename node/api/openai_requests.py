"""OpenAI's request bodies, checked, and turned into :class:`GenerationRequest`.

Pure: bytes in, a :class:`Plan` out.  Fields that change the answer and that we do not support are
refused by name; fields that do not (``user``, ``metadata``, ...) and unknown ones are ignored.

Besides OpenAI's own fields these are understood: ``top_k``, ``min_p``, ``repetition_penalty``,
``ignore_eos``, ``max_tokens: -1`` (up to the context), ``return_token_ids`` (adds
``token_ids``, with ``step_seconds`` and ``compute_seconds`` of each, to every choice and a
``pyagent`` object with the placement and the times of the first choice to the end of the answer),
``resume_seconds`` (how long the answer goes on without its client, who may come back for it),
``speculation`` with ``draft_length``, ``draft_depth`` and ``draft_tree`` (who guesses tokens ahead,
how many and in what shape; see ``GenerationRequest``), ``prompt_cache`` with ``cache_salt``
(whether KV of the prompt is kept and reused, and among whom), and, in chats, ``context`` (from
which context to answer: its ``name``, the ``count`` of chunks, and ``exact``).
"""

from __future__ import annotations

import hashlib
import math
from typing import Final, Literal

import msgspec

from pyagent_node.base.contexts import check_context_name
from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.inference.generation import (
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    ChatMessage,
    GenerationRequest,
)
from pyagent_node.inference.kv.budgets import read_budget
from pyagent_node.inference.sampling import MAX_TOP_LOGPROBS, SamplingParams
from pyagent_node.node.api.context_chat import DEFAULT_CHUNKS, MAX_CHUNKS, ContextAsk
from pyagent_node.node.api.errors import decode_body
from pyagent_node.node.api.openai_bodies import (
    ChatBody,
    CommonBody,
    CompletionBody,
    ContextBody,
    Message,
)
from pyagent_node.sharding.kv_keys import MAX_SALT

MAX_CHOICES: Final = 8
"""Generations that one request may ask for (``n`` times the number of prompts)."""
MAX_MESSAGES: Final = 4096
LEGACY_MAX_TOKENS: Final = 16
"""What ``/v1/completions`` generates when ``max_tokens`` is absent, as OpenAI documents."""
_SEED_RANGE: Final = 2**64


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer is shown, whoever shows it.

    ``choices`` belong to ``prompts`` distinct prompts: choice ``i`` to prompt
    ``i // (choices // prompts)``.
    """

    kind: Literal["chat", "completion"]
    model: str
    include_usage: bool
    logprobs: bool
    top_logprobs: int
    token_ids: bool
    seed: int
    prompts: int
    choices: int


class Plan(Shape, frozen=True, kw_only=True):
    """A checked request: ``requests[i]`` answers choice ``i``.

    ``resume_seconds`` is how long the answer goes on without its client, ``context`` what the
    answer is to be drawn from.
    """

    stream: bool
    resume_seconds: float
    requests: tuple[GenerationRequest, ...]
    context: ContextAsk | None = None

    def shape(self) -> Shape:
        """Return how the answer is shown."""
        names = Shape.__struct_fields__
        return Shape(**{name: getattr(self, name) for name in names})


_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)


def choice_seed(seed: int, choice: int) -> int:
    """Return the seed of one of several choices.

    Choice 0 uses ``seed`` itself, choice ``i`` the first 8 bytes, little-endian, of SHA-256 over
    ``"pyagent choice"``, the seed and ``i``, each as 8 bytes little-endian.
    """
    if choice == 0:
        return seed
    text = b"pyagent choice" + seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def plan_chat(body: bytes, fresh_seed: int) -> Plan:
    """Check the body of a chat request.

    ``fresh_seed`` (unsigned, 64 bits) is used when the request has none.  Raises
    :class:`InvalidRequest` and :class:`Unsupported` with the fact ``parameter``.
    """
    chat = decode_body(body, _CHAT)
    for name in ("functions", "audio", "prediction", "web_search_options"):
        if getattr(chat, name):
            raise _unsupported(name)
    if chat.tools and chat.tool_choice != "none":
        raise _unsupported("tools")
    if chat.response_format is not None and chat.response_format.type != "text":
        raise _unsupported("response_format", f"type {chat.response_format.type!r}")
    if chat.modalities is not None and chat.modalities != ["text"]:
        raise _unsupported("modalities", "anything but text")
    if not chat.messages:
        raise _bad("messages", "must hold at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        raise _bad("messages", f"holds {len(chat.messages)} messages; at most {MAX_MESSAGES}")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise _bad("top_logprobs", "needs logprobs to be true")
    messages = tuple(_message(index, m) for index, m in enumerate(chat.messages))
    limit = chat.max_completion_tokens
    request = GenerationRequest(
        model=chat.model,
        messages=messages,
        max_tokens=_max_tokens("max_completion_tokens", limit)
        if limit is not None
        else _max_tokens("max_tokens", chat.max_tokens),
        stop=_stops(chat.stop),
        ignore_eos=bool(chat.ignore_eos),
        sampling=_sampling(chat, fresh_seed, bool(chat.logprobs), chat.top_logprobs or 0),
    )
    plan = _plan("chat", chat, [request])
    return msgspec.structs.replace(plan, context=_context(chat.context))


def plan_completion(body: bytes, fresh_seed: int) -> Plan:
    """Check the body of a completion request; otherwise as :func:`plan_chat`."""
    completion = decode_body(body, _COMPLETION)
    if completion.echo:
        raise _unsupported("echo")
    if completion.suffix:
        raise _unsupported("suffix")
    if completion.best_of is not None and completion.best_of != (completion.n or 1):
        raise _unsupported("best_of")
    limit = completion.max_tokens
    asked = completion.logprobs
    sampling = _sampling(completion, fresh_seed, asked is not None, asked or 0, "logprobs")
    stop = _stops(completion.stop)
    max_tokens = LEGACY_MAX_TOKENS if limit is None else _max_tokens("max_tokens", limit)
    return _plan(
        "completion",
        completion,
        [
            GenerationRequest(
                model=completion.model,
                prompt=prompt if isinstance(prompt, str) else None,
                tokens=None if isinstance(prompt, str) else prompt,
                max_tokens=max_tokens,
                stop=stop,
                ignore_eos=bool(completion.ignore_eos),
                sampling=sampling,
            )
            for prompt in _prompts(completion.prompt)
        ],
    )


def _context(body: ContextBody | None) -> ContextAsk | None:
    if body is None:
        return None
    count = DEFAULT_CHUNKS if body.count is None else body.count
    if not 1 <= count <= MAX_CHUNKS:
        raise _bad("context.count", f"is {count}; it must lie between 1 and {MAX_CHUNKS}")
    return ContextAsk(name=check_context_name(body.name), count=count, exact=body.exact is True)


def _plan(
    kind: Literal["chat", "completion"], body: CommonBody, requests: list[GenerationRequest]
) -> Plan:
    if not body.model:
        raise _bad("model", "must name a model; GET /v1/models lists them")
    if body.stream_options is not None and not body.stream:
        raise _bad("stream_options", "needs stream to be true")
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_CHOICES:
        raise _bad("n", f"is {n}; it must lie between 1 and {MAX_CHOICES}")
    if n * len(requests) > MAX_CHOICES:
        raise _bad("n", f"times {len(requests)} prompts is over {MAX_CHOICES} choices")
    if len((body.cache_salt or "").encode()) > MAX_SALT:
        raise _bad("cache_salt", f"may have at most {MAX_SALT} bytes")
    sampling = requests[0].sampling
    choices = [
        msgspec.structs.replace(
            request,
            sampling=msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, index)),
            speculation=body.speculation,
            draft_length=body.draft_length,
            draft_depth=body.draft_depth,
            draft_tree=body.draft_tree,
            cache_salt=body.cache_salt or "",
            prompt_cache=body.prompt_cache is not False,
            cache_fetch=body.cache_fetch or "auto",
            pruning=None if body.kv_budget is None else read_budget(str(body.kv_budget)),
        )
        for request in requests
        for index in range(n)
    ]
    options = body.stream_options
    return Plan(
        kind=kind,
        model=body.model,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
        token_ids=bool(body.return_token_ids),
        seed=sampling.seed,
        prompts=len(requests),
        choices=len(choices),
        resume_seconds=_resume_seconds(body.resume_seconds),
        requests=tuple(choices),
    )


def _sampling(
    body: CommonBody,
    fresh_seed: int,
    logprobs: bool,
    top_logprobs: int,
    name: str = "top_logprobs",
) -> SamplingParams:
    if not 0 <= top_logprobs <= MAX_TOP_LOGPROBS:
        raise _bad(name, f"is {top_logprobs}; it must lie between 0 and {MAX_TOP_LOGPROBS}")
    seed = fresh_seed if body.seed is None else body.seed
    if not -(_SEED_RANGE // 2) <= seed < _SEED_RANGE:
        raise _bad("seed", "must be an integer of 64 bits")
    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "frequency_penalty",
            "presence_penalty",
            "top_k",
            "min_p",
            "repetition_penalty",
        )
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") == -1:
        given["top_k"] = 0  # other servers write "off" so
    return SamplingParams(
        seed=seed % _SEED_RANGE,
        logit_bias=_bias(body.logit_bias or {}),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        **given,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise _bad("logit_bias", f"has the key {key[:40]!r}, which is no token id")
        bias[int(key)] = value
    return bias


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOP_STRINGS:
        raise _bad("stop", f"holds {len(stops)} strings; at most {MAX_STOP_STRINGS}")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise _bad("stop", f"strings must have 1 to {MAX_STOP_LENGTH} characters")
    return stops


def _resume_seconds(value: float | None) -> float:
    seconds = 0.0 if value is None else value
    if not (math.isfinite(seconds) and seconds >= 0):
        raise _bad("resume_seconds", f"is {seconds!r}; it must be 0 or more")
    return seconds


def _max_tokens(name: str, value: int | None) -> int | None:
    if value is None or value == -1:
        return None
    if value < 1:
        raise _bad(name, f"is {value}; it must be at least 1, or -1 for up to the context")
    return value


def _prompts(prompt: str | list[str | int | list[int]] | None) -> list[str | tuple[int, ...]]:
    if prompt is None:
        raise _bad("prompt", "is missing")
    parts = [prompt] if isinstance(prompt, str) else prompt
    tokens = [part for part in parts if isinstance(part, int)]
    prompts: list[str | tuple[int, ...]] = [
        part if isinstance(part, str) else tuple(part)
        for part in parts
        if not isinstance(part, int)
    ]
    if tokens and prompts:
        raise _bad("prompt", "mixes token ids with texts")
    if tokens:
        prompts = [tuple(tokens)]
    if not prompts or not all(prompts):
        raise _bad("prompt", "is empty")
    if len(prompts) > MAX_CHOICES:
        raise _bad("prompt", f"holds {len(prompts)} prompts; at most {MAX_CHOICES}")
    for part in prompts:
        if not isinstance(part, str) and not all(0 <= token < 2**31 for token in part):
            raise _bad("prompt", "holds a number that is no token id")
    return prompts


_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def _message(index: int, message: Message) -> ChatMessage:
    where = f"messages[{index}]"
    role = _ROLES.get(message.role)
    if role is None:
        if message.role in ("tool", "function"):
            raise _unsupported(f"{where}.role", f"role {message.role!r}")
        raise _bad(f"{where}.role", f"is {message.role[:40]!r}; use {', '.join(_ROLES)}")
    for name in ("tool_calls", "function_call", "audio"):
        if getattr(message, name):
            raise _unsupported(f"{where}.{name}")
    content = message.content
    if content is None:
        raise _bad(f"{where}.content", "is missing")
    if isinstance(content, str):
        return ChatMessage(role, content)
    texts = []
    for at, part in enumerate(content):
        if part.type != "text":
            raise _unsupported(f"{where}.content[{at}]", f"content of type {part.type[:40]!r}")
        if part.text is None:
            raise _bad(f"{where}.content[{at}].text", "is missing")
        texts.append(part.text)
    return ChatMessage(role, "".join(texts))


def _bad(parameter: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{parameter} {reason}.", code="bad_parameter", parameter=parameter)


def _unsupported(parameter: str, what: str | None = None) -> Unsupported:
    subject = f"{parameter}: {what}" if what else parameter
    return Unsupported(
        f"{subject} is not supported.",
        code="unsupported_parameter",
        remedy="Leave it out; answers are plain text.",
        parameter=parameter,
    )
