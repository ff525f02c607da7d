"""From the header of a GGUF file to a :class:`ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import (
    HALVES,
    ModelConfig,
    architecture_named,
    canonical_float,
    check_config,
    malformed,
    unsupported,
)
from pyagent_node.inference.models.architectures import (
    check_sliceable,
    model_shape,
)
from pyagent_node.inference.models.gguf_types import GgufHeader, GgufTensor
from pyagent_node.inference.models.slice_plan import SLICE_KEY

ROPE_FACTORS = "rope_freqs.weight"
_BASE = 10_000.0
"""llama.cpp's own, for files that do not say."""

Read = Callable[[GgufTensor], NDArray[np.uint8]]


def held_slice(header: GgufHeader) -> Slice:
    """Return which layers of the whole model a file has: all, or those that its slice names.

    Raises :class:`CorruptData` (``config_malformed``).
    """
    layers = model_shape(header).n_layers
    text = header.text(SLICE_KEY, str(Slice(0, layers, head=True)))
    span, plus, head = text.partition("+")
    first, dash, last = span.partition("-")
    if not (first.isdecimal() and dash and last.isdecimal() and (plus, head) in _HEADS):
        raise malformed(f"the slice {text[:64]!r}")
    part = Slice(int(first), int(last), head=bool(plus))
    if part.last - part.first != layers:
        raise malformed(f"{layers} layers in the slice {part}")
    return part


_HEADS = {("", ""), ("+", "head")}


def gguf_config(header: GgufHeader, read: Read) -> ModelConfig:
    """Return the numbers of a GGUF file; ``read`` returns the bytes of a tensor.

    In a slice without the output head ``n_vocab`` is that of its dummy table, and ``n_layers`` is
    always the number of layers in the file.  Raises :class:`Unsupported`
    (``unsupported_architecture``) and :class:`CorruptData` (``gguf_malformed``,
    ``config_malformed``).
    """
    arch = architecture_named(header.architecture)
    shape = check_sliceable(header)

    def number(key: str, default: float) -> float:
        field = header.fields.get(f"{arch}.{key}")
        if field is None:
            return default
        if isinstance(field.value, bool) or not isinstance(field.value, int | float):
            raise malformed(f"{key} is not a number")
        return canonical_float(field.value)

    kind = header.text(f"{arch}.rope.scaling.type", "none")
    scale = number("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    scale *= number("rope.scale_linear", 1.0)
    if kind not in ("none", "linear") or number("rope.scaling.attn_factor", 1.0) != 1.0:
        raise unsupported(f"positions are scaled in the way {kind[:32]!r}")
    if number("rope.dimension_count", shape.head_dim) != shape.head_dim:
        raise unsupported("only a part of each head is rotated")
    if number("attention.value_length", shape.head_dim) != shape.head_dim:
        raise unsupported("values are not as wide as keys")
    for name in header.tensors:
        part = name.split(".")[-2:]
        if part[-1] == "bias" and part[0] not in _BIASED:
            raise unsupported(f"it has the tensor {name!r}")
        if part[0] == "attn_qkv":
            raise unsupported("queries, keys and values are one tensor")
    factors: tuple[float, ...] = ()
    tensor = header.tensors.get(ROPE_FACTORS)
    if tensor is not None:
        if tensor.type is not GGMLQuantizationType.F32:
            raise malformed(f"{ROPE_FACTORS} of type {tensor.type.name}")
        factors = tuple(canonical_float(f) for f in read(tensor).view("<f4").tolist())
    return check_config(
        ModelConfig(
            architecture=arch,
            name=shape.name,
            n_layers=shape.n_layers,
            n_embd=shape.n_embd,
            n_vocab=shape.n_vocab,
            n_ctx_train=shape.n_ctx_train,
            n_head=shape.n_head,
            n_head_kv=shape.n_head_kv,
            head_dim=shape.head_dim,
            n_ff=shape.n_ff,
            norm_eps=number("attention.layer_norm_rms_epsilon", 0.0),
            rope_base=number("rope.freq_base", _BASE),
            rope_halves=arch in HALVES,
            tied=shape.tied,
            rope_scale=scale,
            rope_factors=factors,
            attention_bias="blk.0.attn_q.bias" in header.tensors,
            output_bias="blk.0.attn_output.bias" in header.tensors,
        )
    )


_BIASED = frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})
