"""Which models may be cut into slices, and which numbers describe them.

A wrong cut gives plausible, wrong text.  So only architectures whose slices were checked against
the whole model are cut, and only when every setting and tensor in the file is one that is known to
survive renumbering; anything else is refused by name (it can still run unsliced).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
from gguf.constants import GGUFValueType

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.models.gguf_types import GgufHeader

MAX_LAYERS: Final = 512
"""Most layers (llama.cpp's own limit)."""
MAX_EMBD: Final = 1 << 20
MAX_VOCAB: Final = 1 << 24

SLICEABLE: Final = ("llama", "qwen2")
"""Architectures whose slices were checked, bit for bit, against the whole model."""

_SETTINGS: Final = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "vocab_size",
    }
)
"""Settings (without the architecture's prefix) that mean the same in a slice as in the whole."""

PER_LAYER: Final = frozenset(
    {"attention.head_count", "attention.head_count_kv", "feed_forward_length"}
)
"""Settings that may be an array with one number a layer."""

GLOBAL_TENSORS: Final = frozenset({"rope_freqs.weight"})
"""Tensors outside the layers that every slice needs."""
HEAD_TENSORS: Final = frozenset({"output.weight", "output.bias", "output_norm.weight"})
"""Tensors that only the slice with the output head needs."""
EMBEDDING: Final = "token_embd.weight"

_LAYER_TENSOR: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\.(.+)", re.ASCII)
_LAYER_SUFFIXES: Final = frozenset(
    f"{part}.{kind}"
    for kind in ("weight", "bias")
    for part in (
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_qkv",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_down",
        "ffn_up",
    )
)


class ModelShape(msgspec.Struct, frozen=True):
    """The numbers of a model that the rest of the node needs.

    ``n_head_kv`` and ``n_ff`` are those of the first layer; ``head_dim`` is the width of one head.
    """

    architecture: str
    name: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    tied: bool


