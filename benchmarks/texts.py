"""The texts that speculation is measured on: own ones, short, to be gone on with as they stand.

``code`` begins a module, ``prose`` a story, and ``copy`` ends in the first words of a text that it
has quoted before, so that a model quotes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

Kind = Literal["code", "prose", "copy"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_SHAPES: Final = '''\
"""Shapes with an area and a circumference."""

import math
from dataclasses import dataclass


@dataclass
class Circle:
    """A circle with a radius."""

    radius: float

    def area(self) -> float:
        """Return the area of the circle."""
        return math.pi * self.radius ** 2

    def circumference(self) -> float:
        """Return the circumference of the circle."""
        return 2 * math.pi * self.radius


@dataclass
class Square:
    """A square with a side."""

    side: float

    def area(self) -> float:
        """Return the'''

_STOCK: Final = """\
import unittest

from stock import Stock


class StockTest(unittest.TestCase):
    def setUp(self):
        self.stock = Stock()

    def test_add(self):
        self.stock.add("apples", 3)
        self.assertEqual(self.stock.count("apples"), 3)

    def test_add_twice(self):
        self.stock.add("apples", 3)
        self.stock.add("apples", 4)
        self.assertEqual(self.stock.count("apples"), 7)

    def test_remove(self):
"""

_QUEUE: Final = '''\
class Queue:
    """A first-in, first-out queue on a linked list."""

    def __init__(self):
        self.head = None
        self.tail = None
        self.size = 0

    def push(self, value):
        """Add a value at the end of the queue."""
        node = Node(value)
        if self.tail is None:
            self.head = node
        else:
            self.tail.next = node
        self.tail = node
        self.size += 1

    def pop(self):
        """Remove the value at the front of the queue and return it."""
        if self'''

_KEEPER: Final = """\
The lighthouse keeper had not spoken to anyone for nineteen days. Every evening he climbed \
the stairs with a can of oil, lit the lamp and wrote the weather into a thick book that \
nobody would ever read. On the twentieth day, shortly after noon, a small boat with a torn \
red sail came out of the fog, and in it stood
"""

_MARKET: Final = """\
When the railway came to our valley, my grandmother sold her last two goats and opened a \
shop for hats. People laughed at first, because nobody between the two rivers had ever worn \
a hat on any day but Sunday. But she had seen something at the station that the others had \
overlooked:
"""

_WINTER: Final = """\
That winter the lake froze so early that the ferry was caught in the ice half-way between \
the villages. At night one could see its two lanterns from both shores, and each village was \
sure that the other would send somebody out. After a week
"""

_RULES: Final = """\
The members of the garden club meet on the first Tuesday of each month in the hall behind \
the school. Whoever borrows a tool writes its name, the date and their own name on the board \
beside the door, and brings the tool back, cleaned and dry, within nine days. Seeds are \
handed out in March and in August; nobody may take more than six packets. Water from the \
barrels is for young trees only, and the last to leave locks both gates and hangs the key on \
the nail."""

_RECIPE: Final = """\
Soak two hundred grams of white beans overnight in cold water. Chop one onion, two carrots \
and a stick of celery, and fry them slowly in olive oil until they are soft but not brown. \
Add the beans, a litre and a half of fresh water, three leaves of sage and a piece of cheese \
rind. Let the soup simmer with the lid half on for eighty minutes, then crush a third of the \
beans against the side of the pot, salt it, and serve it with toasted bread and black \
pepper."""

_LETTER: Final = """\
Dear Mrs Okafor, thank you for your letter of 14 May about the oak in front of number \
seventeen. Our arborist, Mr Lindqvist, looked at the tree on Thursday and found that two of \
its lower branches are hollow, while the trunk and the crown are sound. We will have the \
branches cut before the end of June, and a cable fitted between the two main limbs. The \
footpath will be closed on that morning from seven until eleven o'clock."""


def _again(text: str) -> str:
    opening = " ".join(text.split()[:5])
    return f"Here is a text:\n\n{text}\n\nHere is the same text again, word for word:\n\n{opening}"


TEXTS: Final[Mapping[Kind, tuple[str, ...]]] = MappingProxyType(
    {
        "code": (_SHAPES, _STOCK, _QUEUE),
        "prose": (_KEEPER.strip(), _MARKET.strip(), _WINTER.strip()),
        "copy": (_again(_RULES), _again(_RECIPE), _again(_LETTER)),
    }
)
"""Beginnings, three of each kind."""
