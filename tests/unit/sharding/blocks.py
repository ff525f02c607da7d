"""Blocks to store: what a block holds is a function of its name, so every answer can be checked."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pyagent_node.base.types import Digest
from pyagent_node.native import blake3
from pyagent_node.sharding.block_store import BlockStore
from pyagent_node.sharding.kv_keys import BlockKey, block_chain, cache_root

MODEL = Digest("ab" * 32)
OTHER = Digest("cd" * 32)


def chain_of(text: int, length: int, model: Digest = MODEL) -> tuple[bytes, ...]:
    """The names of a text's blocks; texts with the same ``text // 8`` share the first two."""
    tokens = [text // 8] * 128 + [text] * (64 * length)
    return block_chain(cache_root(model, ""), tokens[: 64 * length], 64 * length)


def payload_of(key: BlockKey, size: int = 0) -> bytes:
    seed = blake3(key.chain + bytes([key.layer]) + key.model.encode())
    size = size or random.Random(seed).randrange(1, 3000)
    return random.Random(seed + b"content").randbytes(size)


def put_chain(
    store: BlockStore,
    chain: Sequence[bytes],
    layers: range = range(2),
    *,
    model: Digest = MODEL,
    size: int = 0,
    cost: float = 1.0,
) -> list[BlockKey]:
    """Put all layers of all blocks of a chain; returns the keys that found room."""
    kept = []
    for number, link in enumerate(chain):
        for layer in layers:
            key = BlockKey(model, layer, link, "f16")
            parent = chain[number - 1] if number else b""
            payload = payload_of(key, size)
            if store.put(key, payload, cost, parent=parent, number=number):
                kept.append(key)
    return kept
