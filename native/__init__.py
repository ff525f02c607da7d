"""The Rust module under Python: hashing, sampling, the llama.cpp tap, the private-net cipher."""

from pyagent_node.native._native import (
    Blake3,
    TensorTap,
    XSalsa20,
    blake3,
    gumbel,
    hash_chain,
    hash_file,
    sample,
)

__all__ = [
    "Blake3",
    "TensorTap",
    "XSalsa20",
    "blake3",
    "gumbel",
    "hash_chain",
    "hash_file",
    "sample",
]
