"""The windows of a chunk: each sentence by itself, and the code around them.  Pure.

A sentence is found by its meaning only where its vector is that of the sentence alone: what
stands beside it (code, the next remark) hides it.  So every sentence of prose is a window, be it a
comment, a line of documentation or part of a paragraph; what is not prose is put together up to
about thirty words.  Whether a line is prose is told by its look: most of its words are plain ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest

WINDOW_WORDS: Final = 30
"""The most words of a window, unless the caller says otherwise."""
PROSE_WORDS: Final = 4
"""Fewer words than these are no sentence: they go with the next one, or with code."""
_PLAIN_OF_TEN: Final = 7

_LINE: Final = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
_WORD: Final = re.compile(r"\w+")
_MARK: Final = re.compile(r"\s*(?:#+:?|//+|/\*+|\*+/?|--|;;|<!--)?\s*")
_OPENING: Final = "\"'(\\[`*_\N{LEFT DOUBLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}"
_CLOSING: Final = "\"')\\]`*_\N{RIGHT DOUBLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
_APOSTROPHE: Final = "'\N{RIGHT SINGLE QUOTATION MARK}"
_PLAIN: Final = re.compile(
    rf"[{_OPENING}]{{0,3}}[^\W\d_]+(?:[{_APOSTROPHE}-][^\W\d_]+){{0,8}}"
    rf"[{_CLOSING}]{{0,3}}[.,;:!?]{{0,3}}"
)
_END: Final = re.compile(rf"(?<=[.!?])[{_CLOSING}]{{0,3}}\s+(?=[^\W\d_]|[{_OPENING}]|$)")
_CLOSES: Final = (".", "!", "?", ":")
_LINE_ENDS: Final = ("\n", "\r")
_Span = tuple[int, int]


class Window(msgspec.Struct, frozen=True, gc=False):
    """A sentence of a chunk, or about thirty words of its code.

    ``start`` and ``end`` say which characters of the chunk's text it stands among; ``text`` is what
    its vector is made of: without the marks of comments, and without sentences amid code (those
    have windows of their own).
    """

    start: int
    end: int
    text: str


def windows(text: str, *, words: int = WINDOW_WORDS) -> tuple[Window, ...]:
    """Return the windows of a chunk's text, in the order of their beginnings.

    Every word is in exactly one window's text, and none has more than ``words`` words; a sentence
    or line of more is cut between words, into parts of nearly the same length.  There is no window
    for a text without words.  Raises :class:`InvalidRequest` (``bad_window_words``).
    """
    if words < 1:
        raise InvalidRequest("A window has at least one word.", code="bad_window_words")
    sentences: list[list[_Span]] = []
    code: list[_Span] = []
    for spans, prose in _parts(text):
        if prose:
            sentences += _sentences(text, spans)
        else:
            code += spans
    found = [*_grouped(text, code, words)]
    for sentence in sentences:
        found += _cut(text, sentence, words)
    return tuple(
        Window(spans[0][0], spans[-1][1], _joined(text, spans))
        for spans in sorted(found, key=lambda spans: spans[0])
    )


def _parts(text: str) -> Iterator[tuple[list[_Span], bool]]:
    """Yield runs of lines that make sentences, and single lines that do not."""
    held: list[_Span] = []
    for line in _LINE.finditer(text):
        mark = _MARK.match(line[0])
        start = line.start() + (mark.end() if mark else 0)
        body = text[start : line.end()].rstrip()
        begins_small = body[:1].islower()
        last = text[held[-1][0] : held[-1][1]] if held else ""
        goes_on = bool(held) and begins_small and not last.endswith(_CLOSES)
        if _is_prose(body) or (goes_on and _is_prose(body, least=1)):
            if held and not goes_on:
                yield held, True
                held = []
            held.append((start, start + len(body)))
            continue
        if held:
            yield held, True
            held = []
        if _WORD.search(line[0]):
            yield [(line.start(), line.end())], False
    if held:
        yield held, True


def _is_prose(body: str, least: int = PROSE_WORDS) -> bool:
    parts = body.split()
    plain = sum(_PLAIN.fullmatch(part) is not None for part in parts)
    return len(parts) >= least and plain * 10 >= _PLAIN_OF_TEN * len(parts)


def _sentences(text: str, spans: list[_Span]) -> Iterator[list[_Span]]:
    """Yield the sentences of a run of lines; one of few words goes with the next."""
    held: list[_Span] = []
    size = 0
    for place, (start, end) in enumerate(spans):
        ends = [found.end() for found in _END.finditer(text, start, end)]
        for at, to in zip([start, *ends], [*ends, end], strict=True):
            if at == to:
                continue
            held.append((at, to))
            size += len(_WORD.findall(text, at, to))
            whole = to in ends or place == len(spans) - 1
            if whole and size >= PROSE_WORDS:
                yield held
                held, size = [], 0
    if held and size:
        yield held


def _grouped(text: str, lines: list[_Span], words: int) -> Iterator[list[_Span]]:
    """Yield lines of code put together up to ``words`` words; longer ones are cut."""
    held: list[_Span] = []
    size = 0
    for line in lines:
        own = len(_WORD.findall(text, *line))
        if held and size + own > words:
            yield held
            held, size = [], 0
        if own > words:
            yield from _cut(text, [line], words)
        else:
            held.append(line)
            size += own
    if held:
        yield held


def _cut(text: str, spans: list[_Span], words: int) -> Iterator[list[_Span]]:
    """Yield parts of at most ``words`` words and nearly the same length."""
    starts = [found.start() for span in spans for found in _WORD.finditer(text, *span)]
    parts = max(1, -(-len(starts) // words))
    cuts = [starts[i * len(starts) // parts] for i in range(1, parts)]
    for low, high in zip([spans[0][0], *cuts], [*cuts, spans[-1][1]], strict=True):
        yield [(max(a, low), min(b, high)) for a, b in spans if a < high and b > low]


def _joined(text: str, spans: list[_Span]) -> str:
    """Return the pieces as one text: lines of code stay lines, parts of a sentence do not."""
    pieces = (text[start:end] for start, end in spans)
    ended = ((piece.rstrip(), "\n" if piece.endswith(_LINE_ENDS) else " ") for piece in pieces)
    return "".join(line + end for line, end in ended).strip()
