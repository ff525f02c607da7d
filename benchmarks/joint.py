"""What computing rows of several sequences in one call gains, and in which shapes it is exact.

    python benchmarks/joint.py MODEL.gguf --shapes 1x1,2x4,8x4 --cells 40 --json

A shape is SEQUENCESxROWS.  Each is compared with single rows, to the bit, and timed: processor time
of one thread, the median of ``--rounds``, all shapes in turn in each, so that other work on the
machine shows little.  ``gain`` is how many single rows fit into the time, over the rows of the
shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.backend import MAX_CALL_ROWS
from pyagent_node.inference.llama import library
from pyagent_node.inference.llama.context import LlamaContext
from pyagent_node.inference.stepping.batching import Shape
from pyagent_node.inference.stepping.rows import Rows

SHAPES = "1x1,1x2,1x3,1x4,2x1,2x2,4x1,1x8,2x4,4x2,8x1,3x4,4x4,8x2,16x1,6x4,4x8,8x4,16x2"


def measure(
    context: LlamaContext, shapes: list[Shape], cells: int, rounds: int
) -> list[dict[str, object]]:
    """Return the figures of each shape; every sequence holds ``cells`` cells before."""
    rng = np.random.default_rng(cells)
    n_seq = context.n_seq
    tokens = rng.integers(0, context.model.n_vocab, (n_seq, cells + MAX_CALL_ROWS))
    tokens = tokens.astype(np.int32)

    def feed(seqs: range, start: int, n: int) -> None:
        rows = Rows(
            np.repeat(np.array(seqs, np.int32), n),
            np.tile(np.arange(start, start + n, dtype=np.int32), len(seqs)),
            np.concatenate([tokens[seq, start : start + n] for seq in seqs]),
            None,
            np.ones(n * len(seqs), np.int8),
        )
        context.decode(rows, None, lone_threads=1)

    def logits(n: int) -> NDArray[np.float32]:
        return np.stack([context.logits(row) for row in range(n)])

    def drop(seqs: range, start: int) -> None:
        for seq in seqs:
            context.drop(seq, start)

    for seq in range(n_seq):
        for at in range(cells):
            feed(range(seq, seq + 1), at, 1)
    most = max(shape.rows for shape in shapes)
    single: list[NDArray[np.float32]] = []
    for seq in range(n_seq):
        rows = []
        for at in range(most):
            feed(range(seq, seq + 1), cells + at, 1)
            rows.append(logits(1))
        single.append(np.concatenate(rows))
        drop(range(seq, seq + 1), cells)
    times: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    exact = dict.fromkeys(shapes, True)
    for turn in range(rounds):
        for shape in shapes if turn % 2 == 0 else reversed(shapes):
            seqs = range(shape.sequences)
            began = time.thread_time()
            feed(seqs, cells, shape.rows)
            times[shape].append(time.thread_time() - began)
            if turn == 0:
                expected = np.concatenate([single[seq][: shape.rows] for seq in seqs])
                exact[shape] = np.array_equal(logits(shape.total), expected)
            drop(seqs, cells)
    one = statistics.median(times[Shape(1, 1)])
    found: list[dict[str, object]] = []
    for shape in shapes:
        taken = statistics.median(times[shape])
        found.append(
            {
                "shape": f"{shape.sequences}x{shape.rows}",
                "rows": shape.total,
                "exact": exact[shape],
                "ms": round(taken * 1e3, 2),
                "row_ms": round(taken * 1e3 / shape.total, 2),
                "gain": round(one * shape.total / taken, 2),
            }
        )
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--cells", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    asked = [Shape(*map(int, text.split("x"))) for text in args.shapes.split(",")]
    shapes = list(dict.fromkeys([Shape(1, 1), *asked]))
    with closing(library.load_model(args.model)) as model:
        context = LlamaContext(
            model,
            n_ctx=args.cells + MAX_CALL_ROWS,
            n_seq=max(shape.sequences for shape in shapes),
            threads=1,
            tapped=False,
            max_outputs=MAX_CALL_ROWS,
        )
        with closing(context):
            found = measure(context, shapes, args.cells, args.rounds)
    for each in [found] if args.json else found:
        print(json.dumps(each))


if __name__ == "__main__":
    main()
