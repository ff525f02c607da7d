"""``bench kv``: what it refuses before anything is started, and how it tells what it measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pyagent_node.benchmarks import kv_codec
from pyagent_node.benchmarks.kv_types import CodecJob, CodecResult, CodecRow, QualityRow

from .conftest import Run

ROW = CodecRow(
    level="int4",
    ratio=4.4,
    bytes_per_token=174.5,
    encode_mb_per_second=400.0,
    decode_mb_per_second=800.0,
    key_error=0.04,
    value_error=0.1,
)
QUALITY = QualityRow(
    how="llama.cpp",
    kind="q4_0",
    ratio=3.56,
    bytes_per_token=6480.0,
    perplexity=14.7,
    cost=0.16,
    cost_error=0.06,
    divergence=0.047,
)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--texts", "0"), "--texts"),
        (("--texts", "many"), "--texts"),
        (("--levels", "f16,int5"), "--levels"),
        (("--levels", ""), "--levels"),
        (("--part", "none"), "--part"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments: tuple[str, ...], says: str, run: Run) -> None:
    outcome = run("bench", "kv", *arguments, "--json")
    assert outcome.status == 2
    assert outcome.out == ""
    assert says in outcome.error["message"]


def test_what_was_measured_is_shown_and_stored(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[CodecJob] = []

    def measured(job: CodecJob) -> CodecResult:
        asked.append(job)
        return CodecResult(texts=("a",), scored_tokens=256, codec=(ROW,), quality=(QUALITY,))

    monkeypatch.setattr(kv_codec, "measure_apart", measured)
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr("pyagent_node.cli.bench_kv.model_file", lambda *_: model)
    stored = tmp_path / "figures.json"
    outcome = run("bench", "kv", "--texts", "2", "--part", "codec", "--output", str(stored))
    assert outcome.status == 0
    for words in ("int4", "4.40 x", "400 MB/s", "q4_0", "+16.00%", "0.0470"):
        assert words in outcome.out
    assert asked[0].texts == 2
    report = msgspec.json.decode(stored.read_bytes())
    assert report["bench"] == "kv"
    assert report["result"]["quality"][0]["kind"] == "q4_0"
