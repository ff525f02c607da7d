"""What a slice holds, what it needs, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from gguf import GGUFWriter

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unavailable, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.models import copying
from pyagent_node.inference.models.architectures import check_sliceable, model_shape
from pyagent_node.inference.models.chunks import ChunkSet, chunk_count, chunks_of
from pyagent_node.inference.models.gguf_header import ByteRange, read_header
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.slicing import (
    DUMMY_VOCAB,
    slice_plan,
    vocabulary_plan,
    write_slice,
)


@pytest.fixture
def model(tiny: ModuleType, tmp_path: Path) -> Path:
    path: Path = tiny.tiny_model(tmp_path / "model.gguf", tokens=True)
    return path


def test_middle_slice(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "slices" / "1-3.gguf"
    plan = write_slice(model, Slice(1, 3, False), path)
    assert path.stat().st_size == plan.copy.size
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["llama.block_count"] == 2
    assert fields["llama.vocab_size"] == DUMMY_VOCAB
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    assert fields["llama.embedding_length"] == 128
    assert fields["pyagent.slice"] == "1-3"
    assert not any(k.startswith("tokenizer") for k in fields if k != "tokenizer.ggml.model")
    whole = {t.name: t for t in gguf.GGUFReader(model).tensors}
    names = set()
    for tensor in reader.tensors:
        if tensor.name.startswith("blk."):
            _, number, rest = tensor.name.split(".", 2)
            names.add(int(number))
            theirs = whole[f"blk.{int(number) + 1}.{rest}"]
            assert tensor.tensor_type == theirs.tensor_type
            np.testing.assert_array_equal(tensor.data, theirs.data)
    assert names == {0, 1}
    rest_of = {t.name: t for t in reader.tensors if not t.name.startswith("blk.")}
    assert set(rest_of) == {"token_embd.weight", "output_norm.weight"}
    assert not rest_of["token_embd.weight"].data.any()
    assert (rest_of["output_norm.weight"].data == 1).all()


def test_tail_slice_keeps_tokenizer_and_head(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tail.gguf"
    write_slice(model, Slice(3, 4, True), path)
    reader, whole = gguf.GGUFReader(path), gguf.GGUFReader(model)
    assert reader.fields["llama.block_count"].contents() == 1
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "llama.block_count":
            assert reader.fields[key].contents() == field.contents()
    theirs = {t.name: t for t in whole.tensors}
    for tensor in reader.tensors:
        np.testing.assert_array_equal(
            tensor.data, theirs[tensor.name.replace("blk.0.", "blk.3.")].data
        )
    assert "output_norm.weight" in {t.name for t in reader.tensors}


def test_untied_tail_leaves_the_embedding_table_out(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.tiny_model(tmp_path / "untied.gguf", tied=False)
    header = read_header(model)
    assert not model_shape(header).tied
    table = header.tensor("token_embd.weight").data
    plan = slice_plan(header, Slice(2, 4, True))
    assert not any(start < table.stop and table.start < stop for start, stop in plan.copy.needs)
    assert header.tensor("output.weight").data.stop == plan.copy.needs[-1].stop
    write_slice(model, Slice(2, 4, True), tmp_path / "tail.gguf")
    tail = {t.name: t for t in gguf.GGUFReader(tmp_path / "tail.gguf").tensors}
    assert tail["token_embd.weight"].shape.tolist() == [128, 320]
    assert not tail["token_embd.weight"].data.any()


def test_a_slice_needs_its_own_bytes_only(model: Path) -> None:
    header = read_header(model)
    total = header.file_size - header.data_start
    plan = slice_plan(header, Slice(0, 2, False))
    layers = [t for n, t in header.tensors.items() if n.startswith(("blk.0.", "blk.1."))]
    wanted = header.length + sum(t.nbytes for t in layers)
    needed = sum(stop - start for start, stop in plan.copy.needs)
    assert wanted <= needed <= wanted + 64 * len(layers)
    assert needed < header.length + total // 2 + 1
    assert plan.copy.needs[0].start == 0


def test_the_whole_model_needs_no_copy(model: Path, tmp_path: Path) -> None:
    header = read_header(model)
    plan = slice_plan(header, Slice(0, 4, True))
    assert plan.copy.segments == (ByteRange(0, header.file_size),)
    with pytest.raises(InvalidRequest) as caught:
        write_slice(model, Slice(0, 4, True), tmp_path / "whole.gguf")
    assert caught.value.code == "bad_slice"


@pytest.mark.parametrize(
    "part",
    [
        Slice(-1, 2, False),
        Slice(2, 2, False),
        Slice(3, 2, False),
        Slice(0, 5, False),
        Slice(3, 5, True),
        Slice(0, 2, True),
        Slice(1, 3, True),
    ],
)
def test_impossible_slices(model: Path, part: Slice) -> None:
    with pytest.raises(InvalidRequest) as caught:
        slice_plan(read_header(model), part)
    assert caught.value.code == "bad_slice"


def _uneven(writer: GGUFWriter) -> None:
    del writer.kv_data[0]["llama.feed_forward_length"]
    writer.add_feed_forward_length([256, 256, 256, 128])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"arch": "gemma2"}, "gemma2"),
        ({"settings": lambda w: w.add_expert_count(8)}, "experts"),
        ({"settings": lambda w: w.add_sliding_window(128)}, "sliding_window"),
        ({"settings": lambda w: w.add_uint32("llama.brand_new", 1)}, "brand_new"),
        ({"settings": _uneven}, "feed_forward_length"),
        ({"settings": lambda w: w.add_string("general.tensor_extra.name", "x")}, "precision"),
        ({"extra_tensor": "blk.2.attn_sinks.weight"}, "attn_sinks"),
        ({"extra_tensor": "blk.2.attn_output.bias"}, "layer 2"),
        ({"extra_tensor": "per_layer_embd.weight"}, "per_layer_embd"),
    ],
)
def test_models_that_were_not_checked_are_refused_by_name(
    tiny: ModuleType, tmp_path: Path, options: dict[str, object], named: str
) -> None:
    header = read_header(tiny.tiny_model(tmp_path / "m.gguf", **options))
    with pytest.raises(Unsupported, match=named) as caught:
        slice_plan(header, Slice(0, 2, False))
    assert caught.value.code == "unsupported_architecture"
    slice_plan(header, Slice(0, 4, True))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"settings": lambda w: w.add_uint32("llama.block_count", 0)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_uint32("llama.block_count", 513)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_uint32("llama.block_count", 3)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_uint32("llama.embedding_length", 64)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_uint32("llama.context_length", 0)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_head_count(3)}, "gguf_malformed"),
        ({"settings": lambda w: w.add_head_count_kv([1, 2])}, "gguf_malformed"),
        ({"settings": lambda w: w.add_uint16("split.count", 2)}, "split_model"),
        ({"extra_tensor": "blk.9.attn_norm.weight"}, "gguf_malformed"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_numbers_that_contradict_each_other(
    tiny: ModuleType, tmp_path: Path, options: dict[str, object], code: str
) -> None:
    header = read_header(tiny.tiny_model(tmp_path / "m.gguf", **options))
    with pytest.raises((CorruptData, Unsupported)) as caught:
        check_sliceable(header)
    assert caught.value.code == code


def test_a_partial_source_must_hold_the_needed_chunks(model: Path, tmp_path: Path) -> None:
    header = read_header(model)
    part = Slice(1, 2, False)
    count = chunk_count(header.file_size, 4096)
    wanted = chunks_of(slice_plan(header, part).copy.needs, 4096)
    assert 1 < len(wanted) < count
    have = ChunkSet(count)
    for index in wanted:
        have.add(index)
    sparse = tmp_path / "sparse.gguf"
    data = model.read_bytes()
    with sparse.open("wb") as file:
        for index in wanted:
            file.seek(index * 4096)
            file.write(data[index * 4096 : (index + 1) * 4096])
        file.truncate(len(data))
    write_slice(ModelFile(sparse, header, have, 4096), part, tmp_path / "a.gguf")
    write_slice(model, part, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    have.discard(wanted[1])
    with pytest.raises(Unavailable) as caught:
        write_slice(ModelFile(sparse, header, have, 4096), part, tmp_path / "c.gguf")
    assert caught.value.code == "bytes_missing"
    assert caught.value.facts == {"chunks": 1}
    assert not (tmp_path / "c.gguf").exists()


def test_nothing_is_left_behind_when_the_source_shrinks(model: Path, tmp_path: Path) -> None:
    file = ModelFile.open(model)
    os.truncate(model, file.header.data_start + 100)
    folder = tmp_path / "out"
    with pytest.raises(CorruptData) as caught:
        write_slice(file, Slice(0, 2, False), folder / "s.gguf")
    assert caught.value.code == "gguf_truncated"
    assert list(folder.iterdir()) == []


def test_nothing_is_left_behind_when_the_disk_is_full(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying.os, "fsync", full)
    folder = tmp_path / "out"
    with pytest.raises(Unavailable) as caught:
        write_slice(model, Slice(0, 2, False), folder / "s.gguf")
    assert caught.value.code == "disk_full"
    assert list(folder.iterdir()) == []


def test_a_slice_can_be_written_over_itself(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.gguf"
    write_slice(model, Slice(0, 2, False), path)
    first = path.read_bytes()
    write_slice(model, Slice(0, 2, False), path)
    assert path.read_bytes() == first


def test_vocabulary_plan_keeps_every_field_and_no_tensor(model: Path, tmp_path: Path) -> None:
    file = ModelFile.open(model)
    path = tmp_path / "vocabulary.gguf"
    copying.write_copy(file, vocabulary_plan(file.header), path)
    again = read_header(path)
    assert not again.tensors
    assert set(again.fields) == {*file.header.fields, "pyagent.slice", "pyagent.slice_format"}
    assert path.stat().st_size < file.header.length


def test_model_shape(model: Path) -> None:
    shape = model_shape(read_header(model))
    assert (shape.name, shape.n_layers, shape.n_embd, shape.n_vocab) == ("Tiny llama", 4, 128, 320)
    assert (shape.n_head, shape.n_head_kv, shape.head_dim, shape.n_ff) == (4, 2, 32, 256)
    assert shape.tied
    assert shape.n_ctx_train == 256
