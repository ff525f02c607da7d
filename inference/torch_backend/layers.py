"""The layers of a slice in torch: its matrices, and what a row goes through in each of them.

Written over torch's functions instead of ``transformers``' modules: those own their caches, rotate
in one layout only, and do not let several sessions of different lengths share a call.

The residual stream is f32 whatever the matrices are.  Matrices that read the same input are one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from torch import Tensor  # pyright: ignore[reportMissingImports]
from torch.nn import functional as fn  # pyright: ignore[reportMissingImports]

from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.formats.weights import (
    Array,
    Weights,
    embedding_weights,
    head_weights,
    layer_weights,
)
from pyagent_node.inference.torch_backend.devices import Device


class Layer(NamedTuple):
    """One layer.  Matrices have shape (out, in); ``qkv`` and ``gate_up`` are several, stacked."""

    attn_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor


class Head(NamedTuple):
    """The norm before the output head, and the head, shape (n_vocab, n_embd)."""

    norm: Tensor
    matrix: Tensor


class SliceLayers(NamedTuple):
    """A slice: ``embedding`` where it takes tokens, ``head`` where it gives logits."""

    layers: tuple[Layer, ...]
    embedding: Tensor | None
    head: Head | None


def load_layers(weights: Weights, part: Slice, device: Device) -> SliceLayers:
    """Read the tensors of ``part``, and no others, and put them on the device."""
    float_type = np.float16 if device.dtype == "f16" else np.float32

    def put(array: Array) -> Tensor:
        return torch.from_numpy(array).to(device.name)

    def read(index: int) -> Layer:
        t = layer_weights(weights, index, float_type)
        biased = "attn_q.bias" in t
        names = ("attn_q", "attn_k", "attn_v")
        return Layer(
            attn_norm=put(t["attn_norm.weight"]),
            qkv=put(np.concatenate([t[f"{name}.weight"] for name in names])),
            qkv_bias=put(np.concatenate([t[f"{name}.bias"] for name in names])) if biased else None,
            out=put(t["attn_output.weight"]),
            out_bias=put(t["attn_output.bias"]) if "attn_output.bias" in t else None,
            ffn_norm=put(t["ffn_norm.weight"]),
            gate_up=put(np.concatenate([t["ffn_gate.weight"], t["ffn_up.weight"]])),
            down=put(t["ffn_down.weight"]),
        )

    layers = tuple(read(index) for index in range(part.first, part.last))
    head = None
    if part.head:
        norm, matrix = head_weights(weights, float_type)
        head = Head(put(norm), put(matrix))
    embedding = None
    if part.head and part.first == 0:
        tied = weights.config.tied and head is not None
        embedding = head.matrix if tied and head else put(embedding_weights(weights, float_type))
    return SliceLayers(layers, embedding, head)


class Rotation:
    """The rotation of queries and keys by their position."""

    def __init__(self, config: ModelConfig, device: Device) -> None:
        half = config.head_dim // 2
        steps = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)
        if config.rope_factors:
            steps /= np.array(config.rope_factors)
        self._steps = steps / config.rope_scale
        # how the numbers of a head are split, and where the two of a pair are then
        self._split, self._axis = ((2, half), -2) if config.rope_halves else ((half, 2), -1)
        self._device = device.name

    def turns(self, positions: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for rows at ``positions``, shape (n, 1, head_dim / 2), f32."""
        angles = positions.astype(np.float64)[:, None, None] * self._steps
        cos = torch.from_numpy(np.cos(angles).astype(np.float32)).to(self._device)
        sin = torch.from_numpy(np.sin(angles).astype(np.float32)).to(self._device)
        return cos, sin

    def turn(self, rows: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Turn ``rows`` of shape (n, heads, head_dim), f32."""
        cos, sin = turns
        one, two = rows.unflatten(-1, self._split).unbind(self._axis)
        turned = (one * cos - two * sin, one * sin + two * cos)
        return torch.stack(turned, self._axis).flatten(-2)


def norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of f32 rows."""
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True).add_(eps))
    return (rows * scale).mul_(weight)


def product(rows: Tensor, matrix: Tensor, device: Device, *, prefill: bool) -> Tensor:
    """Return f32 rows times a matrix, f32; ``prefill`` when they are a piece of a prompt.

    A processor multiplies one f16 row by a matrix much faster than an f32 one, and many rows much
    faster in f32.
    """
    if not device.singly:
        return fn.linear(rows.to(device.number), matrix).float()
    if prefill:
        return fn.linear(rows, matrix.float())
    if len(rows) == 1:
        return fn.linear(rows.half(), matrix).float()
    return torch.cat([fn.linear(row, matrix) for row in rows.half().split(1)]).float()


def feed_forward(
    layer: Layer, rows: Tensor, eps: float, device: Device, *, prefill: bool
) -> Tensor:
    """Return what the feed-forward part adds to the residual stream, f32."""
    normed = norm(rows, layer.ffn_norm, eps)
    gate, up = product(normed, layer.gate_up, device, prefill=prefill).chunk(2, -1)
    return product(fn.silu(gate).mul_(up), layer.down, device, prefill=prefill)
