"""Embedding rows equal those that llama.cpp would look up."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from pyagent_node.base.errors import InvalidRequest, Unavailable, Unsupported
from pyagent_node.inference.models.chunks import ChunkSet, chunk_count, chunks_of
from pyagent_node.inference.models.embeddings import EmbeddingTable, embedding_ranges
from pyagent_node.inference.models.model_file import ModelFile


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.F32])
def test_rows(tiny: ModuleType, tmp_path: Path, kind: Kind) -> None:
    model = tiny.tiny_model(tmp_path / "m.gguf", kind=kind)
    with EmbeddingTable(model) as table:
        tensor = ModelFile.open(model).header.tensor("token_embd.weight")
        raw = np.frombuffer(model.read_bytes()[slice(*tensor.data)], np.uint8)
        everything = quants.dequantize(raw.reshape(table.n_vocab, -1), kind)
        tokens = np.array([0, 319, 7, 7, 0], np.int32)
        rows = table.rows(tokens)
        assert rows.shape == (5, 128)
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, everything.reshape(320, 128)[tokens])
        assert table.rows(np.empty(0, np.int32)).shape == (0, 128)


@pytest.mark.parametrize("token", [-1, 320, 2**31 - 1])
def test_a_token_outside_the_vocabulary(tiny: ModuleType, tmp_path: Path, token: int) -> None:
    with EmbeddingTable(tiny.tiny_model(tmp_path / "m.gguf")) as table:
        with pytest.raises(InvalidRequest) as caught:
            table.rows(np.array([1, token], np.int32))
        assert caught.value.code == "bad_token"
        with pytest.raises(ValueError, match="one-dimensional"):
            table.rows(np.zeros((2, 2), np.int32))


def test_close_twice(tiny: ModuleType, tmp_path: Path) -> None:
    table = EmbeddingTable(tiny.tiny_model(tmp_path / "m.gguf"))
    table.close()
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.rows(np.zeros(1, np.int32))


def test_a_partial_file_must_hold_the_table(tiny: ModuleType, tmp_path: Path) -> None:
    whole = ModelFile.open(tiny.tiny_model(tmp_path / "m.gguf"))
    have = ChunkSet(chunk_count(whole.header.file_size, 4096))
    partial = whole._replace(have=have, chunk_bytes=4096)
    with pytest.raises(Unavailable) as caught:
        EmbeddingTable(partial)
    assert caught.value.code == "bytes_missing"
    for index in chunks_of(embedding_ranges(partial), 4096):
        have.add(index)
    assert not have.complete
    with EmbeddingTable(partial) as table:
        table.rows(np.arange(320, dtype=np.int32))


def test_a_type_that_cannot_be_looked_up(
    tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.tiny_model(tmp_path / "m.gguf")

    def refuse(data: object, kind: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(quants, "dequantize", refuse)
    with pytest.raises(Unsupported) as caught:
        EmbeddingTable(model)
    assert caught.value.code == "unsupported_embedding"


@pytest.mark.parametrize(
    "name",
    [
        "q4_0",
        "q4_1",
        "q5_0",
        "q5_1",
        "q8_0",
        "q2_K",
        "q3_K",
        "q4_K",
        "q5_K",
        "q6_K",
        "iq4_nl",
        "iq4_xs",
        "mxfp4",
    ],
)
def test_dequantisation_is_that_of_ggml(llama: ModuleType, name: str) -> None:
    kind = Kind[name.upper()]
    size, nbytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(5).integers(0, 256, (300, nbytes), dtype=np.uint8)
    function = getattr(llama.BASE, f"dequantize_row_{name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    theirs = np.zeros((300, size), np.float32)
    function(raw.ctypes.data, theirs.ctypes.data, theirs.size)
    with np.errstate(all="ignore"):
        ours = quants.dequantize(raw, kind)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.model
def test_bundled_model_rows(llama: ModuleType, bundled_model: Path) -> None:
    with EmbeddingTable(bundled_model) as table:
        assert (table.n_vocab, table.n_embd, table.type) == (49152, 576, Kind.Q8_0)
        rows = table.rows(np.array([1, 49151], np.int32))
        assert np.isfinite(rows).all()
        assert rows.any(axis=1).all()
