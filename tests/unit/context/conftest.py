"""What tests of contexts share: a small encoder, and documents made with it."""

import hashlib
from collections.abc import Sequence

import numpy as np

from pyagent_node.sharding.context.embedder import Vectors

DIMENSIONS = 64


class WordEmbedder:
    """An encoder without a model: a text's vector is the sum of those of its words."""

    identity = "words/test/64"
    dimensions = DIMENSIONS

    def __init__(self) -> None:
        self.embedded = 0

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.embedded += len(texts)
        return np.stack([self._one(text) for text in texts])

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def _one(self, text: str) -> np.ndarray:
        total = np.full(DIMENSIONS, 1e-3, np.float32)
        for word in text.casefold().split():
            seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
            generator = np.random.Generator(np.random.PCG64(seed))
            total += generator.standard_normal(DIMENSIONS).astype(np.float32)
        return (total / np.linalg.norm(total)).astype(np.float32)
