"""Texts on which nothing was tuned: as those of ``texts``, but of other sorts.

What decides about guesses was made with the texts of ``texts`` in sight; these were measured
afterwards.  Code in other languages, prose that is no story, and copies of a list, of a program, of
a table and of a text with one word changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pyagent_node.benchmarks.texts import Kind

_CART: Final = """\
// A shopping cart that knows discounts.
class Cart {
  constructor() {
    this.lines = new Map();
    this.discount = 0;
  }

  add(name, price, count = 1) {
    const line = this.lines.get(name);
    if (line) {
      line.count += count;
    } else {
      this.lines.set(name, { price, count });
    }
  }

  remove(name) {
    this.lines.delete(name);
  }

  total() {
"""

_LIBRARY: Final = """\
CREATE TABLE author (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    born INTEGER
);

CREATE TABLE book (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    author_id INTEGER NOT NULL REFERENCES author (id),
    published INTEGER
);

CREATE TABLE loan (
"""

_WORDS: Final = '''\
import argparse
import sys
from collections import Counter


def count_words(lines):
    """Count how often each word occurs in some lines of text."""
    counter = Counter()
    for line in lines:
        for word in line.split():
            counter[word.strip(".,;:!?").lower()] += 1
    return counter


def main():
    parser = argparse.ArgumentParser(description="Count words.")
    parser.add_argument("files", nargs="*")
'''

_CLIENT: Final = """\
package client

import (
\t"encoding/json"
\t"fmt"
\t"net/http"
)

// Client asks a weather service.
type Client struct {
\tbase string
\thttp *http.Client
}

// Current returns the weather of a city.
func (c *Client) Current(city string) (*Weather, error) {
\tresponse, err := c.http.Get(c.base + "/current?city=" + city)
\tif err != nil {
"""

_BREAD: Final = """\
Bread rises because yeast eats the sugars of the flour and gives off gas, which the dough holds \
like a net of many small balloons. How well the net holds depends on two proteins of the grain, \
which join when flour is wetted and kneaded. That is why a baker"""

_MINUTES: Final = """\
Minutes of the meeting of the harbour board, 3 October. Present: Ms Aalto, Mr Ferreira, Mr Nkemelu \
and Dr Voss. Mr Ferreira reported that the dredging of the north basin is two weeks behind since \
the second pump was delivered without its couplings. Dr Voss asked whether"""

_DIALOGUE: Final = """\
"You never told me that the bridge was closed," said Ines.

"You never asked," said the driver, and turned the engine off. "Besides, it is only closed to \
people who are in a hurry."

"And who decides that?"

"""

_TIDES: Final = """\
The tides of the bay are among the highest on earth. Twice a day some hundred billion tonnes of \
water move in and out, more than all rivers of the continent carry in the same time. Engineers \
have wanted to harness them since 1910; three plans failed, the first because"""

_PACKING: Final = """\
- two pairs of wool socks, one spare pair of laces
- rain jacket, hat with a brim, thin gloves
- stove, 230 g gas, lighter in a plastic bag
- oats for six breakfasts, eleven bars, 400 g of hard cheese
- map sheet 41 north, compass, pencil, whistle
- tape, needle, four metres of cord, two safety pins"""

_PROGRAM: Final = """\
def moving_average(values, window):
    if window < 1:
        raise ValueError("window must be positive")
    total = 0.0
    result = []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        result.append(total / min(index + 1, window))
    return result"""

_TIMETABLE: Final = """\
| line | leaves | arrives | days | platform |
| 11 | 06:42 | 08:17 | Mon-Fri | 3 |
| 14 | 07:05 | 09:31 | Mon-Sat | 1 |
| 11 | 08:12 | 09:47 | daily | 3 |
| 27 | 09:50 | 13:26 | Sat, Sun | 5b |
| 14 | 10:35 | 13:01 | daily | 2 |"""

_FERRY: Final = """\
The ferry to the island leaves at six in the morning and at four in the afternoon, and on market \
days once more at noon. Bicycles travel free, dogs pay half. When the wind is stronger than force \
seven the harbour master hoists a black ball, the ferry stays where it is, and tickets keep their \
value for the next day on which it sails."""


def _again(text: str) -> str:
    opening = " ".join(text.split(" ")[:4])
    return f"First:\n\n{text}\n\nThe same once more, unchanged:\n\n{opening}"


def _edited(text: str, old: str, new: str) -> str:
    opening = " ".join(text.split()[:5])
    return (
        f"Original:\n\n{text}\n\nThe original, with {old!r} replaced by {new!r}:\n\n"
        f"{opening.replace(old, new)}"
    )


HELD_OUT: Final[Mapping[Kind, tuple[str, ...]]] = MappingProxyType(
    {
        "code": (_CART, _LIBRARY, _WORDS, _CLIENT),
        "prose": (_BREAD, _MINUTES, _DIALOGUE, _TIDES),
        "copy": (
            _again(_PACKING),
            _again(_PROGRAM),
            _again(_TIMETABLE),
            _edited(_FERRY, "ferry", "steamer"),
        ),
    }
)
"""Beginnings, four of each kind."""