def model_shape(header: GgufHeader) -> ModelShape:
    """Read the shape of a language model and check its numbers against each other.

    Raises :class:`CorruptData` (``gguf_malformed``) for missing or impossible numbers and
    :class:`Unsupported` (``split_model``) for one part of a model in several files.
    """
    arch = header.architecture
    if header.integer("split.count", 1) > 1:
        raise Unsupported(
            "The GGUF file is one part of several.",
            code="split_model",
            remedy="Join the parts with llama-gguf-split --merge.",
        )
    n_layers = _bounded(header, f"{arch}.block_count", 1, MAX_LAYERS)
    n_embd = _bounded(header, f"{arch}.embedding_length", 1, MAX_EMBD)
    n_ctx = _bounded(header, f"{arch}.context_length", 1, 2**31 - 1)
    n_head = _first_layer(header, f"{arch}.attention.head_count", 0, n_layers)
    n_head_kv = _first_layer(header, f"{arch}.attention.head_count_kv", n_head, n_layers)
    n_ff = _first_layer(header, f"{arch}.feed_forward_length", 0, n_layers)
    head_dim = header.integer(f"{arch}.attention.key_length", n_embd // max(1, n_head))
    if min(n_head, n_head_kv, n_ff) < 0 or not 0 < head_dim <= MAX_EMBD:
        raise _impossible(f"{n_head} heads of width {head_dim}")
    embedding = header.tensor(EMBEDDING)
    if len(embedding.shape) != 2 or embedding.shape[0] != n_embd:
        raise _impossible(f"an embedding table of shape {embedding.shape} for width {n_embd}")
    n_vocab = embedding.shape[1]
    if not 1 <= n_vocab <= MAX_VOCAB:
        raise _impossible(f"a vocabulary of {n_vocab}")
    return ModelShape(
        architecture=arch,
        name=_display_name(header),
        n_layers=n_layers,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_ctx_train=n_ctx,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_ff=n_ff,
        tied="output.weight" not in header.tensors,
    )


def layer_of(tensor: str) -> tuple[int, str] | None:
    """Return the layer of a tensor and the rest of its name, or ``None`` outside the layers."""
    match = _LAYER_TENSOR.fullmatch(tensor)
    return (int(match[1]), match[2]) if match else None


def check_sliceable(header: GgufHeader) -> ModelShape:
    """Check that this model may be cut between any two layers.

    Raises :class:`Unsupported` (``unsupported_architecture``) naming what stands against it.
    """
    arch = header.text("general.architecture")
    if arch not in SLICEABLE:
        raise _unsliceable(arch, "the architecture was not checked")
    shape = model_shape(header)
    prefix = f"{arch}."
    for key, field in header.fields.items():
        if not key.startswith(prefix):
            continue
        setting = key.removeprefix(prefix)
        if setting not in _SETTINGS:
            raise _unsliceable(arch, f"the setting {key[:80]!r} is not known")
        if field.type is GGUFValueType.ARRAY and (
            setting not in PER_LAYER
            or not isinstance(field.value, tuple)
            or len(field.value) != shape.n_layers
            or len(set(field.value)) != 1
        ):
            raise _unsliceable(arch, f"the setting {key[:80]!r} differs between layers")
    if shape.n_head < 1 or shape.n_head_kv < 1 or shape.n_head % shape.n_head_kv:
        raise _impossible(f"{shape.n_head} attention heads over {shape.n_head_kv} for keys")
    if header.integer(f"{arch}.expert_count", 0):
        raise _unsliceable(arch, "it is a mixture of experts")
    if any(key.startswith("general.tensor_extra") for key in header.fields):
        raise _unsliceable(arch, "the file sets the precision of single tensors")
    _check_tensors(header, shape)
    return shape


def plain_attention(header: GgufHeader) -> ModelShape | None:
    """Return the shape of a model, or slice, whose attention is the plain one; ``None`` otherwise.

    That is: over all cells, the same heads in every layer, scores scaled by one over the square
    root of a head's width and nothing else.
    """
    arch = header.architecture
    if arch not in SLICEABLE:
        return None
    for key, field in header.fields.items():
        setting = key.removeprefix(f"{arch}.")
        if setting != key and setting not in _SETTINGS:
            return None
        if isinstance(field.value, tuple) and setting in PER_LAYER and len(set(field.value)) != 1:
            return None
    shape = model_shape(header)
    fits = shape.n_head > 0 < shape.n_head_kv and shape.n_head % shape.n_head_kv == 0
    return shape if fits else None


def check_slice(part: Slice, n_layers: int) -> None:
    """Check a slice against the number of layers.

    Raises :class:`InvalidRequest` (``bad_slice``).
    """
    if not 0 <= part.first < part.last <= n_layers or (part.head and part.last != n_layers):
        raise InvalidRequest(
            f"The slice {part} does not fit a model of {n_layers} layers: it needs"
            " 0 <= first < last, and the output head goes with the last layer.",
            code="bad_slice",
        )


def is_whole(part: Slice, n_layers: int) -> bool:
    """Whether the slice is the whole model, which is served from the original file."""
    return part == Slice(0, n_layers, True)


def _check_tensors(header: GgufHeader, shape: ModelShape) -> None:
    arch = shape.architecture
    suffixes: list[set[str]] = [set() for _ in range(shape.n_layers)]
    for name in header.tensors:
        layer = layer_of(name)
        if layer is None:
            if name != EMBEDDING and name not in GLOBAL_TENSORS | HEAD_TENSORS:
                raise _unsliceable(arch, f"the tensor {name!r} is not known")
            continue
        index, suffix = layer
        if index >= shape.n_layers:
            raise _impossible(f"the tensor {name!r} in a model of {shape.n_layers} layers")
        if suffix not in _LAYER_SUFFIXES:
            raise _unsliceable(arch, f"the tensor {name!r} is not known")
        suffixes[index].add(suffix)
    for index, found in enumerate(suffixes):
        if found != suffixes[0] or not found:
            raise _unsliceable(arch, f"layer {index} has other tensors than layer 0")
    header.tensor("output_norm.weight")


def _display_name(header: GgufHeader) -> str:
    value = header.fields.get("general.name")
    raw = value.value if value is not None else None
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else header.architecture
    return "".join(c for c in text if c.isprintable())[:128]


def _bounded(header: GgufHeader, key: str, low: int, high: int) -> int:
    value = header.integer(key)
    if not low <= value <= high:
        raise _impossible(f"{key} = {value}, not {low} to {high}")
    return value


def _first_layer(header: GgufHeader, key: str, default: int | None, n_layers: int) -> int:
    field = header.fields.get(key)
    if field is not None and isinstance(field.value, tuple):
        first = field.value[0] if len(field.value) == n_layers else None
        if isinstance(first, bool) or not isinstance(first, int):
            raise _impossible(f"{key} with {len(field.value)} entries for {n_layers} layers")
        return first
    return header.integer(key, default)


def _impossible(what: str) -> CorruptData:
    return CorruptData(
        f"The GGUF file is malformed: {what}.",
        code="gguf_malformed",
        remedy="Get the model file again, or convert it again.",
    )


def _unsliceable(arch: str, why: str) -> Unsupported:
    return Unsupported(
        f"A model of architecture {arch[:64]!r} cannot be split over nodes: {why}.",
        code="unsupported_architecture",
        remedy=f"Run it whole on one node, or use one of: {', '.join(SLICEABLE)}.",
        architecture=arch[:64],
    )
