"""The encoder: missing libraries, wrong files, and (where its files are) what it says."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pytest

from pyagent_node.base.errors import (
    CorruptData,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from pyagent_node.sharding.context.minilm import MiniLm


@pytest.fixture(scope="module")
def minilm() -> MiniLm:
    """The real encoder, from the folder that PYAGENT_TEST_ENCODER names."""
    folder = os.environ.get("PYAGENT_TEST_ENCODER")
    if not folder:
        pytest.skip("PYAGENT_TEST_ENCODER names no folder with model.onnx and tokenizer.json")
    pytest.importorskip("onnxruntime", reason="needs pyagent-node[context]")
    return MiniLm(Path(folder) / "model.onnx", Path(folder) / "tokenizer.json", threads=1)


def test_without_the_libraries_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **named: object) -> object:
        if name.split(".", maxsplit=1)[0] in ("onnxruntime", "tokenizers"):
            raise ImportError(name)
        return real(name, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match=r"pip install 'pyagent-node\[context\]'") as caught:
        MiniLm(tmp_path / "a", tmp_path / "b")
    assert caught.value.code == "context_extra_missing"


@pytest.mark.slow
def test_other_files_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs pyagent-node[context]")
    with pytest.raises(NotFound):
        MiniLm(tmp_path / "model.onnx", tmp_path / "tokenizer.json")
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(CorruptData) as caught:
        MiniLm(tmp_path / "model.onnx", tmp_path / "tokenizer.json")
    assert caught.value.code == "encoder_corrupt"


@pytest.mark.slow
def test_likeness_of_meaning(minilm: MiniLm) -> None:
    texts = ["The cat sits on the mat.", "A feline rests on a rug.", "def add(a, b): return a + b"]
    vectors = minilm.embed(texts)
    assert vectors.shape == (3, minilm.dimensions)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]
    assert minilm.count_tokens("hello world") == 2
    assert minilm.embed([]).shape == (0, minilm.dimensions)


@pytest.mark.slow
def test_odd_texts_and_limits(minilm: MiniLm) -> None:
    vectors = minilm.embed(["", "\0", "word " * 3000, "😀" * 50])
    assert np.isfinite(vectors).all()
    with pytest.raises(LimitExceeded):
        minilm.embed(["x" * 70_000])
    with pytest.raises(LimitExceeded):
        minilm.embed([""] * 70_000)
    with pytest.raises(InvalidRequest):
        minilm.embed(["\ud800"])


@pytest.mark.slow
def test_words_are_found_where_they_stand(minilm: MiniLm) -> None:
    texts = ["The cat chased a mouse.", "", "Prices of steel fell.", "word " * 3000]
    question = "What did the cat hunt?"
    likeness = minilm.compare(question, texts, {})
    assert likeness.shape == (4,)
    assert int(likeness.argmax()) == 0
    turned = minilm.compare(question, texts[::-1], {})
    assert np.allclose(likeness, turned[::-1], atol=0.02)
    assert np.array_equal(minilm.embed_question(question), minilm.embed([question])[0])
    assert minilm.compare("?", [], {}).shape == (0,)
    assert minilm.compare("", texts, {}).tolist() == [0, 0, 0, 0]
    assert np.isfinite(minilm.compare("the \N{GRINNING FACE} of of", texts, {"the": 0.0})).all()
    assert minilm.centre is None


@pytest.mark.slow
def test_rare_words_count_for_more(minilm: MiniLm) -> None:
    texts = ["The cat sleeps all day.", "The farmer ploughs a field.", "Steel got cheaper."]
    question = "Does the farmer own a cat?"
    usual = minilm.compare(question, texts, {"cat": 0.1, "farmer": 5.0, "own": 0.1})
    turned = minilm.compare(question, texts, {"cat": 5.0, "farmer": 0.1, "own": 0.1})
    assert usual.argmax() == 1
    assert turned.argmax() == 0
