"""The numbers that say how a model of the llama family is computed.  Pure.

A file's own way of saying them is read in :mod:`gguf_config` and :mod:`hf_config`.  Everything here
is in llama.cpp's layout: see ``rope_halves``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, get_args

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData, Unsupported
from pyagent_node.base.types import Digest
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_codec import KvShape

Architecture = Literal["llama", "qwen2"]
ARCHITECTURES: Final[tuple[Architecture, ...]] = get_args(Architecture)
"""What can be computed outside llama.cpp, and converted."""
HALVES: Final[frozenset[Architecture]] = frozenset({"qwen2"})
"""Architectures that rotate number i of a head with number i + width / 2."""

MAX_SIDE: Final = 1 << 24
"""Most rows or columns of a tensor."""


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder of pre-normed layers: attention with rotated keys, then a gated feed-forward part.

    ``norm_eps`` is added to the mean square in RMS norms.  Position p turns pair i of a head by
    ``p / rope_scale * rope_base ** (-2 i / head_dim) / rope_factors[i]`` (no factors: all 1).
    A pair is numbers 2i and 2i + 1, or with ``rope_halves`` numbers i and i + head_dim / 2; rows of
    queries and keys lie as that wants them.  ``tied``: the embedding table is the output head.
    ``attention_bias`` says that queries, keys and values have a bias, ``output_bias`` that the
    projection behind attention has one.
    """

    architecture: Architecture
    name: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    norm_eps: float
    rope_base: float
    rope_halves: bool
    tied: bool
    rope_scale: float = 1.0
    rope_factors: tuple[float, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False

    @property
    def kv_shape(self) -> KvShape:
        """The rows of a layer's KV."""
        base = 0.0 if self.rope_factors or self.rope_scale != 1.0 else self.rope_base
        return KvShape(self.n_head_kv, self.head_dim, base, rope_halves=self.rope_halves)

    @property
    def digest(self) -> Digest:
        """BLAKE3 of everything but the name."""
        plain = msgspec.structs.replace(self, name="")
        return Digest(blake3(msgspec.json.encode(plain)).hex())


def check_config(config: ModelConfig) -> ModelConfig:
    """Check numbers against each other and return them.

    Raises :class:`CorruptData` (``config_malformed``).
    """
    sides = {
        "layers": config.n_layers,
        "width": config.n_embd,
        "vocabulary": config.n_vocab,
        "context length": config.n_ctx_train,
        "heads": config.n_head,
        "heads for keys": config.n_head_kv,
        "width of a head": config.head_dim,
        "width of the feed-forward part": config.n_ff,
    }
    for what, value in sides.items():
        if not 0 < value <= MAX_SIDE:
            raise malformed(f"{what} = {value}")
    if config.n_head % config.n_head_kv or config.head_dim % 2:
        raise malformed(
            f"{config.n_head} heads over {config.n_head_kv} for keys, of width {config.head_dim}"
        )
    numbers = (config.norm_eps, config.rope_base, config.rope_scale, *config.rope_factors)
    if not all(0 < number < 1e12 for number in numbers):
        raise malformed(f"a norm or rotation of {numbers[:3]}")
    if config.rope_factors and len(config.rope_factors) != config.head_dim // 2:
        raise malformed(f"{len(config.rope_factors)} factors of the rotation")
    return config


def architecture_named(name: str) -> Architecture:
    """Return a known architecture.

    Raises :class:`Unsupported` (``unsupported_architecture``) for any other name.
    """
    for known in ARCHITECTURES:
        if known == name:
            return known
    raise unsupported(f"its architecture {name[:64]!r} is not one of {', '.join(ARCHITECTURES)}")


def shapes_of(config: ModelConfig, layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shape (rows first) of every tensor of ``layers``, by name, in layer order."""
    q, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    embd, ff = config.n_embd, config.n_ff
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (embd,),
            "attn_q.weight": (q, embd),
            "attn_k.weight": (kv, embd),
            "attn_v.weight": (kv, embd),
            "attn_output.weight": (embd, q),
            "ffn_norm.weight": (embd,),
            "ffn_gate.weight": (ff, embd),
            "ffn_up.weight": (ff, embd),
            "ffn_down.weight": (embd, ff),
        }
        if config.attention_bias:
            parts |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if config.output_bias:
            parts["attn_output.bias"] = (embd,)
        found |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    return found


def end_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors outside the layers."""
    table = (config.n_vocab, config.n_embd)
    ends: dict[str, tuple[int, ...]] = {"token_embd.weight": table, "output_norm.weight": table[1:]}
    return ends if config.tied else ends | {"output.weight": table}


def canonical_float(value: float) -> float:
    """Return the shortest decimal number with the value's bits in f32: formats differ in how many.

    GGUF keeps f32 where others write decimals.
    """
    return float(str(np.float32(value)))


def malformed(what: str) -> CorruptData:
    """Return the error for numbers that cannot be a model's."""
    return CorruptData(
        f"The description of the model is malformed: {what}.",
        code="config_malformed",
        remedy="Get the model again, or convert it again.",
    )


def unsupported(what: str) -> Unsupported:
    """Return the error for a model that only llama.cpp may know how to compute."""
    return Unsupported(
        f"This model cannot be computed or converted here: {what}.",
        code="unsupported_architecture",
        remedy="Serve its GGUF file with llama.cpp.",
    )
