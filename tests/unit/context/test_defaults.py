"""Axes that every node has by itself."""

import numpy as np
import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.sharding.context.defaults import default_model


@pytest.mark.parametrize("dimensions", [8, 64, 384, 768])
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


@pytest.mark.parametrize("dimensions", [0, 1 << 20])
def test_no_vector_has_such_a_length(dimensions: int) -> None:
    with pytest.raises(InvalidRequest):
        default_model("some encoder", dimensions)
