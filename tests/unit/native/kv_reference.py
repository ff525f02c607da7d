"""A plain decoder of lossy KV blocks, number by number, in NumPy's single precision."""

from __future__ import annotations

import math
import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

STEPS: Final = {1: (0.03, 0.03), 2: (0.35, 0.35), 3: (0.7, 0.7)}
"""Of keys and of values, in parts of the root mean square."""
FINER: Final = 8
SIDE: Final = 8
HEADER: Final = struct.Struct("<4sBBHHHfI16s")

f32 = np.float32


def table(deviation_class: int) -> list[int | None]:
    """Return the symbol of each of 2048 slots; ``None`` is the escape."""
    deviation = 2.0 ** (deviation_class / 4)
    reach = min(max(math.ceil(5 * deviation), 1), 31)

    def below(x: float) -> float:
        return math.erf(x / deviation / math.sqrt(2)) / 2

    counts = {
        s: max(1, math.floor((below(s + 0.5) - below(s - 0.5)) * 2048 + 0.5))
        for s in range(-reach, reach + 1)
    }
    counts[0] += 2047 - sum(counts.values())
    slots: list[int | None] = [s for s, count in counts.items() for _ in range(count)]
    return [*slots, None]


class Runs:
    """Reads the runs of the three streams."""

    def __init__(self, data: bytes) -> None:
        n_words, n_lows, n_escapes = struct.unpack_from("<3I", data)
        self.words = list(struct.unpack_from(f"<{n_words}H", data, 12))
        self.lows = data[12 + 2 * n_words :][:n_lows]
        self.escapes = data[12 + 2 * n_words + n_lows :]
        assert len(self.escapes) == n_escapes
        self.states = [self.words.pop(0) << 16 | self.words.pop(0) for _ in range(8)]
        self.turn = 0
        self.tables = {c: table(c) for c in range(-12, 9)}

    def symbol(self, slots: list[int | None]) -> int | None:
        state, self.turn = self.turn, (self.turn + 1) % 8
        x = self.states[state]
        slot = x % 2048
        found = slots[slot]
        first = slots.index(found)
        x = slots.count(found) * (x >> 11) + slot - first
        self.states[state] = x if x >= 1 << 16 else x << 16 | self.words.pop(0)
        return found

    def read(self, count: int, run_class: int) -> list[int]:
        low = max(0, math.ceil((run_class - 8) / 4))
        slots = self.tables[run_class - 4 * low]
        symbols = [self.symbol(slots) for _ in range(count)]
        run = []
        for symbol in symbols:
            if symbol is None:
                run.append(int.from_bytes(self.escapes[:4], "little", signed=True))
                self.escapes = self.escapes[4:]
            else:
                run.append(symbol)
        if low:
            size = -(-count * low // 8)
            bits = int.from_bytes(self.lows[:size], "little")
            self.lows = self.lows[size:]
            for i in range(count):
                run[i] = (run[i] << low) + (bits >> i * low & (1 << low) - 1) - (1 << low >> 1)
        return run


def scale(quarters: int) -> f32:
    """Return 2 ** (quarters / 4)."""
    return f32(2.0 ** (quarters // 4)) * f32(2.0 ** (quarters % 4 / 4))


def head(
    runs: Runs, step: float, sizes: list[int], kept: int, means: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the numbers of one head by place, shape (tokens, width)."""
    centre = -round(4 * math.log2(step))
    steps = [
        f32(f32(step) * f32(1 if place < kept else 1 / FINER)) * scale(size)
        for place, size in enumerate(sizes)
    ]
    width = len(means)
    numbers = np.zeros((len(sizes), width), np.int64)
    classes = runs.read(width, SIDE)
    for channel, told in enumerate(classes):
        numbers[:kept, channel] = runs.read(kept, told + centre)
    for place in range(kept, len(sizes)):
        (told,) = runs.read(1, SIDE)
        numbers[place] = runs.read(width, told + centre)
    return means + numbers.astype(np.float32) * np.array(steps, np.float32)[:, None]


def decode(block: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return keys and values before they are rounded to f16, shape (tokens, heads * width)."""
    _, level, flags, tokens, heads, width, base, length, _ = HEADER.unpack_from(block)
    payload = block[HEADER.size :]
    assert len(payload) == length
    key_step, value_step = STEPS[level]
    side = [payload[13 * i :][:13] for i in range(heads)]
    runs = Runs(payload[13 * heads :])
    keys = np.zeros((tokens, heads, width), np.float32)
    values = keys.copy()
    for h in range(heads):
        apart, size, mean_class, base_size = struct.unpack("<Qhbh", side[h])
        order = sorted(range(tokens), key=lambda token: apart >> token & 1)
        kept = tokens - apart.bit_count()
        part = f32(f32(key_step) * scale(size)) / f32(2)
        means = np.array(runs.read(width, mean_class), np.float32) * part
        keys[order, h] = head(runs, key_step, [size] * tokens, kept, means)
        sizes = [base_size + told for told in runs.read(tokens, SIDE)]
        values[order, h] = head(runs, value_step, sizes, kept, np.zeros(width, np.float32))
    assert runs.states == [1 << 16] * 8
    assert not runs.words
    assert not runs.lows
    assert not runs.escapes
    if base:
        keys = rotated(keys, base, halves=bool(flags))
    return keys.reshape(tokens, -1), values.reshape(tokens, -1)


def rotated(keys: NDArray[np.float32], base: float, *, halves: bool) -> NDArray[np.float32]:
    """Rotate row t of shape (tokens, heads, width) by position t."""
    pairs = keys.shape[2] // 2
    angles = np.arange(len(keys))[:, None] * base ** -(np.arange(pairs) / pairs)
    turn = np.exp(1j * angles)[:, None]
    axes = (
        (slice(0, pairs), slice(pairs, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
    )
    turned = (keys[..., axes[0]] + 1j * keys[..., axes[1]]) * turn
    out = np.empty_like(keys)
    out[..., axes[0]], out[..., axes[1]] = turned.real, turned.imag
    return out
