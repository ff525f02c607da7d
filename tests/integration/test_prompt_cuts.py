"""A prompt may be cut where the runner says so, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import (
    PREFILL_CHUNK,
    FreeSequence,
    KvRange,
    OpenSequence,
    StepInput,
)
from pyagent_node.inference.llama import selftest
from pyagent_node.inference.llama.backend import LlamaBackend
from pyagent_node.inference.llama.probe import Outputs, Probe
from pyagent_node.inference.models.slicing import write_slice
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.model]

PART = Slice(10, 14, head=False)
LAST = Slice(29, 30, head=True)
N_EMBD = 576


@pytest.fixture(scope="module")
def path(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "middle.gguf"
    write_slice(bundled_model, PART, path)
    return path


@pytest.fixture(scope="module")
def middle(path: Path) -> Iterator[LlamaBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "CUT_SECONDS", 1000.0)  # however busy the machine is
        backend = LlamaBackend(path, PART, n_ctx=1100, n_seq=2, threads=1)
    with closing(backend) as it:
        yield it


def prefilled(backend: LlamaBackend, n: int, cuts: Sequence[int]) -> tuple[Outputs, KvRange]:
    """What comes out of the first ``n`` made-up rows, cut at ``cuts``, and their cells."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 40_000, 1100).astype(np.int32)
    rows = rng.standard_normal((1100, N_EMBD), np.float32)
    backend.apply(OpenSequence(0))
    got = []
    for at, stop in zip([0, *cuts], [*cuts, n], strict=True):
        (output,) = backend.decode([StepInput(0, at, tokens[at:stop], rows[at:stop], False)])
        assert output.activations is not None
        got.append(output.activations)
    kv = backend.export_kv(0, 0, n)
    backend.apply(FreeSequence(0))
    return np.concatenate(got), kv


@pytest.mark.parametrize(
    ("n", "cuts"),
    [
        (300, [64]),
        (300, [64, 128, 192]),
        (340, [256]),
        (512, [448]),
        (700, [512, 576]),
        (1030, [128, 512, 704, 768, 960, 1024]),
    ],
)
def test_parts_that_begin_at_a_block_and_are_as_long_change_nothing(
    middle: LlamaBackend, n: int, cuts: list[int]
) -> None:
    assert middle.info.prefill_cut == BLOCK_TOKENS
    whole, kv = prefilled(middle, n, [])
    parts, again = prefilled(middle, n, cuts)
    assert np.array_equal(whole, parts)
    assert kv == again


def test_a_last_part_that_is_shorter_than_a_block_is_another_matter(middle: LlamaBackend) -> None:
    """The reason for the rule that as many tokens must follow; where this fails it may go."""
    whole, _ = prefilled(middle, 300, [])
    parts, _ = prefilled(middle, 300, [256])
    assert not np.array_equal(whole, parts)


def test_a_backend_whose_cuts_show_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = Probe.early

    def shown(probe: Probe, start: int, rows: range) -> Outputs:
        out = early(probe, start, rows)
        if rows.start:
            out[0, 0] = np.nextafter(out[0, 0], np.float32(9))
        return out

    monkeypatch.setattr(Probe, "early", shown)
    with closing(LlamaBackend(path, PART, n_ctx=600, n_seq=1, threads=1)) as backend:
        assert backend.info.prefill_cut == PREFILL_CHUNK


def test_trying_cuts_is_left_out_where_it_takes_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "CUT_SECONDS", 0.0)
    with closing(LlamaBackend(path, PART, n_ctx=600, n_seq=1, threads=1)) as backend:
        assert backend.info.prefill_cut == PREFILL_CHUNK
        assert backend.info.kv_portable


# ---- a slice of the last layer alone, of which only wanted rows are computed to the end ---------


@pytest.fixture(scope="module")
def last_layer(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slices") / "last.gguf"
    write_slice(bundled_model, LAST, path)
    return path


def sampled(backend: LlamaBackend, n: int, cuts: Sequence[int]) -> tuple[Sampled, KvRange]:
    """The token behind the first ``n`` made-up rows, cut at ``cuts``, and their cells."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 40_000, 1100).astype(np.int32)
    rows = rng.standard_normal((1100, N_EMBD), np.float32)
    backend.apply(OpenSequence(0, SamplingParams(temperature=0.0, logprobs=True)))
    for at, stop in zip([0, *cuts], [*cuts, n], strict=True):
        (output,) = backend.decode([StepInput(0, at, tokens[at:stop], rows[at:stop], stop == n)])
    kv = backend.export_kv(0, 0, n)
    backend.apply(FreeSequence(0))
    return output.sampled[0], kv


def test_the_last_layer_alone_may_be_cut_too(
    last_layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "CUT_SECONDS", 1000.0)
    with closing(LlamaBackend(last_layer, LAST, n_ctx=1100, n_seq=2, threads=1)) as backend:
        assert backend.info.prefill_cut == BLOCK_TOKENS
        for n, cuts in ((300, [64, 128]), (512, [448]), (700, [512, 576])):
            assert sampled(backend, n, cuts) == sampled(backend, n, [])


def test_a_last_layer_whose_cuts_show_says_so(
    last_layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Probe.last

    def shown(probe: Probe, start: int, rows: range) -> Outputs:
        out = last(probe, start, rows)
        out[0] = np.nextafter(out[0], np.float32(9 if rows.start else -9))
        return out

    monkeypatch.setattr(selftest, "CUT_SECONDS", 1000.0)
    monkeypatch.setattr(Probe, "last", shown)
    with closing(LlamaBackend(last_layer, LAST, n_ctx=600, n_seq=1, threads=1)) as backend:
        assert backend.info.prefill_cut == PREFILL_CHUNK
