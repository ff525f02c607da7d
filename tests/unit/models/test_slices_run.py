"""Slices, run one after the other, give the logits of the whole model, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from pyagent_node.base.types import Slice
from pyagent_node.inference.models.embeddings import EmbeddingTable
from pyagent_node.inference.models.slicing import write_slice

pytestmark = [pytest.mark.slow, pytest.mark.model]

PROMPT = "The three longest rivers of Europe are the Volga, the Danube and the Ural. The"
STEPS = 6


@pytest.mark.parametrize(
    "cuts",
    [(0, 10, 20, 30), (0, 1, 30), (0, 29, 30), (0, 3, 4, 17, 29, 30), (0, 14, 30)],
    ids=lambda cuts: "-".join(map(str, cuts)),
)
def test_chained_slices_equal_the_whole_model(
    llama: ModuleType, bundled_model: Path, tmp_path: Path, cuts: Sequence[int]
) -> None:
    layers = cuts[-1]
    parts = [Slice(a, b, b == layers) for a, b in itertools.pairwise(cuts)]
    paths = [tmp_path / f"{part}.gguf" for part in parts]
    for part, path in zip(parts, paths, strict=True):
        write_slice(bundled_model, part, path)

    expected = []
    with llama.LlamaSlice(bundled_model) as whole:
        tokens = whole.tokenize(PROMPT)
        prompt = len(tokens)
        expected.append(whole.decode(0, tokens, None))
        for _ in range(STEPS):
            tokens.append(int(expected[-1][-1].argmax()))
            expected.append(whole.decode(len(tokens) - 1, tokens[-1:], None))
    assert len(set(tokens[prompt:])) > 1

    slices = [
        llama.LlamaSlice(path, tap=None if part.head else part.last - part.first - 1)
        for part, path in zip(parts, paths, strict=True)
    ]
    try:
        with EmbeddingTable(bundled_model) as table:
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
