"""One backend's part of ``bench backends``, in a process of its own: job in, row out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from pyagent_node.base.types import Slice
from pyagent_node.benchmarks.backends import BackendRow, Job, Loop, perplexity
from pyagent_node.inference.backend import FreeSequence, OpenSequence, StepInput
from pyagent_node.inference.backend_names import BackendName
from pyagent_node.inference.backends import open_backend
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.stepping.backend import SliceBackend


class Turn(NamedTuple):
    """Seconds to the first token, and for those after it."""

    first: float
    rest: float


def main() -> None:
    """Read a job from standard input and write its row to standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is not the row
    row = run(job)
    out.write(msgspec.json.encode(row))
    out.close()


def run(job: Job) -> BackendRow:
    """Measure one backend beside its library's own loop, where there is one."""
    n_ctx = max(len(job.text), len(job.prompt) + job.tokens) + 8
    n_layers = model_shape(read_header(Path(job.gguf))).n_layers
    begun = time.perf_counter()
    name = cast(BackendName, job.name)
    opened = open_backend(
        name,
        Path(job.gguf),
        Slice(0, n_layers, True),
        n_ctx=n_ctx,
        n_seq=1,
        threads=job.threads,
    )
    loaded = time.perf_counter() - begun
    with closing(opened) as backend:
        assert isinstance(backend, SliceBackend), "all of ours are"
        info = backend.info
        logits = backend.score(np.array(job.text, np.int32))
        np.save(job.logits, logits)
        loop = _loop(job, info.exactness.rpartition("/")[2])
        ours: list[Turn] = []
        theirs: list[Turn] = []
        for _ in range(job.rounds):
            ours.append(_turn(backend, job))
            if loop is not None:
                theirs.append(loop())
    prefill, decode = _speeds(job, ours)
    baseline = None
    if theirs:
        package = _LOOPS[job.name]
        their_prefill, their_decode = _speeds(job, theirs)
        baseline = Loop(
            name=package,
            version=importlib.metadata.version(package),
            prefill_tokens_per_second=their_prefill,
            decode_tokens_per_second=their_decode,
            prefill_ratio=prefill / their_prefill,
            decode_ratio=decode / their_decode,
        )
    return BackendRow(
        name=info.backend,
        version=info.version,
        device=info.device,
        available=True,
        exactness=info.exactness,
        load_seconds=loaded,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        perplexity=perplexity(logits, job.text),
        baseline=baseline,
        hint=_lacks(job.name),
    )


def _speeds(job: Job, turns: list[Turn]) -> tuple[float, float]:
    first = statistics.median(turn.first for turn in turns)
    rest = statistics.median(turn.rest for turn in turns)
    return len(job.prompt) / first, (job.tokens - 1) / rest


def _turn(backend: SliceBackend, job: Job) -> Turn:
    """Answer the prompt once, greedily."""
    backend.apply(OpenSequence(0, SamplingParams(temperature=0)))
    begun = time.perf_counter()
    at = 0
    tokens = np.array(job.prompt, np.int32)
    (output,) = backend.decode([StepInput(0, 0, tokens, None, True)])
    first = time.perf_counter()
    at = len(tokens)
    for _ in range(job.tokens - 1):
        token = np.array([output.sampled[0].token], np.int32)
        (output,) = backend.decode([StepInput(0, at, token, None, True)])
        at += 1
    rest = time.perf_counter() - first
    backend.apply(FreeSequence(0))
    return Turn(first - begun, rest)


# ---- the libraries' own loops, which have no types of ours -------------------------------------

_LOOPS = {"mlx": "mlx-lm", "torch": "transformers"}


def _lacks(name: str) -> str:
    """Return what to install to compare a backend; empty when that is there, or there is none."""
    package = _LOOPS.get(name)
    if package is None or importlib.util.find_spec(package.replace("-", "_")) is not None:
        return ""
    return f"{package} is not installed: pip install 'pyagent-node[compare]'"


def _loop(job: Job, dtype: str) -> Callable[[], Turn] | None:
    """Return the library's own loop on the same weights in ``dtype``, if it is installed."""
    if job.name == "mlx" and importlib.util.find_spec("mlx_lm") is not None:
        return _mlx_loop(job, dtype)
    if job.name == "torch" and importlib.util.find_spec("transformers") is not None:
        return _torch_loop(job, dtype)
    return None


def _mlx_loop(job: Job, dtype: str) -> Callable[[], Turn]:
    import mlx.core as mx  # noqa: PLC0415 - an extra

    generating: Any = importlib.import_module("mlx_lm.generate")
    utils: Any = importlib.import_module("mlx_lm.utils")
    model: Any = utils.load_model(Path(job.folder))[0]
    model.set_dtype(mx.float16 if dtype == "f16" else mx.float32)

    def turn() -> Turn:
        begun = time.perf_counter()
        first = begun
        prompt = mx.array(list(job.prompt))
        steps = generating.generate_step(prompt, model, max_tokens=job.tokens)
        for index, _ in enumerate(steps):
            if index == 0:
                first = time.perf_counter()
        return Turn(first - begun, time.perf_counter() - first)

    return turn


def _torch_loop(job: Job, dtype: str) -> Callable[[], Turn]:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=kinds.get(dtype, torch.float32)
    )
    if torch.cuda.is_available():
        model = model.to("cuda")

    def generate(n: int) -> float:
        ids = torch.tensor([list(job.prompt)], device=model.device)
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - begun

    def turn() -> Turn:
        first = generate(1)
        return Turn(first, max(1e-9, generate(job.tokens) - first))

    return turn


if __name__ == "__main__":
    main()
