"""The header parser: right on good files, clear on bad ones, safe on hostile ones."""

from __future__ import annotations

import mmap
import struct
import tracemalloc
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyagent_node.base.errors import CorruptData, NotFound, Unsupported
from pyagent_node.inference.models import gguf_format
from pyagent_node.inference.models.gguf_header import (
    ByteRange,
    parse_header,
    read_header,
    read_strings,
)

_MALFORMED = {"gguf_truncated", "gguf_malformed"}
_UNSUPPORTED = {"gguf_version", "gguf_big_endian", "gguf_nested_array", "gguf_tensor_type"}


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(*, tensors: int = 0, fields: int = 0, version: int = 3, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + body


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.fixture(scope="module")
def small(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path: Path = tiny.tiny_model(
        tmp_path_factory.mktemp("gguf") / "small.gguf",
        layers=1,
        tokens=True,
        settings=lambda writer: writer.add_array("llama.list", [0.5, 1.5]),
    )
    return path.read_bytes()


def test_agrees_with_the_reader_of_the_gguf_package(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(small)
    parsed = read_header(path)
    reader = gguf.GGUFReader(path)
    assert parsed.version == 3
    assert parsed.alignment == reader.alignment
    assert parsed.data_start == reader.data_offset
    assert parsed.file_size == len(small)
    assert set(parsed.fields) == {k for k in reader.fields if not k.startswith("GGUF.")}
    for key, field in parsed.fields.items():
        theirs = reader.fields[key]
        assert field.type == theirs.types[0]
        if field.type is not GGUFValueType.ARRAY:
            ours = field.value.decode() if isinstance(field.value, bytes) else field.value
            assert ours == theirs.contents()
        elif field.item_type is GGUFValueType.STRING:
            assert field.value is None
            assert [s.decode() for s in read_strings(small, field)] == theirs.contents()
        else:
            assert list(field.value or ()) == theirs.contents()
    assert list(parsed.tensors) == [t.name for t in reader.tensors]
    for theirs in reader.tensors:
        ours = parsed.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape)
        assert ours.type == theirs.tensor_type
        assert ours.data == ByteRange(theirs.data_offset, theirs.data_offset + theirs.n_bytes)
        assert ours.nbytes == theirs.n_bytes


def test_a_field_keeps_its_place(small: bytes) -> None:
    parsed = parse_header(small)
    field = parsed.fields["general.architecture"]
    assert small[slice(*field.span)] == (
        string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
    )
    assert small[slice(*field.payload)] == string(b"llama")


def test_prefix_is_enough_with_the_file_size(small: bytes) -> None:
    whole = parse_header(small)
    prefix = parse_header(memoryview(small)[: whole.length], len(small))
    assert prefix.tensors == whole.tensors
    assert prefix.fields == whole.fields
    with pytest.raises(CorruptData, match="truncated") as caught:
        parse_header(small[: whole.length], len(small) - 40)
    assert caught.value.code == "gguf_truncated"


def test_version_2_is_read(small: bytes) -> None:
    assert parse_header(small[:4] + struct.pack("<I", 2) + small[8:]).version == 2


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "gguf_truncated"),
        (b"GG", "gguf_truncated"),
        (b"GGML" + bytes(40), "gguf_malformed"),
        (b"\0" * 64, "gguf_malformed"),
        (header(version=1), "gguf_version"),
        (header(version=4), "gguf_version"),
        (header(version=0), "gguf_version"),
        (header(version=0x03000000), "gguf_big_endian"),
        (header(tensors=2**63), "gguf_malformed"),
        (header(fields=2**64 - 1), "gguf_malformed"),
        (header(fields=1), "gguf_truncated"),
        (header(fields=1, body=struct.pack("<Q", 2**64 - 1)), "gguf_malformed"),
        (header(fields=1, body=string(b"") + bytes(20)), "gguf_malformed"),
        (header(fields=1, body=string(b"\xff") + bytes(20)), "gguf_malformed"),
        (header(fields=1, body=string(b"k") + struct.pack("<I", 99)), "gguf_malformed"),
        (header(fields=2, body=2 * (string(b"k") + struct.pack("<IB", 0, 1))), "gguf_malformed"),
        (header(fields=1, body=string(b"k") + struct.pack("<IIQ", 9, 9, 1)), "gguf_nested_array"),
        (header(fields=1, body=string(b"k") + struct.pack("<IIQ", 9, 5, 2**62)), "gguf_malformed"),
        (header(fields=1, body=string(b"k") + struct.pack("<IIQ", 9, 8, 2**62)), "gguf_malformed"),
        (header(fields=1, body=string(b"k") + struct.pack("<IIQ", 9, 8, 3)), "gguf_truncated"),
        (
            header(fields=1, body=string(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**64 - 1)),
            "gguf_malformed",
        ),
        (
            header(fields=1, body=string(b"k") + struct.pack("<IIQQQ", 9, 8, 2, 2**64 - 1, 0)),
            "gguf_malformed",
        ),
        (
            header(fields=1, body=string(b"general.alignment") + struct.pack("<II", 4, 24)),
            "gguf_malformed",
        ),
        (
            header(fields=1, body=string(b"general.alignment") + struct.pack("<II", 4, 0)),
            "gguf_malformed",
        ),
        (
            header(fields=1, body=string(b"general.alignment") + struct.pack("<Ii", 5, 32)),
            "gguf_malformed",
        ),
        (header(tensors=1, body=tensor(b"x" * 64, (1,), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"\xff", (1,), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (1, 1, 1, 1, 1), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (0,), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (2**63, 2), 0, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (2**40,), 0, 0)), "gguf_truncated"),
        (header(tensors=1, body=tensor(b"t", (33,), 2, 0)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (32,), 4, 0)), "gguf_tensor_type"),
        (header(tensors=1, body=tensor(b"t", (32,), 999, 0)), "gguf_tensor_type"),
        (header(tensors=1, body=tensor(b"t", (1,), 0, 32) + bytes(64)), "gguf_malformed"),
        (header(tensors=1, body=tensor(b"t", (1,), 0, 1) + bytes(64)), "gguf_malformed"),
        (
            header(
                tensors=2,
                body=tensor(b"t", (1,), 0, 0) + tensor(b"t", (1,), 0, 32) + bytes(128),
            ),
            "gguf_malformed",
        ),
        (
            header(
                tensors=2,
                body=tensor(b"t", (1,), 0, 0) + tensor(b"u", (1,), 0, 0) + bytes(128),
            ),
            "gguf_malformed",
        ),
    ],
)
def test_refused_by_name(data: bytes, code: str) -> None:
    with pytest.raises((CorruptData, Unsupported)) as caught:
        parse_header(data)
    assert caught.value.code == code


