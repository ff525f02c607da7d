"""How wide a model's rows of KV are, and how its keys were rotated."""

from __future__ import annotations

from typing import Final

from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_types import GgufHeader
from pyagent_node.sharding.kv_codec import KvShape

_HALVES: Final = frozenset({"qwen2", "qwen3", "phi3", "gemma", "gemma2"})
_PAIRS: Final = frozenset({"llama"})
_DEFAULT_BASE: Final = 10_000.0
"""llama.cpp's own, for files that do not say."""


def kv_shape(header: GgufHeader) -> KvShape:
    """Return the shape of one layer's rows, of a whole model or of a slice.

    The rotation is only given where it turns whole heads in a way that is known; it is a hint, with
    which a codec saves bytes, and harmless when wrong.  Raises what ``model_shape`` raises.
    """
    shape = model_shape(header)
    arch = shape.architecture
    plain = KvShape(heads=shape.n_head_kv, width=shape.head_dim)
    if arch not in _HALVES | _PAIRS or shape.head_dim % 2:
        return plain
    if header.integer(f"{arch}.rope.dimension_count", shape.head_dim) != shape.head_dim:
        return plain
    field = header.fields.get(f"{arch}.rope.freq_base")
    base = field.value if field is not None else _DEFAULT_BASE
    if not isinstance(base, int | float) or not 0 < base < 1e12:
        return plain
    return KvShape(plain.heads, plain.width, float(base), rope_halves=arch in _HALVES)
