"""How fast a token passes through several runners on one machine, by threads and spin policy.

Cuts a model into equal slices, loads each in a runner process, and lets one token at a time pass
through all of them, as a pipeline on one machine does.  The baseline is a plain llama-cpp-python
loop over the whole file in a process of its own, measured in the same run with the same threads.

    python benchmarks/runner_threads.py MODEL.gguf --ranks 3 --threads 1,2 --json

Milliseconds are medians of one token; ``overhead_ms`` is what one hop to a runner and back costs on
top of computing (an answer to nothing, and the difference to the same slice in this process).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import trio

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import OpenSequence, StepInput
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.runner import RunnerSpec, SliceRunner, open_slice_runner
from pyagent_node.inference.sampling import SamplingParams

POLICIES: dict[str, dict[str, str]] = {
    "ours": {},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 5000": {"GOMP_SPINCOUNT": "5000"},
    "spin 20000": {"GOMP_SPINCOUNT": "20000"},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "spin 300000": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does by itself
    "spin for ever": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "30000000000"},
}
N_CTX = 512
GREEDY = SamplingParams(temperature=0.0)


@contextlib.contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Set variables for the processes that are started inside."""
    before = dict(os.environ)
    try:
        os.environ.update(changes)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _plain(path: str, threads: int, tokens: int, pipe: Any) -> None:
    from llama_cpp import Llama  # noqa: PLC0415 - only in the process that measures it

    llama = Llama(
        path,
        n_ctx=N_CTX,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )
    llama.eval([1, 2, 3, 4])
    times = []
    for _ in range(tokens):
        begun = time.perf_counter()
        llama.eval([5])
        times.append(time.perf_counter() - begun)
    pipe.send(statistics.median(times) * 1e3)


def plain_ms(path: Path, threads: int, tokens: int) -> float:
    """Return the milliseconds a token of a plain llama-cpp-python loop."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_plain, args=(str(path), threads, tokens, theirs))
    process.start()
    result: float = ours.recv()
    process.join()
    return result


async def through_runners(
    paths: list[tuple[Path, Slice]], model: Path, threads: int, tokens: int
) -> dict[str, Any]:
    """Return medians for one token through all runners: each rank's, their sum, an empty call."""
    with EmbeddingTable(model) as table:
        async with contextlib.AsyncExitStack() as stack:
            runners: list[SliceRunner] = []
            for path, part in paths:
                spec = RunnerSpec(str(path), part, N_CTX, 1, threads)
                runner = await stack.enter_async_context(open_slice_runner(spec))
                await runner.apply([OpenSequence(0, GREEDY if part.head else None)])
                runners.append(runner)
            token = np.array([5], np.int32)
            ranks: list[list[float]] = [[] for _ in runners]
            totals = []
            for position in range(tokens):
                begun = time.perf_counter()
                rows = table.rows(token) if len(runners) > 1 else None
                for index, runner in enumerate(runners):
                    at = time.perf_counter()
                    last = index == len(runners) - 1
                    output = (await runner.decode([StepInput(0, position, token, rows, last)]))[0]
                    rows = output.activations
                    ranks[index].append(time.perf_counter() - at)
                totals.append(time.perf_counter() - begun)
            pings = []
            for _ in range(200):
                begun = time.perf_counter()
                await runners[0].ping()
                pings.append(time.perf_counter() - begun)
    return {
        "token_ms": round(statistics.median(totals) * 1e3, 3),
        "rank_ms": [round(statistics.median(times) * 1e3, 3) for times in ranks],
        "ping_ms": round(statistics.median(pings) * 1e3, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    n_layers = model_shape(read_header(args.model)).n_layers
    bounds = [round(i * n_layers / args.ranks) for i in range(args.ranks + 1)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for first, last in itertools.pairwise(bounds):
            part = Slice(first, last, head=last == n_layers)
            path = args.model if args.ranks == 1 else Path(folder) / f"{part}.gguf"
            if args.ranks > 1:
                write_slice(args.model, part, path)
            paths.append((path, part))
        for threads in (int(t) for t in args.threads.split(",")):
            baseline = plain_ms(args.model, threads, args.tokens)
            for name in args.policies.split(","):
                if threads == 1 and name != "ours":
                    continue  # one thread does not wait for another
                with environment(POLICIES[name]):
                    found = trio.run(through_runners, paths, args.model, threads, args.tokens)
                found |= {
                    "threads": threads,
                    "policy": name,
                    "plain_ms": round(baseline, 3),
                    "ratio": round(found["token_ms"] / baseline, 3),
                }
                results.append(found)
                if not args.json:
                    print(json.dumps(found), flush=True)
    if args.json:
        json.dump(results, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
