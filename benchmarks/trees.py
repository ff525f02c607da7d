"""Chain against tree at the same number of guesses: what a pass adds, and what a step takes.

Everything is in one process.  The model answers each text once, without guesses; since guesses
change no token, every way of guessing is then held against that answer.  ``gained`` is what a pass
adds to the answer, ``asked`` the passes of the drafting model that it takes, ``rows`` what the last
rank computes for it, ``calls`` what every other rank does (the rows are all of them there).

    python benchmarks/trees.py MODEL.gguf [--draft SMALLER.gguf] --budgets 4,8,12 --json
    python benchmarks/trees.py MODEL.gguf --steps --json

With ``--steps`` it measures what a step takes that is a chain, and trees of as many rows, all of
whose rows are computed; as medians, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final, cast

import numpy as np
import trio

from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.texts import TEXTS, Kind
from pyagent_node.inference.backend import (
    BackendInfo,
    FreeSequence,
    OpenSequence,
    SequenceOp,
    StepInput,
    StepOutput,
    TrimSequence,
)
from pyagent_node.inference.drafting.combined import CombinedDrafter
from pyagent_node.inference.drafting.model import ModelDrafters
from pyagent_node.inference.drafting.port import Draft, Drafter, PreparedDrafter, TreeDrafter
from pyagent_node.inference.drafting.suffix import SuffixDrafter
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.trees import follow, runs

N_CTX: Final = 1024
KINDS: Final[tuple[Kind, ...]] = ("code", "prose", "copy")
Row = dict[str, str | float]


class Model:
    """A whole model in this process, as a runner."""

    def __init__(self, path: Path, threads: int) -> None:
        layers = model_shape(read_header(path)).n_layers
        whole = Slice(0, layers, head=True)
        self.backend = LlamaBackend(path, whole, n_ctx=N_CTX, n_seq=1, threads=threads)
        self.passes = 0

    @property
    def info(self) -> BackendInfo:
        """What it says of itself."""
        return self.backend.info

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute at once."""
        await trio.lowlevel.checkpoint()
        self.passes += len(steps)
        return self.backend.decode(steps)

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out at once."""
        await trio.lowlevel.checkpoint()
        for op in ops:
            self.backend.apply(op)


async def answer(
    model: Model, prompt: Sequence[int], n: int, sampling: SamplingParams
) -> list[int]:
    """Return ``n`` tokens, one by one."""
    model.backend.apply(OpenSequence(0, sampling))
    pending, at, got = list(prompt), 0, list[int]()
    while len(got) < n:
        step = StepInput(0, at, np.array(pending, np.int32), None, True)
        (output,) = await model.decode([step])
        at += len(pending)
        pending = [output.sampled[0].token]
        got += pending
    model.backend.apply(FreeSequence(0))
    return got


class Tally:
    """What passes came to."""

    def __init__(self) -> None:
        self.passes = self.gained = self.rows = self.calls = self.elsewhere = 0

    def add(self, draft: Draft, came: Sequence[int]) -> int:
        """Hold a draft against what came; returns how many tokens the pass adds."""
        n = len(draft.tokens)
        parents = tuple(parent + 1 for parent in draft.parents) or tuple(range(n))
        tokens = (-1, *draft.tokens)
        path = follow(parents, tokens, n, came)
        straight = sum(place == guess for place, guess in enumerate(path))
        self.passes += 1
        self.gained += len(path) + 1
        self.elsewhere += len(path) - straight
        self.rows += 1 + len(draft.straight.tokens) + len(path) - straight
        self.calls += len(runs(parents, 1))
        return len(path) + 1


async def guess(
    drafter: Drafter,
    prompt: Sequence[int],
    came: Sequence[int],
    budget: int,
    tally: Tally,
    *,
    tree: bool,
) -> None:
    """Answer once more, with guesses."""
    if isinstance(drafter, TreeDrafter) and tree:
        drafter.expect_trees()
    drafter.extend(prompt)
    if isinstance(drafter, PreparedDrafter):
        await drafter.prepare()
    drafter.extend(came[:1])
    at = 1
    while at < len(came):
        if tree and isinstance(drafter, TreeDrafter):
            draft = await drafter.propose_tree((), budget)
        else:
            draft = await drafter.propose((), budget)
        gained = tally.add(draft, came[at : at + budget])
        drafter.extend(came[at : at + gained])
        at += gained
    await drafter.aclose()


async def compare(args: argparse.Namespace) -> list[Row]:
    """Return a row for each kind of text, drafter, budget and shape."""
    path = Path(args.model)
    tokenizer = LlamaTokenizer(path)
    pieces = tokenizer.pieces()
    answers: dict[tuple[Kind, int], tuple[list[int], list[int]]] = {}

    def sampling(index: int) -> SamplingParams:
        return SamplingParams(seed=index, temperature=args.temperature)

    target = Model(path, args.threads)
    with closing(target.backend):
        for kind in args.prompts:
            for index, text in enumerate(TEXTS[kind][: args.texts]):
                prompt = tokenizer.tokenize(text.encode(), add_special=False, parse_special=False)
                ids = [int(token) for token in prompt]
                answers[kind, index] = ids, await answer(target, ids, args.tokens, sampling(index))
    small = Model(Path(args.draft), args.threads) if args.draft else None
    factory = None if small is None else ModelDrafters("model", small, pieces)
    rows: list[Row] = []
    for kind in args.prompts:
        for name in args.drafters if small else ("suffix",):
            for budget in args.budgets:
                for tree in (False, True):
                    tally, before = Tally(), small.passes if small else 0
                    began = time.perf_counter()
                    for index in range(args.texts):
                        drafter: Drafter = SuffixDrafter()
                        if factory is not None and name != "suffix":
                            drafter = factory.for_model(pieces, sampling(index))
                            if name == "both":
                                drafter = CombinedDrafter("both", SuffixDrafter(), drafter)
                        await guess(drafter, *answers[kind, index], budget, tally, tree=tree)
                    seconds = time.perf_counter() - began
                    asked = (small.passes - before if small else 0) / tally.passes
                    rows.append(
                        {
                            "prompts": kind,
                            "drafter": name,
                            "budget": budget,
                            "shape": "tree" if tree else "chain",
                            "temperature": args.temperature,
                            "gained": round(tally.gained / tally.passes, 3),
                            "elsewhere": round(tally.elsewhere / tally.passes, 3),
                            "asked": round(asked, 2),
                            "rows": round(tally.rows / tally.passes, 2),
                            "calls": round(tally.calls / tally.passes, 2),
                            "draft_ms": round(seconds / tally.passes * 1000, 2),
                        }
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def shapes(n: int) -> dict[str, tuple[int, ...]]:
    """Return parents of ``n`` guesses: a chain, and trees of more and more branches."""
    chain = tuple(range(n))
    found = {"chain": chain}
    for leaves in (1, 2, 4):
        straight = n - leaves
        if straight >= leaves:
            # beside the first guesses of the principal path a leaf each, in preorder
            spine = list(range(straight))
            tail = range(leaves)[::-1]
            found[f"{leaves} leaves"] = (*spine, *tail)
    half = n // 2
    found["two halves"] = (*range(half), 0, *range(half + 1, n))
    return found


def steps(args: argparse.Namespace) -> list[Row]:
    """Return a row for each shape: what a step takes all of whose rows are computed."""
    model = Model(Path(args.model), args.threads)
    backend = model.backend
    rng = np.random.default_rng(1)
    rows: list[Row] = []
    with closing(backend):
        ids = rng.permutation(backend.info.n_vocab)[:N_CTX].astype(np.int32)
        backend.apply(OpenSequence(0, SamplingParams()))
        start = args.position
        backend.decode([StepInput(0, 0, ids[:start], None, False)])
        for budget in args.budgets:
            taken: dict[str, list[float]] = {}
            for _ in range(args.repeat):
                for shape, parents in shapes(budget).items():
                    part = ids[start : start + budget + 1]
                    told = () if shape == "chain" else parents
                    step = StepInput(0, start, part, None, False, budget, told)
                    began = time.perf_counter()
                    backend.decode([step])
                    taken.setdefault(shape, []).append(time.perf_counter() - began)
                    backend.apply(TrimSequence(0, start))
            chain = statistics.median(taken["chain"])
            for shape, seconds in taken.items():
                median = statistics.median(seconds)
                rows.append(
                    {
                        "budget": budget,
                        "shape": shape,
                        "ms": round(median * 1000, 2),
                        "times_chain": round(median / chain, 3),
                    }
                )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--draft")
    parser.add_argument("--budgets", default="4,8,12")
    parser.add_argument("--prompts", default="code,prose")
    parser.add_argument("--drafters", default="suffix,model,both")
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--position", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.budgets = [int(part) for part in args.budgets.split(",")]
    args.drafters = args.drafters.split(",")
    args.prompts = [cast("Kind", part) for part in args.prompts.split(",") if part in KINDS]
    rows = steps(args) if args.steps else trio.run(compare, args)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print("  ".join(f"{value:>8}" for value in row.values()))


if __name__ == "__main__":
    main()
