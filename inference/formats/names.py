"""Names and row order of tensors: llama.cpp's, which are used throughout, and transformers'.  Pure.

The two differ in names, and for the architecture ``llama`` in how rows of queries and keys lie: the
files of transformers have the first numbers of all pairs of a head before the second ones, GGUF has
each pair together, as llama.cpp rotates them.
"""

from __future__ import annotations

import re
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyagent_node.inference.formats.config import HALVES, ModelConfig

_ENDS: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_Number = TypeVar("_Number", bound=np.generic)
_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)", re.ASCII)


def hf_name(name: str) -> str:
    """Return what transformers calls a tensor that llama.cpp calls ``name``."""
    if name in _ENDS:
        return _ENDS[name]
    match = _LAYER.fullmatch(name)
    assert match is not None, "names come from config.shapes_of and end_shapes"
    return f"model.layers.{match[1]}.{_PARTS[match[2]]}.{match[3]}"


def is_paired(config: ModelConfig, name: str) -> bool:
    """Whether the rows of a tensor lie in another order in the files of transformers."""
    return config.architecture not in HALVES and name.split(".")[-2] in ("attn_q", "attn_k")


def to_pairs(rows: NDArray[_Number], head_dim: int) -> NDArray[_Number]:
    """Reorder rows (a multiple of ``head_dim``) of transformers for llama.cpp."""
    split = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def to_halves(rows: NDArray[_Number], head_dim: int) -> NDArray[_Number]:
    """Reorder rows of llama.cpp for transformers; the inverse of :func:`to_pairs`."""
    split = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
