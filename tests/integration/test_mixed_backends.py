"""One model over several backends, in real runner processes; f16 weights of the default model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from pyagent_node.base.types import Digest
from pyagent_node.inference import backends
from pyagent_node.inference.formats.convert import convert
from pyagent_node.inference.generation import Finished, Generated, GenerationRequest
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.sampling import Sampled, SamplingParams

from .real_pipeline import NAME, open_real_pipeline
from .test_failover_runners import LastJournal, open_world

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

INSTALLED = [state.name for state in backends.survey() if state.installed]
TOKENS = 24
REQUEST = GenerationRequest(
    NAME,
    prompt="<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n",
    max_tokens=TOKENS,
    ignore_eos=True,
    sampling=SamplingParams(temperature=0.0, logprobs=True, top_logprobs=2),
)
_REFERENCES: dict[Digest, list[Sampled]] = {}
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
        async with pipeline.head.engine.generate(REQUEST) as events:
            found = [event async for event in events]
        classes = {runner.info.exactness for runner in pipeline.runners}
    assert isinstance(found[-1], Finished)
    assert set(found[-1].usage.classes) == classes
    return [
        Sampled(event.token, event.logprob, tuple(event.top))
        for event in found
        if isinstance(event, Generated)
    ]


async def _reference(stored: tuple[ModelStore, Digest]) -> list[Sampled]:
    """Return what three ranks in llama.cpp answer; they are asked once."""
    if stored[1] not in _REFERENCES:
        _REFERENCES[stored[1]] = await _answer(stored, ("llama.cpp",) * 3)
    return _REFERENCES[stored[1]]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("torch", "llama.cpp", "torch"), marks=pytest.mark.torch),
        pytest.param(("llama.cpp", "torch", "mlx"), marks=pytest.mark.torch),
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
    expected = await _reference(stored)
    _check_same(await _answer(stored, names), expected)


def _check_same(found: Sequence[Sampled], expected: Sequence[Sampled]) -> None:
    assert len(found) == len(expected) == TOKENS
    pairs = list(zip(found, expected, strict=True))
    same = next((i for i, (one, other) in enumerate(pairs) if one.token != other.token), TOKENS)
    for one, other in pairs[:same]:
        assert one.logprob == pytest.approx(other.logprob, abs=0.05)
    print(f"\n{same} of {TOKENS} tokens alike")
    if same < TOKENS:
        one, other = pairs[same]
        gap = other.top[0][1] - other.top[1][1]
        print(f"there the likeliest two were {gap:.4f} nats apart")
        assert gap < CLOSE, f"{one} came instead of {other}"


@pytest.mark.parametrize(
    ("dies", "takes_over"),
    [
        pytest.param("torch", "llama.cpp", marks=pytest.mark.torch),
        pytest.param("llama.cpp", "torch", marks=pytest.mark.torch),
    ],
)
async def test_a_rank_that_dies_goes_on_in_another_backend(
    stored: tuple[ModelStore, Digest], dies: str, takes_over: str
) -> None:
    for name in (dies, takes_over):
        if name not in INSTALLED:
            pytest.skip(f"{name} is not installed")
    expected = await _reference(stored)
    found: list[Sampled] = []
    async with open_world(*stored, LastJournal(), {1: dies, 3: takes_over}) as world:
        await world.place((10, 20), (0, 1, 2))
        async with world.pipelines[3].engine.generate(REQUEST) as events:
            async for event in events:
                if isinstance(event, Finished):
                    assert event.usage.failovers == 1
                    continue
                found.append(Sampled(event.token, event.logprob, tuple(event.top)))
                if len(found) == 4:
                    await world.kill(1)
                    await world.place((10, 20), (0, 3, 2))
    _check_same(found, expected)
