"""One model over several backends, in real runner processes; f16 weights of the default model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pyagent_node.base.types import Digest
from pyagent_node.inference import backends
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.generation import Generated, GenerationRequest
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.sampling import Sampled, SamplingParams

from .real_pipeline import NAME, open_real_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

INSTALLED = backends.names(backends.survey())
PROMPT = "<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 20
CLOSE = 0.05
"""Nats between the two likeliest tokens where another rounding may choose the other one."""


@pytest.fixture(scope="module")
def stored(
    bundled_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelStore, Digest]:
    """Return a store with the default model in f16."""
    folder = tmp_path_factory.mktemp("mixed")
    convert(bundled_model, folder / "f16.gguf", to="gguf")
    store = ModelStore(folder / "models")
    return store, store.add_file(folder / "f16.gguf", about=About(NAME)).digest


async def _answer(stored: tuple[ModelStore, Digest], names: Sequence[str]) -> list[Sampled]:
    """Return what a pipeline of three ranks answers, and who was asked."""
    async with open_real_pipeline(
        *stored, (10, 20), n_ctx=128, n_seq=2, backends=names
    ) as pipeline:
        assert [runner.info.backend for runner in pipeline.runners] == list(names)
        assert len({runner.pid for runner in pipeline.runners}) == 3
        request = GenerationRequest(
            NAME,
            prompt=PROMPT,
            max_tokens=TOKENS,
            ignore_eos=True,
            sampling=SamplingParams(temperature=0.0, logprobs=True, top_logprobs=2),
        )
        async with pipeline.head.engine.generate(request) as events:
            found = [event async for event in events if isinstance(event, Generated)]
    return [Sampled(event.token, event.logprob, tuple(event.top)) for event in found]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("torch", "llama.cpp", "torch"), marks=pytest.mark.torch),
        pytest.param(("llama.cpp", "torch", "mlx"), marks=pytest.mark.torch),
        pytest.param(("mlx", "llama.cpp", "mlx")),
    ],
    ids="-".join,
)
async def test_three_ranks_on_several_backends_answer(
    stored: tuple[ModelStore, Digest], names: tuple[str, ...]
) -> None:
    """The tokens are those of one backend, up to one whose rival was as likely but for rounding."""
    for name in names:
        if name not in INSTALLED:
            pytest.skip(f"{name} is not installed")
    expected = await _answer(stored, ("llama.cpp",) * 3)
    found = await _answer(stored, names)
    assert len(found) == len(expected) == TOKENS
    for one, other in zip(found, expected, strict=True):
        if one.token != other.token:
            gap = other.top[0][1] - other.top[1][1]
            assert gap < CLOSE, f"{one} came instead of {other}"
            break
        assert one.logprob == pytest.approx(other.logprob, abs=0.05)
