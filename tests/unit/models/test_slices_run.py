"""Slices, run one after the other, give the logits of the whole model, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFWriter

from pyagent_node.base.types import Slice
from pyagent_node.inference.models.copying import write_copy
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.slicing import vocabulary_plan, write_slice

PROMPT = "The three longest rivers of Europe are the Volga, the Danube and the Ural. The"
STEPS = 6


def check_chain(
    llama: ModuleType, model: Path, tokens: list[int], cuts: Sequence[int], folder: Path
) -> None:
    """Compare a prefill and several greedy steps of the chain with those of the whole model."""
    layers = cuts[-1]
    parts = [Slice(a, b, b == layers) for a, b in itertools.pairwise(cuts)]
    paths = [folder / f"{part}.gguf" for part in parts]
    for part, path in zip(parts, paths, strict=True):
        write_slice(model, part, path)

    tokens = list(tokens)
    prompt = len(tokens)
    with llama.LlamaSlice(model) as whole:
        expected = [whole.decode(0, tokens, None)]
        for _ in range(STEPS):
            tokens.append(int(expected[-1][-1].argmax()))
            expected.append(whole.decode(len(tokens) - 1, tokens[-1:], None))
    assert len(set(tokens[prompt:])) > 1
    assert np.isfinite(expected[-1]).all()

    slices = [
        llama.LlamaSlice(path, tap=None if part.head else part.last - part.first - 1)
        for part, path in zip(parts, paths, strict=True)
    ]
    try:
        with EmbeddingTable(model) as table:
            position = 0
            for logits in expected:
                chunk = tokens[position : position + len(logits)]
                rows = table.rows(np.array(chunk, np.int32))
                for one in slices:
                    rows = one.decode(position, None, rows)
                np.testing.assert_array_equal(rows, logits)
                position += len(chunk)
    finally:
        for one in slices:
            one.close()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "cuts",
    [(0, 10, 20, 30), (0, 1, 30), (0, 29, 30), (0, 3, 4, 17, 29, 30), (0, 14, 30)],
    ids=lambda cuts: "-".join(map(str, cuts)),
)
def test_bundled_model(
    llama: ModuleType, bundled_model: Path, tmp_path: Path, cuts: Sequence[int]
) -> None:
    with llama.LlamaSlice(bundled_model) as whole:
        tokens = whole.tokenize(PROMPT)
    check_chain(llama, bundled_model, tokens, cuts, tmp_path)


def _rope_factors(writer: GGUFWriter) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1.0, 4.0, 16, dtype=np.float32))


def _arrays(writer: GGUFWriter) -> None:
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        del writer.kv_data[0][f"llama.{key}"]
    writer.add_head_count([4] * 4)
    writer.add_head_count_kv([2] * 4)
    writer.add_feed_forward_length([256] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_random_models_of_every_checked_architecture(
    llama: ModuleType, tiny: ModuleType, tmp_path: Path, arch: str, tied: bool
) -> None:
    model = tiny.tiny_model(tmp_path / "m.gguf", arch=arch, tied=tied)
    check_chain(llama, model, list(range(7, 40)), (0, 1, 3, 4), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [_rope_factors, _arrays])
def test_random_models_with_rarer_headers(
    llama: ModuleType, tiny: ModuleType, tmp_path: Path, settings: object
) -> None:
    model = tiny.tiny_model(tmp_path / "m.gguf", settings=settings)
    check_chain(llama, model, list(range(7, 40)), (0, 2, 4), tmp_path)


@pytest.mark.slow
@pytest.mark.model
def test_vocabulary_file_tokenizes_like_the_model(
    llama: ModuleType, bundled_model: Path, tmp_path: Path
) -> None:
    file = ModelFile.open(bundled_model)
    write_copy(file, vocabulary_plan(file.header), tmp_path / "vocabulary.gguf")
    with (
        llama.LlamaSlice(bundled_model) as whole,
        llama.Vocabulary(tmp_path / "vocabulary.gguf") as vocabulary,
    ):
        text = "<|im_start|>user\nHöhe 3,5 m - naïve 漢字 🚀  x<|im_end|>\n"
        assert vocabulary.tokenize(text) == whole.tokenize(text)
        assert vocabulary.chat_template() == whole.chat_template() is not None
