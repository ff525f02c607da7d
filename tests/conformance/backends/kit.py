"""Every backend that is installed here, the others skipped by name, and what they are fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.inference import backends
from pyagent_node.inference.backend import (
    FreeSequence,
    OpenSequence,
    StepInput,
    StepOutput,
)
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.inference.stepping.backend import SliceBackend

GREEDY = SamplingParams(temperature=0, logprobs=True, top_logprobs=4)
N_CTX, N_SEQ = 128, 4


Loaded = SliceBackend


class Loader(Protocol):
    """A backend's class."""

    def __call__(
        self,
        path: Path,
        part: Slice,
        *,
        n_ctx: int,
        n_seq: int,
        threads: int,
        available: Callable[..., int] = ...,
    ) -> Loaded: ...


def _llama() -> Loader:
    from pyagent_node.inference.llama.backend import LlamaBackend

    return cast(Loader, LlamaBackend)


def _mlx() -> Loader:
    from pyagent_node.inference.mlx_backend.backend import MlxBackend

    return cast(Loader, MlxBackend)


def _torch() -> Loader:
    from pyagent_node.inference.torch_backend.backend import TorchBackend

    return cast(Loader, TorchBackend)


LOADERS: dict[str, Callable[[], Loader]] = {"llama.cpp": _llama, "mlx": _mlx, "torch": _torch}
INSTALLED = {state.name: state.installed for state in backends.survey()}


def params(*names: str) -> list[object]:
    """Return the backends as test parameters; those that are missing are skipped, by name."""
    return [pytest.param(name, marks=_marks(name), id=name) for name in names or LOADERS]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    """Torch has an environment of its own, whose tests are found by their mark."""
    found = [pytest.mark.torch] if name == "torch" else []
    if not INSTALLED[name]:
        found.append(pytest.mark.skip(f"{name} is not installed"))
    return found


@contextmanager
def loaded(
    name: str, path: Path, part: Slice, *, n_ctx: int = N_CTX, n_seq: int = N_SEQ
) -> Iterator[Loaded]:
    """Load a slice for the time of the context."""
    backend = LOADERS[name]()(path, part, n_ctx=n_ctx, n_seq=n_seq, threads=1)
    try:
        yield backend
    finally:
        backend.close()


def tokens_of(*numbers: int) -> NDArray[np.int32]:
    return np.array(numbers, np.int32)


def prompt(n: int, seed: int = 7, vocab: int = 300) -> NDArray[np.int32]:
    """Return ``n`` tokens; the same arguments give the same."""
    return np.random.default_rng(seed).integers(3, vocab, n).astype(np.int32)


def step(
    backend: Loaded,
    seq: int,
    position: int,
    tokens: NDArray[np.int32],
    rows: NDArray[np.float32] | None = None,
    **more: object,
) -> StepOutput:
    sample = bool(more.pop("sample", backend.info.slice.head))
    (output,) = backend.decode([StepInput(seq, position, tokens, rows, sample, **more)])  # type: ignore[arg-type]
    return output


def begin(backend: Loaded, seq: int, tokens: NDArray[np.int32]) -> int:
    """Open a sequence, feed it and return the token that follows."""
    backend.apply(OpenSequence(seq, GREEDY))
    return step(backend, seq, 0, tokens).sampled[0].token


def generate(backend: Loaded, seq: int, position: int, token: int, n: int) -> list[int]:
    """Return ``token`` and the ``n`` that follow it."""
    found = [token]
    for at in range(position, position + n):
        found.append(step(backend, seq, at, tokens_of(found[-1])).sampled[0].token)
    return found


def logits(backend: Loaded, tokens: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the logits behind each token of a whole model, shape (n, n_vocab); 8 rows a call."""
    return backend.score(np.asarray(tokens, np.int32))


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return found


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Return the greatest KL divergence of the rows, in nats."""
    a, b = log_softmax(p), log_softmax(q)
    return float((np.exp(a) * (a - b)).sum(axis=-1).max())


def perplexity(found: NDArray[np.float32], tokens: NDArray[np.int32]) -> float:
    """Return the perplexity of ``tokens`` from the second on."""
    chosen = log_softmax(found)[np.arange(len(tokens) - 1), tokens[1:]]
    return float(np.exp(-chosen.mean()))


def free(backend: Loaded, *seqs: int) -> None:
    for seq in seqs:
        backend.apply(FreeSequence(seq))


def tiny_models() -> ModuleType:
    """Return the module that writes small random models."""
    path = Path(__file__).parents[2] / "unit" / "models" / "tiny_models.py"
    spec = util.spec_from_file_location("tiny_models_of_backends", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
