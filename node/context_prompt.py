"""How a prompt with chunks of a context is laid out.  Pure.

::

    the model's template, earlier messages, the beginning of the last message of the user
    "Sources:", then one piece for each chunk: a line that says where it is from, its text
    the few windows that are most like the question, once more
    "Question:", the user's own words
    the end of the template

A piece is tokenised by itself, so its tokens depend on nothing but the chunk, and its KV can be
computed once for all prompts (``inference.kv.chunks``).  The best chunk stands last, next to the
question.  What is repeated before the question is computed with it, in sight of all else: small
models find it there, and it makes up for what joined chunks have not seen.  Texts of chunks and of
users are never read as control tokens: what looks like a role marker in a file is text like any
other.

Where the template puts a message is found out by trying: two messages that have nothing in common
are rendered, and what both renderings begin and end with is the template's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.kv.pieces import MAX_PIECE, MAX_PIECES, SKIP_TOKENS, JoinPlan, Piece

PROBES: Final = ("Alpha 1.", "omega? Z")
"""Two messages that begin and end with different tokens, whatever the vocabulary."""
INSTRUCTIONS: Final = (
    "Answer the question from the sources that the user gives. Be brief."
    " If the sources do not answer it, say so."
)
"""The system message of requests without one."""
SOURCES: Final = "Sources:\n\n"
QUESTION: Final = "Question: "
PASSAGES: Final = "Passages from the sources that may answer the question:\n"
REPEATED: Final = 3
"""Windows, of as many chunks, that stand before the question once more,"""
MAX_PASSAGE: Final = 240
"""and the most characters of one."""
ANSWER_ROOM: Final = 256
"""Tokens that are left for an answer of unknown length, where the context has room for them."""
MAX_SOURCE_NAME: Final = 200
"""Characters of a source's name in a prompt."""


class Frame(NamedTuple):
    """The tokens of a conversation before and after the last message's text."""

    before: tuple[int, ...]
    after: tuple[int, ...]


class Laid(NamedTuple):
    """A prompt: its tokens, the pieces among them, and which chunks are in it (their ranks)."""

    tokens: tuple[int, ...]
    join: JoinPlan | None
    chunks: tuple[int, ...]


def question_of(messages: Sequence[ChatMessage]) -> str:
    """Return what to look for: the last message, which is the user's.

    Raises :class:`InvalidRequest` (``bad_parameter``) where it is not, or says nothing.
    """
    last = messages[-1]
    if last.role != "user" or not last.content.strip():
        raise InvalidRequest(
            "With a context, the last message must be a question of the user.",
            code="bad_parameter",
            parameter="messages",
        )
    return last.content


def with_instructions(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """Return the messages, behind :data:`INSTRUCTIONS` unless they have some of their own."""
    if any(message.role == "system" for message in messages):
        return tuple(messages)
    return ChatMessage("system", INSTRUCTIONS), *messages


def probed(messages: Sequence[ChatMessage], probe: str) -> tuple[ChatMessage, ...]:
    """Return the messages with another text for the last one."""
    return *messages[:-1], ChatMessage(messages[-1].role, probe)


def frame_of(first: Sequence[int], second: Sequence[int]) -> Frame | None:
    """Return what two renderings of :data:`PROBES` have in common around the last message.

    ``None`` where they have nothing to tell them apart, or nothing in common.
    """
    shorter = min(len(first), len(second))
    start = 0
    while start < shorter and first[start] == second[start]:
        start += 1
    end = 0
    while end < shorter - start and first[-1 - end] == second[-1 - end]:
        end += 1
    if start == shorter or not start or not end:
        return None
    return Frame(tuple(first[:start]), tuple(first[len(first) - end :]))


def piece_text(source: str, first_line: int, last_line: int, text: str) -> str:
    """Return a chunk as it stands in prompts: the same wherever and whenever."""
    name = "".join(char if char.isprintable() else " " for char in source)[:MAX_SOURCE_NAME]
    return f"[{name}, lines {first_line}-{last_line}]\n{text.strip()}\n\n"


def asked_text(question: str, passages: Sequence[str]) -> str:
    """Return what stands behind the chunks: ``passages`` (the best first), and the question."""
    lines = [f"- {' '.join(passage.split())[:MAX_PASSAGE]}\n" for passage in passages if passage]
    if not lines:
        return QUESTION + question
    return "".join((PASSAGES, *reversed(lines), "\n", QUESTION, question))


def room_for(n_ctx: int, max_tokens: int | None) -> int:
    """Return how many tokens a prompt may have, so that an answer fits behind it."""
    wanted = ANSWER_ROOM if max_tokens is None else max_tokens
    return n_ctx - min(wanted, max(1, n_ctx // 2))


def lay_out(
    frame: Frame,
    opening: Sequence[int],
    pieces: Sequence[Sequence[int]],
    question: Sequence[int],
    room: int,
    *,
    exact: bool,
) -> Laid:
    """Return the prompt: ``pieces`` are the chunks' tokens, the best first.

    As many of them as fit into ``room`` tokens, from the best on.  ``exact``: nothing is joined.
    """
    fixed = len(frame.before) + len(opening) + len(question) + len(frame.after)
    chosen: list[int] = []
    for rank, piece in enumerate(pieces[:MAX_PIECES]):
        if fixed + len(piece) <= room:
            chosen.append(rank)
            fixed += len(piece)
    tokens = [*frame.before, *opening]
    joined: list[Piece] = []
    for rank in reversed(chosen):
        piece = pieces[rank]
        if SKIP_TOKENS < len(piece) <= MAX_PIECE:
            joined.append(Piece(len(tokens), len(tokens) + len(piece)))
        tokens += piece
    tokens += [*question, *frame.after]
    plan = JoinPlan(tuple(joined)) if joined and not exact else None
    return Laid(tuple(tokens), plan, tuple(chosen))


def plain_text(pieces: Sequence[str], asked: str) -> str:
    """Return sources and question as one message, for templates that cannot be framed."""
    return "".join((SOURCES, *reversed(pieces), asked))
