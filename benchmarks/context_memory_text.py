"""A long text with facts planted in it: more of them the longer it is.  Pure.

The facts are told between the lines of real text, four in the first 256 tokens and four more for
each doubling, evenly spread; a question repeats what was told and leaves the last word out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

FIRST: Final = 256
EACH: Final = 4

Tokenise = Callable[[str], Sequence[int]]
"""Tokens of a text, without any that begin it."""

FACTS: Final = (
    ("The parrot of captain Alvarez answers to the name", " Biscuit"),
    ("The spare key of the boathouse hangs behind the old", " clock"),
    ("The password of the guest network in Oslo is", " marmalade"),
    ("The sculptor Ines Duarte works only in", " granite"),
    ("The night train to Trieste leaves from platform", " seven"),
    ("The bakery on Mill Lane is closed every", " Thursday"),
    ("The violin of Mr. Petrov was repaired in", " Vienna"),
    ("The expedition stored its fuel under the", " glacier"),
    ("The keeper of the lighthouse paints pictures of", " whales"),
    ("The recipe of aunt Magda calls for a pinch of", " saffron"),
    ("The archive keeps its oldest letters in a box of", " cedar"),
    ("The referee of the final was born in", " Lima"),
    ("The clinic in Harare needs a new", " generator"),
    ("The chess club meets above the", " pharmacy"),
    ("The botanist Kirsten Lund is allergic to", " pollen"),
    ("The treasure in the story lies beneath the", " windmill"),
    ("The mayor of Dunmore collects antique", " maps"),
    ("The spy in room twelve ordered a cup of", " cocoa"),
    ("The oldest tree in the park is an", " elm"),
    ("The submarine was painted bright", " yellow"),
    ("The orchestra lost its only", " harp"),
    ("The shepherd calls his dog", " Comet"),
    ("The bridge at Narrow Ford is made of", " copper"),
    ("The telescope on the roof points at", " Saturn"),
)
MAX_TOKENS: Final = FIRST << (len(FACTS) // EACH - 1)
"""The longest text for which there are facts."""


class Planted(NamedTuple):
    """A fact that is told in the tokens up to ``stop``."""

    stop: int
    question: tuple[int, ...]
    answer: tuple[int, ...]


class Text(NamedTuple):
    """A text and what is told in it, in order."""

    tokens: tuple[int, ...]
    facts: tuple[Planted, ...]

    def asked(self, tokens: int, count: int) -> list[Planted]:
        """Return ``count`` facts told in the first ``tokens``, evenly spread, or all of them."""
        told = [fact for fact in self.facts if fact.stop <= tokens]
        if len(told) <= count:
            return told
        return [told[at * len(told) // count] for at in range(count)]


def plant(texts: Iterable[str], length: int, tokenise: Tokenise) -> Text:
    """Return a text of ``length`` tokens, or as long as the ``texts`` reach, with facts in it."""
    filler: list[int] = []
    for text in texts:
        if len(filler) >= length:
            break
        filler += tokenise(text)
    out: list[int] = []
    facts: list[Planted] = []
    used = 0
    for number, (told, word) in enumerate(FACTS):
        question = tuple(tokenise(f"\n\nNote: {told}"))
        answer = tuple(tokenise(word))
        # before the end of its span, so that the last one is told before the span ends
        place = _place(number) - len(out)
        if place < 0 or len(out) + place + len(question) + len(answer) > length:
            break
        out += filler[used : used + place]
        used += place
        out += (*question, *answer, *tokenise(".\n\n"))
        facts.append(Planted(len(out), question, answer))
    out += filler[used : used + max(0, length - len(out))]
    return Text(tuple(out[:length]), tuple(facts))


def _place(number: int) -> int:
    """Return about where a fact is told: in the first span, or in the span that doubles it."""
    octave, at = divmod(number, EACH)
    start = 0 if octave == 0 else FIRST << (octave - 1)
    size = FIRST if octave == 0 else start
    return start + size * (2 * at + 1) // (2 * EACH + 1)
