"""Small random models, written with the ``gguf`` package's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, quants
from gguf.constants import GGMLQuantizationType

VOCAB = 320
EMBD = 128
HEADS = 4
KV_HEADS = 2
FF = 256


def tiny_model(
    path: Path,
    *,
    arch: str = "llama",
    layers: int = 4,
    tied: bool = True,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    tokens: bool = False,
    settings: Callable[[GGUFWriter], None] | None = None,
    extra_tensor: str | None = None,
    seed: int = 1,
) -> Path:
    """Write a random but runnable model; the same arguments give the same bytes."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, arch)
    writer.add_name(f"Tiny {arch}")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(EMBD)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(EMBD // HEADS)
    writer.add_vocab_size(VOCAB)
    if tokens:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"<t{i}>".encode() for i in range(VOCAB)])
        writer.add_token_scores([float(-i) for i in range(VOCAB)])
        writer.add_token_types([3 if i < 3 else 1 for i in range(VOCAB)])
        writer.add_chat_template("{{ messages }}")
    else:
        writer.add_tokenizer_model("no_vocab")
    if settings is not None:
        settings(writer)

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values / 10 + name.endswith("weight"))
            return
        values *= 1.5 / np.sqrt(shape[-1])
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCAB, EMBD)
    head = EMBD // HEADS
    for layer in range(layers):
        prefix = f"blk.{layer}"
        add(f"{prefix}.attn_norm.weight", EMBD)
        for part, rows in (("q", EMBD), ("k", KV_HEADS * head), ("v", KV_HEADS * head)):
            add(f"{prefix}.attn_{part}.weight", rows, EMBD)
            if arch == "qwen2":
                add(f"{prefix}.attn_{part}.bias", rows)
        add(f"{prefix}.attn_output.weight", EMBD, EMBD)
        add(f"{prefix}.ffn_norm.weight", EMBD)
        add(f"{prefix}.ffn_gate.weight", FF, EMBD)
        add(f"{prefix}.ffn_up.weight", FF, EMBD)
        add(f"{prefix}.ffn_down.weight", EMBD, FF)
    if extra_tensor is not None:
        add(extra_tensor, EMBD)
    add("output_norm.weight", EMBD)
    if not tied:
        add("output.weight", VOCAB, EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
