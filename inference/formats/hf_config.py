"""``config.json`` of transformers, read into a :class:`ModelConfig` and written from one.  Pure."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import msgspec
import numpy as np

from pyagent_node.inference.formats.config import (
    HALVES,
    ModelConfig,
    architecture_named,
    canonical_float,
    check_config,
    malformed,
    unsupported,
)

_CLASSES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_CONTEXT: Final = 2048
_BASE: Final = 10_000.0


class _Rope(msgspec.Struct):
    """How positions are scaled; ``type`` is the old name of ``rope_type``."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class _Config(msgspec.Struct):
    """The fields that say how the model is computed; others are ignored."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = _CONTEXT
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    mlp_bias: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    _name_or_path: str = ""


class Llama3(NamedTuple):
    """The scaling of Llama 3.1: low frequencies are slowed down by ``factor``."""

    factor: float
    low: float
    high: float
    context: int


_KNOWN: Final = (Llama3(8.0, 1.0, 4.0, 8192), Llama3(32.0, 1.0, 4.0, 8192))
"""The scalings that released models have: GGUF keeps their outcome only."""


def llama3_factors(rope: Llama3, base: float, head_dim: int) -> tuple[float, ...]:
    """Return by what each pair's frequency is divided.

    As published with Llama 3.1 (``_compute_llama3_parameters`` of transformers).
    """
    found: list[float] = []
    for i in range(head_dim // 2):
        wave = 2 * math.pi * base ** (2 * i / head_dim)
        if wave < rope.context / rope.high:
            found.append(1.0)
        elif wave > rope.context / rope.low:
            found.append(rope.factor)
        else:
            smooth = (rope.context / wave - rope.low) / (rope.high - rope.low)
            found.append(1 / ((1 - smooth) / rope.factor + smooth))
    return tuple(canonical_float(factor) for factor in found)


def read_config(data: bytes, *, name: str) -> ModelConfig:
    """Read ``config.json``.

    Raises :class:`CorruptData` (``config_malformed``) and :class:`Unsupported`
    (``unsupported_architecture``).
    """
    try:
        found = msgspec.json.decode(data, type=_Config, strict=False)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(f"config.json: {str(error)[:200]}") from None
    arch = architecture_named(found.model_type)
    if found.hidden_act != "silu" or found.mlp_bias or found.use_sliding_window:
        raise unsupported("its activation, biases or attention window are not known here")
    if min(found.num_attention_heads, found.hidden_size) < 1:
        raise malformed(f"{found.num_attention_heads} heads over a width of {found.hidden_size}")
    head_dim = found.head_dim or found.hidden_size // found.num_attention_heads
    rope = found.rope_parameters or found.rope_scaling or _Rope()
    base = found.rope_theta or rope.rope_theta or _BASE
    kind = rope.rope_type or rope.type or "default"
    factors: tuple[float, ...] = ()
    if kind == "llama3":
        known = Llama3(
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            rope.original_max_position_embeddings,
        )
        if min(known) <= 0 or known.high <= known.low or not 1 < base < 1e12:
            raise malformed(f"positions scaled by {known}")
        if not 0 < head_dim <= 1 << 16:
            raise malformed(f"heads of width {head_dim}")
        factors = llama3_factors(known, base, head_dim)
    elif kind not in ("default", "linear"):
        raise unsupported(f"positions are scaled in the way {kind[:32]!r}")
    return check_config(
        ModelConfig(
            architecture=arch,
            name=name,
            n_layers=found.num_hidden_layers,
            n_embd=found.hidden_size,
            n_vocab=found.vocab_size,
            n_ctx_train=found.max_position_embeddings,
            n_head=found.num_attention_heads,
            n_head_kv=found.num_key_value_heads or found.num_attention_heads,
            head_dim=head_dim,
            n_ff=found.intermediate_size,
            norm_eps=canonical_float(found.rms_norm_eps),
            rope_base=canonical_float(base),
            rope_halves=arch in HALVES,
            tied=found.tie_word_embeddings,
            rope_scale=canonical_float(rope.factor) if kind == "linear" else 1.0,
            rope_factors=factors,
            attention_bias=arch == "qwen2" or bool(found.attention_bias),
            output_bias=arch == "llama" and bool(found.attention_bias),
        )
    )


def write_config(
    config: ModelConfig, *, dtype: str, bos: int | None = None, eos: int | None = None
) -> bytes:
    """Return ``config.json`` for a model whose matrices are of ``dtype`` (``float16``).

    ``bos`` and ``eos`` are the tokens that begin and end a text.  Raises :class:`Unsupported`
    (``unsupported_architecture``) for what the format cannot say.
    """
    rope: dict[str, str | float | int] = {"rope_type": "default"}
    if config.rope_factors:
        rope = _named_scaling(config)
    elif config.rope_scale != 1.0:
        rope = {"rope_type": "linear", "factor": config.rope_scale}
    biased = (config.attention_bias, config.output_bias)
    if config.architecture == "llama" and biased[0] != biased[1]:
        raise unsupported("only some of its projections have a bias")
    if config.architecture == "qwen2" and biased != (True, False):
        raise unsupported("its biases are not those of Qwen2")
    fields: dict[str, object] = {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head_kv,
        "num_hidden_layers": config.n_layers,
        "head_dim": config.head_dim,
        "vocab_size": config.n_vocab,
        "max_position_embeddings": config.n_ctx_train,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if config.architecture == "llama":
        fields["attention_bias"] = config.attention_bias
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    for key, token in (("bos_token_id", bos), ("eos_token_id", eos)):
        if token is not None:
            fields[key] = token
    return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"


def _named_scaling(config: ModelConfig) -> dict[str, str | float | int]:
    if config.rope_scale == 1.0:
        for known in _KNOWN:
            factors = llama3_factors(known, config.rope_base, config.head_dim)
            if np.allclose(factors, config.rope_factors, rtol=1e-4, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": known.factor,
                    "low_freq_factor": known.low,
                    "high_freq_factor": known.high,
                    "original_max_position_embeddings": known.context,
                }
    raise unsupported("its positions are scaled by factors that config.json has no words for")
