"""Plain Python versions of every function of the native module, for the tests.

Written from the papers and from the module's documentation, not from its code; slow and short.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFFFFFF


# BLAKE3: O'Connor, Aumasson, Neves, Wilcox-O'Hearn, "BLAKE3: one function, fast everywhere", 2020.

_IV = (
    *(0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A),
    *(0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19),
)
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_START, _END, _PARENT, _ROOT = 1, 2, 4, 8
_QUARTERS = (
    *((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)),
    *((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)),
)


def _rotate_right(word: int, bits: int) -> int:
    return (word >> bits) | (word << (32 - bits)) & MASK


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def _bytes(words: Iterable[int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _compress(chain: list[int], block: bytes, counter: int, flags: int) -> list[int]:
    m = _words(block.ljust(64, b"\0"))
    v = [*chain, *_IV[:4], counter & MASK, counter >> 32, len(block), flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(_QUARTERS):
            for word, first, second in ((m[2 * i], 16, 12), (m[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + word) & MASK
                v[d] = _rotate_right(v[d] ^ v[a], first)
                v[c] = (v[c] + v[d]) & MASK
                v[b] = _rotate_right(v[b] ^ v[c], second)
        m = [m[i] for i in _PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def blake3(data: bytes) -> bytes:
    """BLAKE3 in its plain mode, 32 bytes of output."""

    def node(data: bytes, first_chunk: int, root: int) -> list[int]:
        if len(data) <= 1024:
            blocks = [data[i : i + 64] for i in range(0, len(data), 64)] or [b""]
            chain = list(_IV)
            for i, block in enumerate(blocks):
                last = i == len(blocks) - 1
                flags = (_START if i == 0 else 0) | (_END | root if last else 0)
                chain = _compress(chain, block, first_chunk, flags)
            return chain
        chunks = -(-len(data) // 1024)
        left = 1 << (chunks - 1).bit_length() - 1
        children = node(data[: left * 1024], first_chunk, 0) + node(
            data[left * 1024 :], first_chunk + left, 0
        )
        return _compress(list(_IV), _bytes(children), 0, _PARENT | root)

    return _bytes(node(data, 0, _ROOT))


def hash_chain(parent: bytes, tokens: NDArray[np.int32], block: int) -> bytes:
    """Digest after digest, each over the one before it and a block of tokens."""
    digests = []
    for start in range(0, len(tokens) - block + 1, block):
        body = b"".join(
            int(token).to_bytes(4, "little", signed=True) for token in tokens[start : start + block]
        )
        parent = blake3(parent + body)
        digests.append(parent)
    return b"".join(digests)


# XSalsa20: Bernstein, "Extending the Salsa20 nonce", 2011.


def _rotate_left(word: int, bits: int) -> int:
    return (word << bits) & MASK | word >> (32 - bits)


_SALSA_QUARTERS = (
    *((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11)),
    *((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14)),
)


def _salsa_input(key: bytes, middle: bytes) -> list[int]:
    k, m = _words(key), _words(middle)
    s = _words(b"expand 32-byte k")
    return [s[0], *k[:4], s[1], *m, s[2], *k[4:], s[3]]


def _salsa_rounds(words: list[int]) -> list[int]:
    x = list(words)
    for _ in range(10):
        for a, b, c, d in _SALSA_QUARTERS:
            x[b] ^= _rotate_left((x[a] + x[d]) & MASK, 7)
            x[c] ^= _rotate_left((x[b] + x[a]) & MASK, 9)
            x[d] ^= _rotate_left((x[c] + x[b]) & MASK, 13)
            x[a] ^= _rotate_left((x[d] + x[c]) & MASK, 18)
    return x


def xsalsa20(key: bytes, nonce: bytes, data: bytes) -> bytes:
    """The data with the key stream of ``key`` and ``nonce`` added, from its start."""
    z = _salsa_rounds(_salsa_input(key, nonce[:16]))
    subkey = _bytes(z[i] for i in (0, 5, 10, 15, 6, 7, 8, 9))
    out = bytearray()
    for counter in range(-(-len(data) // 64)):
        words = _salsa_input(subkey, nonce[16:] + counter.to_bytes(8, "little"))
        stream = _bytes((a + b) & MASK for a, b in zip(words, _salsa_rounds(words), strict=True))
        part = data[64 * counter : 64 * counter + 64]
        out += bytes(a ^ b for a, b in zip(part, stream, strict=False))
    return bytes(out)


# Noise and sampling, from the docstrings of ``pyagent_node.native``.


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def gumbel(seed: int, position: int, token: int) -> float:
    """The noise of one token at a position."""
    counter = (token // 2, position & MASK, position >> 32, 0)
    words = philox(counter, (seed & MASK, seed >> 32))
    high, low = words[:2] if token % 2 == 0 else words[2:]
    bits = (high << 32 | low) >> 12
    return -math.log(-math.log((bits + 0.5) / 2**52))


def kept(
    logits: NDArray[np.float32],
    history: NDArray[np.int32],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    bias_tokens: NDArray[np.int32],
    bias_values: NDArray[np.float32],
) -> dict[int, float]:
    """The tokens that may be chosen, likeliest first, with the logarithms of their weights."""
    x = [float(value) for value in logits]
    for token, bias in zip(bias_tokens.tolist(), bias_values.tolist(), strict=True):
        x[token] += bias
    for token, count in Counter(history.tolist()).items():
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
        x[token] = x[token] - count * frequency_penalty - presence_penalty
    ranked = sorted(
        (token for token in range(len(x)) if x[token] > -math.inf), key=lambda t: (-x[t], t)
    )
    if temperature == 0:
        return {ranked[0]: 0.0}
    peak = x[ranked[0]]
    log_weight = {token: (x[token] - peak) / temperature for token in ranked}
    if top_k > 0:
        ranked = ranked[:top_k]
    if top_p < 1:
        whole = 0.0
        for token in sorted(ranked):
            whole += math.exp(log_weight[token])
        goal, total, count = top_p * whole, 0.0, 0
        while count < len(ranked) and (count == 0 or total < goal):
            total += math.exp(log_weight[ranked[count]])
            count += 1
        ranked = ranked[:count]
    return {
        token: log_weight[token]
        for token in ranked
        if min_p <= 0 or math.exp(log_weight[token]) >= min_p
    }


def sample(
    logits: NDArray[np.float32],
    history: NDArray[np.int32],
    position: int,
    *,
    seed: int,
    **shape: Any,
) -> int:
    """The chosen token."""
    score = {
        token: weight + gumbel(seed, position, token)
        for token, weight in kept(logits, history, **shape).items()
    }
    return min(score, key=lambda t: (-score[t], t))


def distribution(
    logits: NDArray[np.float32], history: NDArray[np.int32], **shape: Any
) -> dict[int, float]:
    """The exact probabilities of the tokens that may be chosen, likeliest first."""
    weights = {t: math.exp(weight) for t, weight in kept(logits, history, **shape).items()}
    whole = math.fsum(weights.values())
    return {token: weight / whole for token, weight in weights.items()}


def chi_squared_bound(freedom: int) -> float:
    """What chi-squared exceeds once in a million times (Wilson and Hilferty's quantile)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.7534 * math.sqrt(2 / (9 * freedom))) ** 3


def logprobs(logits: NDArray[np.float32]) -> list[float]:
    """The log-softmax of the logits."""
    x = [float(value) for value in logits]
    peak = max(x)
    normaliser = math.log(math.fsum(math.exp(value - peak) for value in x))
    return [value - peak - normaliser for value in x]
