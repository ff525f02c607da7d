"""A BERT of a few thousand weights as a GGUF file: an encoder for tests."""

from pathlib import Path

import gguf
import numpy as np

WIDTH, LAYERS, HEADS = 64, 2, 4
WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "bell", "tower", "rings", "query", "in")
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", ".", "?")


def write_tiny_bert(path: Path, *, pooling: int = 1, seed: int = 1) -> Path:
    """Write the file; ``pooling`` as in GGUF: 0 none, 1 mean, 2 first token, 4 of a ranker."""
    generator = np.random.default_rng(seed)
    tokens = [*MARKS[:5], *(f"\u2581{word}" for word in (*MARKS[5:], *WORDS)), "s", "ing"]
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", pooling)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 5 + [1] * (len(tokens) - 5))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        numbers = generator.standard_normal(shape) * 0.3 + around
        writer.add_tensor(name, numbers.astype(np.float32))

    def norm(name: str) -> None:
        add(f"{name}.weight", WIDTH, around=1.0)
        add(f"{name}.bias", WIDTH)

    def dense(name: str, into: int, out: int) -> None:
        add(f"{name}.weight", out, into)
        add(f"{name}.bias", out)

    add("token_embd.weight", len(tokens), WIDTH)
    add("position_embd.weight", 128, WIDTH)
    add("token_types.weight", 2, WIDTH)
    norm("token_embd_norm")
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            dense(f"blk.{layer}.{part}", WIDTH, WIDTH)
        norm(f"blk.{layer}.attn_output_norm")
        dense(f"blk.{layer}.ffn_up", WIDTH, 2 * WIDTH)
        dense(f"blk.{layer}.ffn_down", 2 * WIDTH, WIDTH)
        norm(f"blk.{layer}.layer_output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