def test_text_and_integer_check_their_types(small: bytes) -> None:
    parsed = parse_header(small)
    assert parsed.architecture == "llama"
    assert parsed.integer("llama.block_count") == 1
    assert parsed.integer("nope", 7) == 7
    assert parsed.text("nope", "x") == "x"
    for call in (
        lambda: parsed.text("llama.block_count"),
        lambda: parsed.text("nope"),
        lambda: parsed.integer("general.architecture"),
        lambda: parsed.integer("nope"),
        lambda: parsed.integer("llama.list"),
        lambda: parsed.tensor("nope"),
        lambda: read_strings(small, parsed.fields["llama.list"]),
    ):
        with pytest.raises(CorruptData) as caught:
            call()
        assert caught.value.code == "gguf_malformed"


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_header(tmp_path / "nope.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CorruptData) as caught:
        read_header(tmp_path / "empty.gguf")
    assert caught.value.code == "gguf_truncated"


def test_a_header_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_format, "MAX_HEADER_BYTES", 1024)
    data = header(fields=1, body=string(b"k") + struct.pack("<I", 8) + string(bytes(1000)))
    with pytest.raises(CorruptData, match="of header") as caught:
        parse_header(data)
    assert caught.value.code == "gguf_malformed"


def _parse(data: bytes) -> None:
    try:
        parse_header(data)
    except (CorruptData, Unsupported) as caught:
        error = caught
    else:
        return
    assert error.code in (_MALFORMED if isinstance(error, CorruptData) else _UNSUPPORTED)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutations_raise_only_our_errors(small: bytes, data: st.DataObject) -> None:
    length = parse_header(small).length
    mutated = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length - 1))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from(
                    [b"\xff" * 8, b"\x00" * 8, struct.pack("<Q", 2**63), struct.pack("<Q", 2**31)]
                ),
            )
        )
        mutated[at : at + len(patch)] = patch
    _parse(bytes(mutated))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(cut=st.floats(0, 1))
def test_every_truncation_is_named(small: bytes, cut: float) -> None:
    last = max(t.data.stop for t in parse_header(small).tensors.values())
    with pytest.raises(CorruptData) as caught:
        parse_header(small[: int(cut * (last - 1))])
    assert caught.value.code == "gguf_truncated"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_our_errors(tail: bytes) -> None:
    _parse(b"GGUF\x03\0\0\0" + tail)


def test_a_large_array_is_walked_but_not_kept() -> None:
    body = string(b"k") + struct.pack("<IIQ", 9, 8, 2**17) + bytes(8 * 2**17)
    body += string(b"l") + struct.pack("<IIQ", 9, 0, 2**22) + bytes(2**22)
    data = header(fields=2, body=body)
    tracemalloc.start()
    try:
        parsed = parse_header(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert parsed.fields["k"].items == 2**17
    assert parsed.fields["l"].value is None
    assert peak < 2**18


@pytest.mark.model
def test_bundled_model_header(bundled_model: Path) -> None:
    with (
        bundled_model.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        parsed = parse_header(data)
        tokens = read_strings(data, parsed.fields["tokenizer.ggml.tokens"])
    assert parsed.architecture == "llama"
    assert parsed.tensor("token_embd.weight").type is GGMLQuantizationType.Q8_0
    assert parsed.length == 1785664
    assert len(parsed.tensors) == 272
    assert len(tokens) == 49152
    assert tokens[1] == b"<|im_start|>"
    assert np.prod(parsed.tensor("blk.0.ffn_down.weight").shape) == 1536 * 576
