"""What ``bench kv`` measures, with the bundled model on one short text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.benchmarks.kv_codec import OWN, measure_apart
from pyagent_node.benchmarks.kv_texts import texts
from pyagent_node.benchmarks.kv_types import CodecJob
from pyagent_node.sharding.kv_codec import EXACT, LEVELS


def job(path: str) -> CodecJob:
    return CodecJob(path=path, texts=1, prefix=100, scored=16, rounds=1, threads=1)


def test_there_are_texts_of_both_sorts_on_every_machine() -> None:
    names = [name for name, _ in texts()]
    assert len(names) >= 16
    assert sum(name.endswith(".py") for name in names) >= 8


@pytest.mark.slow
@pytest.mark.model
def test_the_exact_level_costs_nothing_and_the_others_little(bundled_model: Path) -> None:
    result = measure_apart(job(str(bundled_model)))
    assert [row.level for row in result.codec] == list(LEVELS)
    ways = {(row.how, row.kind): row for row in result.quality}
    assert set(ways) == {("codec", level) for level in LEVELS} | {("llama.cpp", k) for k in OWN}
    exact = ways["codec", EXACT]
    assert (exact.cost, exact.divergence) == (0.0, 0.0)
    assert 0.99 < exact.ratio < 1.0
    ours, theirs = ways["codec", "int4"], ways["llama.cpp", "q4_0"]
    assert ours.ratio > 4.0 > theirs.ratio
    assert ours.divergence < theirs.divergence
    errors = [row.key_error for row in result.codec]
    assert errors[0] == 0.0
    assert errors == sorted(errors)


@pytest.mark.slow
def test_a_model_that_does_not_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(RunnerFailed, match="measuring process failed"):
        measure_apart(job(str(tmp_path / "m.gguf")))
