"""``bench backends``: every backend on the same weights, beside its library's own generate loop.

The model is converted to f16 once, as GGUF and as safetensors.  Each backend then runs in a process
of its own, alone, with ours and the library's own loop (transformers', mlx-lm's) taking turns on
the same prompt, in the same type; the median round counts.  All score the same text, and logits are
compared with llama.cpp's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.inference.backend_names import BACKENDS, DEFAULT, install_hint
from pyagent_node.inference.backends import survey
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.llama.tokenizer import LlamaTokenizer

TEXT: Final = (
    "The harbour town had two lighthouses. The older one, built of grey stone, had been dark for"
    " forty years; the newer stood on iron legs in the shallow water and was painted red and white."
    " Every evening the keeper rowed out, climbed the ladder, and wrote down the weather."
)
CHILD_SECONDS: Final = 900.0
"""Longest time that one backend may take."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a child measures; ``text`` and ``prompt`` are tokens."""

    name: str
    gguf: str
    folder: str
    logits: str
    text: tuple[int, ...]
    prompt: tuple[int, ...]
    tokens: int
    rounds: int
    threads: int


class Loop(msgspec.Struct, frozen=True, kw_only=True):
    """A library's own generate loop on the same weights; the ratios are ours over its."""

    name: str
    version: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_ratio: float
    decode_ratio: float


class BackendRow(msgspec.Struct, frozen=True, kw_only=True):
    """One backend; figures are ``None`` where it is not ``available``.

    ``hint`` says what to install to have it, or to have its library's own loop beside it.
    ``max_logit_diff`` is the greatest difference of a logit from llama.cpp's over the scored text,
    whose ``perplexity`` is given.
    """

    name: str
    version: str
    device: str
    available: bool
    exactness: str = ""
    load_seconds: float | None = None
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    perplexity: float | None = None
    max_logit_diff: float | None = None
    baseline: Loop | None = None
    hint: str = ""


class BackendsReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``bench backends`` stores."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    prompt_tokens: int
    tokens: int
    rounds: int
    scored_tokens: int
    backends: tuple[BackendRow, ...]


def measure(
    model: Path,
    *,
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    threads: int,
    say: Callable[[str], None],
) -> tuple[BackendRow, ...]:
    """Measure every backend, llama.cpp first; ``say`` takes a line for people.

    Raises the errors of ``convert`` and :class:`RunnerFailed` (``benchmark_failed``).
    """
    rows: list[BackendRow] = []
    text = tuple(int(token) for token in tokenised(model))
    prompt = (text * (prompt_tokens // len(text) + 1))[:prompt_tokens]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("  converting the model to f16")
        convert(model, folder / "f16.gguf", to="gguf")
        convert(model, folder / "f16", to="safetensors")
        reference: NDArray[np.float32] | None = None
        for state in survey():
            if not state.installed:
                hint = next(install_hint(each) for each in BACKENDS if each == state.name)
                rows.append(
                    BackendRow(name=state.name, version="", device="", available=False, hint=hint)
                )
                continue
            say(f"  {state.name} {state.version}")
            job = Job(
                name=state.name,
                gguf=str(folder / "f16.gguf"),
                folder=str(folder / "f16"),
                logits=str(folder / f"{state.name}.npy"),
                text=text,
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
                threads=threads,
            )
            row = _child(job)
            found: NDArray[np.float32] = np.load(job.logits)
            if state.name == DEFAULT:
                reference = found
            if reference is not None:
                row = msgspec.structs.replace(
                    row, max_logit_diff=float(np.abs(found - reference).max())
                )
            rows.append(row)
    return tuple(rows)


def tokenised(model: Path) -> NDArray[np.int32]:
    """Return the tokens of the scored text."""
    tokenizer = LlamaTokenizer(model)
    return tokenizer.tokenize(TEXT.encode(), add_special=True, parse_special=False)


def perplexity(logits: NDArray[np.float32], tokens: tuple[int, ...]) -> float:
    """Return the perplexity of ``tokens`` from the second on; row i is behind token i."""
    wide = logits.astype(np.float64)[:-1]
    wide -= wide.max(axis=1, keepdims=True)
    chosen = wide[np.arange(len(wide)), list(tokens[1:])] - np.log(np.exp(wide).sum(axis=1))
    return float(np.exp(-chosen.mean()))


def _child(job: Job) -> BackendRow:
    command = [sys.executable, "-m", "pyagent_node.benchmarks.backends_child"]
    try:
        done = subprocess.run(
            command,
            input=msgspec.json.encode(job),
            capture_output=True,
            timeout=CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _failed(job, f"it took more than {CHILD_SECONDS:g} seconds") from None
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _failed(job, lines[-1] if lines else f"exit code {done.returncode}")
    return msgspec.json.decode(done.stdout, type=BackendRow)


def _failed(job: Job, why: str) -> RunnerFailed:
    return RunnerFailed(f"Measuring {job.name} failed: {why[:400]}.", code="benchmark_failed")
