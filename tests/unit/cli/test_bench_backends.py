"""``bench backends``: a row for each backend, and what to install for one that is not there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pyagent_node.benchmarks import backends
from pyagent_node.benchmarks.backends import BackendRow, Loop
from pyagent_node.inference.backend_names import install_hint

from .conftest import Run

LOOP = Loop(
    name="mlx-lm",
    version="0.32",
    prefill_tokens_per_second=18.5,
    decode_tokens_per_second=12.4,
    prefill_ratio=1.81,
    decode_ratio=1.47,
)
ROWS = (
    BackendRow(name="torch", version="", device="", available=False, hint=install_hint("torch")),
    BackendRow(
        name="mlx",
        version="0.32.4",
        device="cpu",
        available=True,
        prefill_tokens_per_second=33.5,
        decode_tokens_per_second=18.2,
        perplexity=40.735,
        max_logit_diff=0.043,
        baseline=LOOP,
    ),
)


def test_what_is_missing_is_a_row_that_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    monkeypatch.setattr(backends, "measure", lambda *_args, **_options: ROWS)
    monkeypatch.setattr(backends, "tokenised", lambda _model: [1, 2, 3])
    monkeypatch.setattr("pyagent_node.cli.bench_backends.model_file", lambda *_: model)
    monkeypatch.setenv("COLUMNS", "200")
    stored = tmp_path / "out.json"
    said = run("bench", "backends", "--model", str(model), "--output", str(stored))
    assert said.status == 0, said.err
    assert "pip install 'pyagent-node[torch]'" in said.out
    assert "mlx-lm 1.81, 1.47" in said.out
    rows = msgspec.json.decode(stored.read_bytes())["backends"]
    wanted = {
        "name",
        "version",
        "device",
        "available",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "perplexity",
        "max_logit_diff",
    }
    assert all(wanted <= row.keys() for row in rows)
