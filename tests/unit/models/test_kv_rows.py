"""The shape of a model's KV rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.models.kv_rows import kv_shape
from pyagent_node.sharding.kv_codec import KvShape

from .tiny_models import EMBD, HEADS, KV_HEADS, tiny_model

WIDTH = EMBD // HEADS


def base(value: float) -> object:
    def write(writer: GGUFWriter) -> None:
        writer.add_rope_freq_base(value)

    return write


@pytest.mark.parametrize(
    ("arch", "settings", "expected"),
    [
        ("llama", None, KvShape(KV_HEADS, WIDTH, 10_000.0)),
        ("llama", base(100_000.0), KvShape(KV_HEADS, WIDTH, 100_000.0)),
        ("qwen2", base(1e6), KvShape(KV_HEADS, WIDTH, 1e6, rope_halves=True)),
        ("llama", base(float("nan")), KvShape(KV_HEADS, WIDTH)),
        ("gptneox", None, KvShape(KV_HEADS, WIDTH)),
    ],
)
def test_the_file_says_how_keys_were_rotated(
    tmp_path: Path, arch: str, settings: object, expected: KvShape
) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, settings=settings)  # type: ignore[arg-type]
    assert kv_shape(read_header(path)) == expected
    assert expected.row_bytes == KV_HEADS * WIDTH * 2
