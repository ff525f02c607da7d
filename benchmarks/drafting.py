"""What guessing costs: the suffix drafter and the controller, function by function.

Reads a text (words and signs for tokens), and guesses at every tenth place what comes next.  The
baseline is what most others do, measured in the same run: look for the last few tokens in the text
so far and copy what followed them last.

    python benchmarks/drafting.py [TEXT ...] --length 8 --json

Microseconds are means; ``right`` is how many guesses of a draft were right on average, one by one
until the first wrong one; ``confidence`` what the drafter promised.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from pyagent_node.inference.drafting.controller import Controller
from pyagent_node.inference.drafting.port import Draft, Pass
from pyagent_node.inference.drafting.suffix import SuffixDrafter, expected

EVERY = 10
NGRAMS = (8, 4, 2)
Row = dict[str, str | float]


def tokens_of(paths: Sequence[Path]) -> list[int]:
    """Return numbers for the words and signs of some files, by first appearance."""
    text = "\n".join(path.read_text("utf-8", "replace") for path in paths)
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in re.findall(r" ?\w+|\s+|.", text)]


class LastSeen:
    """The baseline: what followed the last few tokens when they came last, by search."""

    def __init__(self) -> None:
        self._text = array("I")

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens."""
        self._text.extend(tokens)

    def look(self, limit: int) -> Draft:
        """Return the guesses."""
        data, size = self._text.tobytes(), self._text.itemsize
        for n in NGRAMS:
            at = data.rfind(data[-n * size :], 0, len(data) - 1)
            while at > 0 and at % size:
                at = data.rfind(data[-n * size :], 0, at + n * size - 1)
            if at >= 0 and at % size == 0:
                found = self._text[at // size + n :][:limit]
                return Draft(tuple(found), (0.5,) * len(found), "last seen")
        return Draft()


def measure(
    name: str,
    text: Sequence[int],
    extend: Callable[[Sequence[int]], None],
    look: Callable[[], Draft],
) -> Row:
    """Run a drafter over the text."""
    extending = looking = 0.0
    drafts, right, promised = 0, 0, 0.0
    for at in range(0, len(text) - EVERY, EVERY):
        began = time.perf_counter()
        extend(text[at : at + EVERY])
        extending += time.perf_counter() - began
        began = time.perf_counter()
        draft = look()
        looking += time.perf_counter() - began
        drafts += 1
        promised += expected(draft)
        for token, true in zip(draft.tokens, text[at + EVERY :], strict=False):
            if token != true:
                break
            right += 1
    return {
        "drafter": name,
        "extend_us_per_token": round(extending / (drafts * EVERY) * 1e6, 3),
        "draft_us": round(looking / drafts * 1e6, 2),
        "right": round(right / drafts, 3),
        "confidence": round(promised / drafts, 3),
    }


def controller_us(text: Sequence[int], length: int, passes: int = 3000) -> float:
    """Return the microseconds that the controller takes for one pass."""
    controller = Controller()
    draft = Draft(tuple(text[:length]), (0.8,) * length, "suffix")
    began = time.perf_counter()
    for _ in range(passes):
        sent = controller.choose(draft) if controller.plan().length else 0
        took = 0.01 + 0.002 * sent
        controller.passed(Pass(sent + 1, took, sent, sent, sent + 1, took, 1e-5, 1, took))
        controller.accepted(text[: sent + 1])
    return (time.perf_counter() - began) / passes * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="*", type=Path, default=[Path(argparse.__file__)])
    parser.add_argument("--length", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    text = tokens_of(args.texts)
    suffix, plain = SuffixDrafter(), LastSeen()
    rows = [
        measure("suffix", text, suffix.extend, lambda: suffix.look((), args.length)),
        measure("last seen", text, plain.extend, lambda: plain.look(args.length)),
    ]
    rows[0]["bytes_per_token"] = round(suffix.nbytes / len(text), 1)
    report = {
        "tokens": len(text),
        "length": args.length,
        "drafters": rows,
        "controller_us_per_pass": round(controller_us(text, args.length), 1),
    }
    if args.json:
        json.dump(report, sys.stdout, indent=1)
        print()
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{len(text)} tokens; controller: {report['controller_us_per_pass']} us a pass")


if __name__ == "__main__":
    main()
