"""The bodies of OpenAI's requests as they come in: types alone."""

from __future__ import annotations

import msgspec

from pyagent_node.inference.generation import FetchWhen


class StreamOptions(msgspec.Struct, frozen=True):
    """Options of a stream."""

    include_usage: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """One part of a message; only ``type: text`` is supported."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation as OpenAI writes it."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[object] | None = None
    function_call: object = None
    audio: object = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """Only ``type: text`` is supported."""

    type: str


class CommonBody(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints understand."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    resume_seconds: float | None = None
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    cache_salt: str | None = None
    prompt_cache: bool | None = None
    cache_fetch: FetchWhen | None = None
    kv_budget: str | int | None = None


class ContextBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From which context to answer: ours."""

    name: str
    count: int | None = None
    exact: bool | None = None


class ChatBody(CommonBody, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[Message] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[object] | None = None
    tool_choice: object = None
    functions: list[object] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None
    audio: object = None
    prediction: object = None
    web_search_options: object = None
    context: ContextBody | None = None


class CompletionBody(CommonBody, frozen=True, kw_only=True):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]] | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
