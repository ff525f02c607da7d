"""The reference: llama-cpp-python on the whole file, sampled in NumPy; nothing of ours is used."""

from __future__ import annotations

import numpy as np
from llama_cpp import Llama, llama_get_logits_ith, llama_get_memory, llama_memory_clear
from numpy.typing import NDArray

_Words = NDArray[np.uint64]
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: tuple[_Words, _Words, _Words, _Words], key: tuple[int, int]) -> list[_Words]:
    """Return Philox4x32-10 of many counters (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (right >> _SHIFT) ^ c1 ^ k0,
            right & _LOW,
            (left >> _SHIFT) ^ c3 ^ k1,
            left & _LOW,
        )
        k0 = (k0 + np.uint64(0x9E3779B9)) & _LOW
        k1 = (k1 + np.uint64(0xBB67AE85)) & _LOW
    return [c0, c1, c2, c3]


def gumbel(seed: int, position: int, n: int) -> NDArray[np.float64]:
    """Return the noise of ``n`` tokens at ``position``."""
    half = (n + 1) // 2

    def constant(word: int) -> _Words:
        return np.full(half, word, np.uint64)

    counter = (
        np.arange(half, dtype=np.uint64),
        constant(position & 0xFFFFFFFF),
        constant(position >> 32),
        constant(0),
    )
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = np.empty((half, 2), np.uint64)
    bits[:, 0] = (words[0] << _SHIFT) | words[1]
    bits[:, 1] = (words[2] << _SHIFT) | words[3]
    uniform = ((bits.reshape(-1)[:n] >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return -np.log(-np.log(uniform))


class WholeModel:
    """One process, one context, one sequence, one thread."""

    def __init__(self, path: str, n_ctx: int) -> None:
        self._llama = Llama(
            path,
            n_ctx=n_ctx,
            n_batch=512,
            n_ubatch=512,
            n_threads=1,
            n_threads_batch=1,
            flash_attn=True,
            verbose=False,
        )

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``."""
        return list(self._llama.tokenize(text.encode(), add_bos=False, special=True))

    def generate(self, prompt: list[int], n: int, *, seed: int, temperature: float) -> list[int]:
        """Return ``n`` tokens after ``prompt``; end tokens do not end it."""
        llama = self._llama
        llama.n_tokens = 0
        llama_memory_clear(llama_get_memory(llama.ctx), True)
        answer: list[int] = []
        pending = prompt
        while len(answer) < n:
            llama.eval(pending)
            pointer = llama_get_logits_ith(llama.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, (llama.n_vocab(),)).astype(np.float64)
            if temperature > 0:
                noise = gumbel(seed, len(prompt) + len(answer), len(logits))
                logits = (logits - logits.max()) / temperature + noise
            token = int(np.argmax(logits))
            answer.append(token)
            pending = [token]
        return answer

    def close(self) -> None:
        """Release the model."""
        self._llama.close()
