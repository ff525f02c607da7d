"""The Rust module under Python: hashing, sampling, llama.cpp tap, private-net cipher, Raft."""

from pyagent_node.native._native import (
    Blake3,
    RaftConf,
    RaftCore,
    RaftDropped,
    RaftEntry,
    RaftReady,
    RaftRefused,
    RaftStatus,
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
    "RaftConf",
    "RaftCore",
    "RaftDropped",
    "RaftEntry",
    "RaftReady",
    "RaftRefused",
    "RaftStatus",
    "TensorTap",
    "XSalsa20",
    "blake3",
    "gumbel",
    "hash_chain",
    "hash_file",
    "sample",
]
