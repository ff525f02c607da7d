"""Answers from a context: finds chunks, lays out the prompt, and says what was used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.generation import (
    ChatMessage,
    Engine,
    GenerationRequest,
    LoadedModel,
)
from pyagent_node.node.api.citations import Citation
from pyagent_node.node.api.context_schema import HitView, QueryReply, QueryRequest
from pyagent_node.node.context_prompt import (
    PROBES,
    REPEATED,
    SOURCES,
    Laid,
    asked_text,
    frame_of,
    lay_out,
    piece_text,
    plain_text,
    probed,
    question_of,
    room_for,
    with_instructions,
)

DEFAULT_CHUNKS: Final = 8
MAX_CHUNKS: Final = 32
"""Chunks that a request may ask for."""


class ContextAsk(msgspec.Struct, frozen=True, kw_only=True):
    """From which context to answer, by how many chunks of it.

    ``exact``: the whole prompt is computed, chunks too, so that the answer is that of the model to
    the prompt; else KV of the chunks is joined where it can be.
    """

    name: str
    count: int = DEFAULT_CHUNKS
    exact: bool = False


class Queries(Protocol):
    """Finds chunks; see ``ContextServices``."""

    async def query(self, name: str, request: QueryRequest) -> QueryReply:
        """Return the chunks of a context that a question needs."""
        ...


class Grounded(NamedTuple):
    """What requests become by a context: a prompt for all of them, and what is in it."""

    requests: tuple[GenerationRequest, ...]
    citations: tuple[Citation, ...]


async def ground(
    requests: Sequence[GenerationRequest],
    ask: ContextAsk,
    *,
    engine: Engine,
    model: LoadedModel,
    contexts: Queries,
) -> Grounded:
    """Return chat requests (choices of one prompt) with the chunks that their question needs.

    Raises what ``query`` and ``Engine.chat`` raise, and :class:`InvalidRequest`
    (``bad_parameter``) where the last message is no question.
    """
    first = requests[0]
    if first.messages is None:
        raise InvalidRequest(
            "A context goes with messages.", code="bad_parameter", parameter="context"
        )
    messages = with_instructions(first.messages)
    question = question_of(messages)
    found = await contexts.query(ask.name, QueryRequest(question=question, count=ask.count))
    hits = found.hits
    texts = [piece_text(hit.source, hit.first_line, hit.last_line, hit.text) for hit in hits]
    passages = [hit.best for hit in hits]
    laid = await _lay_out(first, ask, messages, texts, passages, engine=engine, model=model)
    if laid is None:
        content = plain_text(texts, asked_text(question, passages[:REPEATED]))
        whole = (*messages[:-1], ChatMessage("user", content))
        made = [msgspec.structs.replace(request, messages=whole) for request in requests]
        return Grounded(tuple(made), _citations(hits, range(len(hits))))
    made = [
        msgspec.structs.replace(request, messages=None, tokens=laid.tokens, join=laid.join)
        for request in requests
    ]
    return Grounded(tuple(made), _citations(hits, laid.chunks))


async def _lay_out(
    request: GenerationRequest,
    ask: ContextAsk,
    messages: Sequence[ChatMessage],
    texts: Sequence[str],
    passages: Sequence[str],
    *,
    engine: Engine,
    model: LoadedModel,
) -> Laid | None:
    question = question_of(messages)
    rendered = [await engine.chat(model.digest, probed(messages, probe)) for probe in PROBES]
    frame = frame_of(*rendered)
    if frame is None:
        return None
    opening = await engine.tokenize(model.digest, SOURCES) if texts else []
    pieces = [await engine.tokenize(model.digest, text) for text in texts]
    room = room_for(model.n_ctx, request.max_tokens)
    repeated = range(min(REPEATED, len(passages)))
    while True:
        text = asked_text(question, [passages[rank] for rank in repeated])
        asked = await engine.tokenize(model.digest, text)
        laid = lay_out(frame, opening, pieces, asked, room, exact=ask.exact)
        if set(repeated) <= set(laid.chunks):
            return laid
        # Nothing stands in a prompt that is not cited: without a chunk, not its passage either.
        repeated = range(0)


def _citations(hits: Sequence[HitView], ranks: Sequence[int]) -> tuple[Citation, ...]:
    return tuple(
        Citation(
            number=rank + 1,
            source=hits[rank].source,
            first_line=hits[rank].first_line,
            last_line=hits[rank].last_line,
            score=hits[rank].score,
        )
        for rank in ranks
    )
