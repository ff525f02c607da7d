"""Learns the axes of an encoder's sketches and buckets, which then travel with the package.

The vectors are those of windows of texts under a folder, picked at random.  They should be as
mixed as what people keep, and nothing that is measured later may be among them.  Those in the
package come from the packages that this project needs to run and to be tested (their sources and
notes, where they are installed); the standard library, which ``context_index`` searches, is not
among them.

    python -m pyagent_node.benchmarks.context_axes .venv/lib/python3.11/site-packages \
        --encoder FOLDER --out sharding/context/minilm.axes
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Final

from pyagent_node.base.files import write_atomic
from pyagent_node.benchmarks.context_index import embed
from pyagent_node.sharding.context.chunking import chunks
from pyagent_node.sharding.context.defaults import BUCKET_BITS, encode_axes, learn_axes
from pyagent_node.sharding.context.minilm import MiniLm
from pyagent_node.sharding.context.windows import windows

SUFFIXES: Final = frozenset((".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".js"))
FILES: Final = 1000
MAX_BYTES: Final = 1 << 18
SEED: Final = 11


def some_windows(folder: Path, wanted: int, embedder: MiniLm) -> list[str]:
    """Return the texts of ``wanted`` windows, at most a few of any one file."""
    generator = random.Random(SEED)  # noqa: S311 - reproducible on purpose
    every = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    picked = generator.sample(every, min(FILES, len(every)))
    found: dict[str, None] = {}
    for path in picked:
        if path.stat().st_size > MAX_BYTES:
            continue
        text = path.read_text("utf-8", "replace").replace("\0", "")
        own = (
            [w.text for c in chunks(text, path.name, _count) for w in windows(c.text)]
            if text
            else []
        )
        found.update(dict.fromkeys(generator.sample(own, min(len(own), 1 + 8 * wanted // FILES))))
    texts = [text for text in found if len(text) < 2000]
    return generator.sample(texts, min(wanted, len(texts)))


def _count(text: str) -> int:
    """Return about how many tokens a text has: where chunks end hardly matters here."""
    return 1 + len(text) // 4


def main() -> None:
    """Learn and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=4000)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    embedder = MiniLm(args.encoder / "model.onnx", args.encoder / "tokenizer.json")
    texts = some_windows(args.folder, args.windows, embedder)
    axes = learn_axes(embed(embedder, texts, args.cache), BUCKET_BITS)
    write_atomic(args.out, encode_axes(axes, embedder.identity))
    print(f"{len(texts)} windows, {args.out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
