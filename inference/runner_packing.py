"""Arrays of runner messages as tails, and back; see ``runner_protocol``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.backend import (
    CellAttention,
    KvRange,
    LayerKv,
    StepInput,
    StepOutput,
    Tokens,
)
from pyagent_node.inference.runner_protocol import LayerHeader, OutputHeader, StepHeader, Tail

_I32: Final = np.dtype("<i4")
_F32: Final = np.dtype("<f4")


class _Cutter:
    """Cuts a tail into arrays; refuses to pass its end or to leave something over."""

    def __init__(self, tail: Tail) -> None:
        self._data = memoryview(tail)
        self._at = 0

    def take(self, nbytes: int) -> memoryview:
        if not 0 <= nbytes <= len(self._data) - self._at:
            raise _wrong_length()
        start, self._at = self._at, self._at + nbytes
        return self._data[start : self._at]

    def ints(self, n: int) -> Tokens:
        return np.frombuffer(self.take(n * _I32.itemsize), _I32)

    def floats(self, n: int) -> NDArray[np.float32]:
        return np.frombuffer(self.take(n * _F32.itemsize), _F32)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _wrong_length()


def _wrong_length() -> CorruptData:
    return CorruptData("A runner message and its tail differ in length.", code="malformed_message")


def pack_steps(steps: Sequence[StepInput]) -> tuple[tuple[StepHeader, ...], bytes]:
    """Return the headers and the tail of a :class:`Decode`."""
    headers = tuple(
        StepHeader(
            s.seq,
            s.position,
            len(s.tokens),
            s.activations is not None,
            s.sample,
            s.drafts,
            s.parents,
        )
        for s in steps
    )
    pieces = [np.ascontiguousarray(s.tokens, _I32).data for s in steps]
    pieces += [
        np.ascontiguousarray(s.activations, _F32).data.cast("B")
        for s in steps
        if s.activations is not None
    ]
    return headers, b"".join(pieces)


def unpack_steps(headers: Sequence[StepHeader], tail: Tail, n_embd: int) -> list[StepInput]:
    """Return the steps; arrays are views of the tail.

    Raises :class:`CorruptData` (``malformed_message``) when the tail does not fit.
    """
    cut = _Cutter(tail)
    tokens = [cut.ints(h.n) for h in headers]
    steps = []
    for header, ids in zip(headers, tokens, strict=True):
        rows = None
        if header.activations:
            raw = cut.take(header.n * n_embd * _F32.itemsize)
            rows = np.frombuffer(raw, _F32).reshape(header.n, n_embd)
        steps.append(
            StepInput(
                header.seq,
                header.position,
                ids,
                rows,
                header.sample,
                header.drafts,
                header.parents,
            )
        )
    cut.finish()
    return steps


def pack_outputs(outputs: Sequence[StepOutput]) -> tuple[tuple[OutputHeader, ...], bytes]:
    """Return the headers and the tail of a :class:`Decoded`."""
    headers = tuple(
        OutputHeader(0 if o.activations is None else len(o.activations), o.sampled) for o in outputs
    )
    arrays = [o.activations for o in outputs if o.activations is not None]
    return headers, b"".join([np.ascontiguousarray(a, _F32).data.cast("B") for a in arrays])


def unpack_outputs(headers: Sequence[OutputHeader], tail: Tail, n_embd: int) -> list[StepOutput]:
    """Return the outputs; arrays are views of the tail.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    outputs = []
    for header in headers:
        rows = None
        if header.rows:
            raw = cut.take(header.rows * n_embd * _F32.itemsize)
            rows = np.frombuffer(raw, _F32).reshape(header.rows, n_embd)
        outputs.append(StepOutput(rows, header.sampled))
    cut.finish()
    return outputs


class PackedKv(NamedTuple):
    """KV without its bytes, and its bytes."""

    layers: tuple[LayerHeader, ...]
    tail: bytes


def pack_kv(
    kv: KvRange, tokens: Tokens | None = None, *, start: int | None = None, stop: int | None = None
) -> PackedKv:
    """Return the layer headers and the tail for KV, with ``tokens`` in front if there are any.

    With ``start`` and ``stop`` only for those positions of it, which ``tokens`` are for.  The bytes
    are copied once.  Raises :class:`CorruptData` (``kv_malformed``) for rows that cannot be cut.
    """
    first, last = kv.start if start is None else start, kv.stop if stop is None else stop
    count = kv.stop - kv.start

    def cut(data: bytes) -> memoryview:
        if (first, last) == (kv.start, kv.stop):
            return memoryview(data)  # whoever gets it looks at its lengths
        size, odd = divmod(len(data), count)
        if odd:
            raise CorruptData(
                f"KV of {count} tokens has a row of broken length.", code="kv_malformed"
            )
        return memoryview(data)[(first - kv.start) * size : (last - kv.start) * size]

    rows = [(layer.layer, cut(layer.keys), cut(layer.values)) for layer in kv.layers]
    pieces = [] if tokens is None else [np.ascontiguousarray(tokens, _I32).data.cast("B")]
    for _, keys, values in rows:
        pieces += [keys, values]
    headers = tuple(LayerHeader(layer, len(keys), len(values)) for layer, keys, values in rows)
    return PackedKv(headers, b"".join(pieces))


def unpack_kv(
    codec: str,
    start: int,
    stop: int,
    layers: Sequence[LayerHeader],
    tail: Tail,
    *,
    with_tokens: bool,
) -> tuple[KvRange, Tokens]:
    """Return KV and its tokens (none unless ``with_tokens``).

    Errors as for :func:`unpack_steps`.
    """
    cut = _Cutter(tail)
    tokens = cut.ints(max(0, stop - start) if with_tokens else 0)
    parts = tuple(
        LayerKv(x.layer, bytes(cut.take(x.keys)), bytes(cut.take(x.values))) for x in layers
    )
    cut.finish()
    return KvRange(codec, start, stop, parts), tokens


def pack_attention(attention: CellAttention) -> bytes:
    """Return the tail of an :class:`AttentionReport`."""
    pieces = [
        np.ascontiguousarray(array, kind).tobytes()
        for array, kind in (
            (attention.positions, _I32),
            (attention.seen, _I32),
            (attention.peak, _F32),
            (attention.entropy, _F32),
            (attention.mass, _F32),
        )
    ]
    return b"".join(pieces)


def unpack_attention(n: int, layers: int, rows: int, tail: Tail) -> CellAttention:
    """Return what was measured; arrays are views of the tail.

    Errors as for :func:`unpack_steps`.
    """
    cut = _Cutter(tail)
    positions, seen = cut.ints(n), cut.ints(n)
    peak, entropy = cut.floats(n), cut.floats(layers)
    mass = cut.floats(layers * n).reshape(layers, n)
    cut.finish()
    return CellAttention(positions, mass, peak, seen, entropy, rows)


def pack_pieces(pieces: Sequence[bytes]) -> bytes:
    """Return the tail of a :class:`PieceTable`."""
    lengths = np.array([len(piece) for piece in pieces], _I32)
    return lengths.tobytes() + b"".join(pieces)


def unpack_pieces(n: int, tail: Tail) -> list[bytes]:
    """Return the bytes of each token.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    lengths = cut.ints(n)
    pieces = [bytes(cut.take(int(length))) for length in lengths]
    cut.finish()
    return pieces


def unpack_tokens(tail: Tail) -> Tokens:
    """Return the tokens of a tail that holds nothing else.  Errors as for :func:`unpack_steps`."""
    cut = _Cutter(tail)
    tokens = cut.ints(memoryview(tail).nbytes // _I32.itemsize)
    cut.finish()
    return tokens
