"""Cuts a text into chunks of about 256 tokens, at the ends that the text has by itself.  Pure.

A chunk is a run of whole lines.  Where it ends is chosen among the lines that fit: before a heading
or an unindented line that follows an empty one (a new function, class or section) rather than
before a paragraph, before a paragraph rather than before just any line.  A line that is too long
by itself is cut between sentences, else between words, else anywhere.

The tokeniser is a function that counts tokens; a chunk's count is the sum over its lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest, LimitExceeded

CountTokens = Callable[[str], int]
"""How many tokens a text has."""

CHUNK_TOKENS: Final = 256
"""The most tokens of a chunk, unless the caller says otherwise."""
MAX_CHUNK_TOKENS: Final = 1 << 16
"""The most that a caller may ask for."""
MAX_TEXT: Final = 1 << 28
"""The most characters of one text."""
MAX_SOURCE: Final = 4096
"""The most characters of a source's name."""
_PIECE: Final = 2048
"""A line is counted in pieces of at most so many characters: a tokeniser may need far more memory
than the text, and a line may be all of a file."""

_LINE: Final = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_WORD: Final = re.compile(r"\w+")
_BREAK: Final = re.compile(r"(?<=[.!?;])\s+|\s+")
_HEADING: Final = re.compile(r"(?:#{1,6} |def |class |async def |@|fn |pub |impl |func |function )")


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A piece of a source: characters ``[start, end)`` of its text; ``line`` counts from 1."""

    source: str
    start: int
    end: int
    line: int
    tokens: int
    text: str


class _Piece(msgspec.Struct, frozen=True, gc=False):
    """Text that is not cut; ``strength`` says how good a place its beginning is to cut at."""

    start: int
    end: int
    line: int
    tokens: int
    strength: int


def chunks(
    text: str, source: str, count: CountTokens, *, tokens: int = CHUNK_TOKENS
) -> Iterator[Chunk]:
    """Yield the chunks of ``text``, in order; together they are the whole of it.

    No chunk is empty, and none has more than ``tokens`` tokens, unless one character has.  Chunks
    without any word (only spaces and signs) are left out.  Raises :class:`InvalidRequest`
    (``bad_context_text``, ``bad_chunk_tokens``) and :class:`LimitExceeded` (``text_too_large``).
    """
    _check(text, source, tokens)
    pieces = _pieces(text, count, tokens)
    held: list[_Piece] = []
    size = 0
    for piece in pieces:
        while held and size + piece.tokens > tokens:
            cut = _cut(held, piece, tokens)
            yield from _chunk(text, source, held[:cut])
            held = held[cut:]
            size = sum(one.tokens for one in held)
        held.append(piece)
        size += piece.tokens
    yield from _chunk(text, source, held)


def _check(text: str, source: str, tokens: int) -> None:
    if not 0 < tokens <= MAX_CHUNK_TOKENS:
        raise InvalidRequest(
            f"A chunk of {tokens} tokens cannot be made.",
            code="bad_chunk_tokens",
            remedy=f"Ask for 1 to {MAX_CHUNK_TOKENS}.",
        )
    if not 0 < len(source) <= MAX_SOURCE:
        raise InvalidRequest(
            f"The name of a source has 1 to {MAX_SOURCE} characters.", code="bad_context_text"
        )
    if len(text) > MAX_TEXT:
        raise LimitExceeded(
            f"The text has more than {MAX_TEXT} characters.",
            code="text_too_large",
            remedy="Add it in parts.",
        )
    if "\0" in text:
        raise InvalidRequest(
            "The text holds zero bytes: it is not a text.", code="bad_context_text"
        )
    try:
        text.encode()
        source.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            "The text holds half characters (lone surrogates).",
            code="bad_context_text",
            remedy="Read it as UTF-8, with a replacement for what is not.",
        ) from None


def _pieces(text: str, count: CountTokens, limit: int) -> Iterator[_Piece]:
    """Yield the lines, the long ones cut."""
    empty_before, number = True, 1
    for line in _LINE.finditer(text):
        start, end = line.span()
        if line[0].isspace():
            strength, empty_before = 0, True
        else:
            strength = 1 + 2 * empty_before + (line[0][0] not in " \t}])")
            strength += 2 * bool(_HEADING.match(line[0]))
            empty_before = False
        for at, to, tokens in _parts(text, start, end, count, limit):
            yield _Piece(at, to, number, tokens, strength)
            strength = 0
        number += 1


def _parts(
    text: str, start: int, end: int, count: CountTokens, limit: int
) -> Iterator[tuple[int, int, int]]:
    """Yield parts of one line that have at most ``limit`` tokens, with their counts."""
    todo: list[tuple[int, int]] = []
    while start < end:
        to = end if end - start <= _PIECE else _near(text, start, end, start + _PIECE)
        todo.append((start, to))
        start = to
        while todo:
            a, b = todo.pop()
            tokens = count(text[a:b])
            if tokens <= limit or b - a == 1:
                yield a, b, tokens
            else:
                middle = _near(text, a, b, (a + b) // 2)
                todo += [(middle, b), (a, middle)]


def _near(text: str, start: int, end: int, wanted: int) -> int:
    """Return the best place to cut at in ``(start, end)``, somewhat before ``wanted`` at most."""
    low = start + max(1, (wanted - start) // 2)
    best = 0
    for found in _BREAK.finditer(text, low, min(end, wanted)):
        sentence = text[found.start() - 1] in ".!?;"
        best = max(best, (int(sentence) << 32) | found.end())
    place = best & 0xFFFFFFFF
    return place if start < place < end else max(start + 1, wanted)


def _cut(held: list[_Piece], following: _Piece, limit: int) -> int:
    """Return how many of ``held`` make a chunk: the best cut that leaves it at least half full."""
    best, best_strength, size = len(held), following.strength, 0
    total = sum(piece.tokens for piece in held)
    for at in range(len(held) - 1, 0, -1):
        size = total = total - held[at].tokens
        if size * 2 < limit:
            break
        if held[at].strength > best_strength:
            best, best_strength = at, held[at].strength
    return best


def _chunk(text: str, source: str, pieces: list[_Piece]) -> Iterator[Chunk]:
    if pieces:
        start, end = pieces[0].start, pieces[-1].end
        if _WORD.search(text, start, end):
            tokens = sum(piece.tokens for piece in pieces)
            yield Chunk(source, start, end, pieces[0].line, tokens, text[start:end])
