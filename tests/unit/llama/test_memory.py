"""Memory is counted before it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyagent_node.base.errors import LimitExceeded
from pyagent_node.inference.llama.memory import (
    MemoryNeed,
    available_memory,
    check_memory,
    kv_bytes_per_token,
    memory_need,
)
from pyagent_node.inference.models.gguf_header import read_header

MIB = 1 << 20


def test_the_bundled_model_needs_what_the_design_says(bundled_model: Path) -> None:
    header = read_header(bundled_model)
    assert kv_bytes_per_token(header) == 23_040
    need = memory_need(header, cells=1024, n_seq=4, n_vocab=49152, max_outputs=8)
    assert need.weights == bundled_model.stat().st_size
    assert need.kv == 1024 * 4 * 23_040
    assert 64 * MIB < need.work < 256 * MIB
    assert need.total == need.weights + need.kv + need.work


def test_too_little_memory_is_refused_with_every_number() -> None:
    need = MemoryNeed(weights=300 * MIB, kv=200 * MIB, work=100 * MIB)
    check_memory(need, 600 * MIB)
    with pytest.raises(LimitExceeded) as caught:
        check_memory(need, 600 * MIB - 1)
    error = caught.value
    assert error.code == "not_enough_memory"
    assert error.facts["needed"] == 600 * MIB
    assert error.facts["available"] == 600 * MIB - 1
    assert "600 MiB" in error.message
    assert error.remedy is not None


def test_a_container_limit_counts_but_its_file_cache_does_not(tmp_path: Path) -> None:
    assert available_memory(lambda: 1000, tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(lambda: 1000, tmp_path) == 1000
    (tmp_path / "memory.max").write_text("900\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert available_memory(lambda: 1000, tmp_path) == 200
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 150\nrubbish\n")
    assert available_memory(lambda: 1000, tmp_path) == 350
    assert available_memory(lambda: 100, tmp_path) == 100
    (tmp_path / "memory.max").write_bytes(b"\xff\xfe")
    assert available_memory(lambda: 1000, tmp_path) == 1000
    assert available_memory() > 0
