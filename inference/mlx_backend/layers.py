"""The layers of a model of the llama family on MLX: everything but attention over cells.

Rows of queries and keys lie as in the GGUF file (``ModelConfig.rope_halves``), so that keys come
out as llama.cpp keeps them.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.formats.weights import (
    Array,
    Float,
    Weights,
    embedding_weights,
    head_weights,
    layer_weights,
)
from pyagent_node.inference.mlx_backend import library


def _float(dtype: mx.Dtype) -> Float:
    return np.float16 if dtype == mx.float16 else np.float32


def turned(matrix: mx.array) -> mx.array:
    """Return a matrix of shape (out, in) as (in, out), for products of rows with it.

    On processors the numbers are moved, too: rows times a matrix that lies the other way round take
    1.4 to 2 times as long there, one row or many (with the same bits for every number of rows,
    either way).
    """
    return mx.contiguous(matrix.T) if library.device() == "cpu" else matrix.T


class Linear:
    """A matrix of shape (out, in), and a bias or none."""

    def __init__(self, weight: Array, bias: Array | None, dtype: mx.Dtype) -> None:
        self._matrix = turned(mx.array(weight, dtype=dtype))
        self._bias = None if bias is None else mx.array(bias, dtype=dtype)
        mx.eval(self._matrix)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the product for rows ``x``, shape (n, in)."""
        if self._bias is None:
            return x @ self._matrix
        return mx.addmm(self._bias, x, self._matrix)


class Projections(NamedTuple):
    """Queries of shape (n, heads, width), keys and values of (n, kv heads, width); not rotated."""

    queries: mx.array
    keys: mx.array
    values: mx.array


class Layer:
    """One layer; attention over cells comes between :meth:`project` and :meth:`finish`."""

    def __init__(self, tensors: dict[str, Array], config: ModelConfig, dtype: mx.Dtype) -> None:
        def linear(name: str) -> Linear:
            return Linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), dtype)

        self._config = config
        self._attn_norm = mx.array(tensors["attn_norm.weight"], dtype=dtype)
        self._ffn_norm = mx.array(tensors["ffn_norm.weight"], dtype=dtype)
        self._q, self._k, self._v = linear("attn_q"), linear("attn_k"), linear("attn_v")
        self._out = linear("attn_output")
        self._gate, self._up, self._down = linear("ffn_gate"), linear("ffn_up"), linear("ffn_down")

    def project(self, x: mx.array) -> Projections:
        """Return what attention needs of the rows ``x``, shape (n, n_embd)."""
        config, n = self._config, x.shape[0]
        h = mx.fast.rms_norm(x, self._attn_norm, config.norm_eps)
        kv = (n, config.n_head_kv, config.head_dim)
        return Projections(
            self._q(h).reshape(n, config.n_head, config.head_dim),
            self._k(h).reshape(kv),
            self._v(h).reshape(kv),
        )

    def finish(self, x: mx.array, attended: mx.array) -> mx.array:
        """Return the layer's output; ``attended`` has shape (n, heads * width)."""
        x = x + self._out(attended)
        h = mx.fast.rms_norm(x, self._ffn_norm, self._config.norm_eps)
        gate = self._gate(h)
        return x + self._down(gate * mx.sigmoid(gate) * self._up(h))


class Rope:
    """The rotation of queries and keys by position."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._freqs: mx.array | None = None
        if config.rope_factors:
            exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
            factors = np.array(config.rope_factors, np.float64)
            self._freqs = mx.array((config.rope_base**exponent * factors).astype(np.float32))

    def __call__(self, x: mx.array, position: int) -> mx.array:
        """Turn ``x``, shape (1, heads, n, width), for positions from ``position`` on."""
        config = self._config
        return mx.fast.rope(
            x,
            config.head_dim,
            traditional=not config.rope_halves,
            base=None if self._freqs is not None else config.rope_base,
            scale=1.0 / config.rope_scale,
            offset=position,
            freqs=self._freqs,
        )


class Ends:
    """What comes before the first layer and behind the last, where a slice has it."""

    def __init__(self, weights: Weights, part: Slice, dtype: mx.Dtype) -> None:
        self._eps = weights.config.norm_eps
        self._table: mx.array | None = None
        self._norm: mx.array | None = None
        self._head: mx.array | None = None
        kind = _float(dtype)
        if part.head:
            norm, head = head_weights(weights, kind)
            self._norm, matrix = mx.array(norm, dtype=dtype), mx.array(head)
            self._head = turned(matrix)
            if part.first == 0:
                tied = weights.config.tied
                # a view: the numbers are there once
                self._table = self._head.T if tied else mx.array(embedding_weights(weights, kind))
            mx.eval(self._norm, self._head)

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the rows of tokens; only in the whole model."""
        assert self._table is not None, "a slice is given activations"
        return self._table[tokens]

    def logits(self, x: mx.array) -> mx.array:
        """Return the logits of rows; only with the output head."""
        assert self._norm is not None, "the slice has the head"
        assert self._head is not None, "the slice has the head"
        return mx.fast.rms_norm(x, self._norm, self._eps) @ self._head


def load_layers(weights: Weights, part: Slice, dtype: mx.Dtype) -> list[Layer]:
    """Read the layers of a slice; raises what reading raises."""
    kind = _float(dtype)
    return [
        Layer(layer_weights(weights, index, kind), weights.config, dtype)
        for index in range(part.first, part.last)
    ]
