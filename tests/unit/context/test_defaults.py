"""Axes that every node has by itself."""

import numpy as np
import pytest

from pyagent_node.base.errors import CorruptData, InvalidRequest
from pyagent_node.sharding.context.defaults import (
    decode_axes,
    default_model,
    encode_axes,
    learn_axes,
)
from pyagent_node.sharding.context.minilm import DIMENSIONS, IDENTITY
from pyagent_node.sharding.context.sketches import random_axes


@pytest.mark.parametrize("dimensions", [8, 64, 384])
def test_an_encoder_without_axes_gets_random_ones(dimensions: int) -> None:
    axes = default_model("some encoder", dimensions)
    default_model.cache_clear()
    again = default_model("some encoder", dimensions)
    assert np.array_equal(axes.model.steps, again.model.steps)
    generator = np.random.Generator(np.random.PCG64(1))
    vectors = generator.standard_normal((500, dimensions)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    packed, weights = axes.model.sketch(vectors)
    assert packed.shape == (500, 32)
    assert np.isfinite(weights).all()
    buckets = axes.buckets.of(vectors)
    assert buckets.max() < 256
    assert len(set(buckets.tolist())) > 40


def test_axes_of_long_vectors_are_made_without_a_square_matrix(monkeypatch) -> None:
    shapes: list[tuple[int, ...]] = []
    qr = np.linalg.qr

    def noting(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shapes.append(a.shape)
        return qr(a)

    monkeypatch.setattr(np.linalg, "qr", noting)
    axes = random_axes(256, 1000, 1)
    assert shapes == [(1000, 256)]
    assert np.allclose(axes @ axes.T, np.eye(256), atol=1e-9)
    assert random_axes(20, 8, 1).shape == (20, 8)
    assert shapes[1:] == [(8, 8), (8, 8), (8, 4)]


@pytest.mark.parametrize("dimensions", [0, 1 << 20])
def test_no_vector_has_such_a_length(dimensions: int) -> None:
    with pytest.raises(InvalidRequest):
        default_model("some encoder", dimensions)


def test_minilm_has_learned_axes() -> None:
    axes = default_model(IDENTITY, DIMENSIONS)
    whose, again = decode_axes(encode_axes(axes, IDENTITY))
    assert whose == IDENTITY
    assert np.array_equal(axes.model.steps, again.model.steps)
    assert np.array_equal(axes.buckets.axes, again.buckets.axes)
    assert 0.05 < float(np.linalg.norm(axes.model.centre)) < 1


@pytest.mark.parametrize("harm", ["cut", "changed", "other", "empty"])
def test_damaged_axes_are_refused(harm: str) -> None:
    data = encode_axes(learn_axes(np.eye(256, dtype=np.float32)), "some encoder")
    harmed = {
        "cut": data[:-1],
        "changed": data[:100] + bytes([data[100] ^ 1]) + data[101:],
        "other": b"x" + data[1:],
        "empty": b"",
    }[harm]
    assert decode_axes(data)[0] == "some encoder"
    with pytest.raises(CorruptData) as caught:
        decode_axes(harmed)
    assert caught.value.code == "axes_corrupt"


def test_a_question_is_aimed_away_from_the_centre() -> None:
    model = default_model(IDENTITY, DIMENSIONS).model
    question = np.zeros(DIMENSIONS, np.float32)
    question[3] = 1
    aimed = model.aim(question)
    assert np.linalg.norm(aimed) == pytest.approx(1, abs=1e-5)
    assert aimed @ model.centre < question @ model.centre
    assert np.array_equal(model.aim(model.centre), model.centre)
    plain = default_model("some encoder", DIMENSIONS).model
    assert np.allclose(plain.aim(question), question)
