"""How activations cross from rank to rank: in f32, exact, or in f16 or bf16, half the bytes.  Pure.

A placement says which (``Placement.activations``), so all hops of a session use one type, and so do
those after a failover.  Rows are rounded to the nearest number, ties to even, each for itself:
neither guesses, nor batches, nor the cut of a prompt change a bit.  Only the *places* where a
session crosses matter, which :func:`crossed` writes into its exactness classes.

A number that the type cannot hold is an error (``activation_overflow``): saturated it would give
plausible, wrong text.  The head's embeddings are not checked; what comes of one that is out of
range is checked behind the first rank, like all else.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from pyagent_node.base.errors import LimitExceeded, Unsupported
from pyagent_node.base.types import ACTIVATIONS, EXACT_ACTIVATIONS
from pyagent_node.inference.backend import Activations
from pyagent_node.inference.backend_names import MAX_CLASS
from pyagent_node.native import blake3

_F32, _F16, _U16, _U32 = (np.dtype(name) for name in ("<f4", "<f2", "<u2", "<u4"))
_PREFIX: Final = "activations/"
_HASHED: Final = 16
"""Hexadecimal digits for the places, where they are too many to be named."""

Buffer = bytes | bytearray | memoryview


class _Kind(NamedTuple):
    bytes: int
    limit: float
    """From here on a number becomes an infinity."""


_KINDS: Final = {
    "f32": _Kind(4, float("inf")),
    "f16": _Kind(2, 65520.0),
    "bf16": _Kind(2, float(np.uint32(0x7F7F8000).view(np.float32))),
}


def number_bytes(kind: str) -> int:
    """Return the bytes of a number; raises :class:`Unsupported` (``unsupported_activations``)."""
    if kind not in _KINDS:
        raise unsupported(kind)
    return _KINDS[kind].bytes


def unsupported(kind: str) -> Unsupported:
    """Return the error for activations in a ``kind`` that this node does not know."""
    return Unsupported(
        f"This node cannot pass activations on as {kind[:32]!r}.",
        code="unsupported_activations",
        remedy=f"Update it, or load the model with --activations {' or '.join(ACTIVATIONS)}.",
    )


def check_fits(rows: Activations, kind: str) -> None:
    """Raise :class:`LimitExceeded` (``activation_overflow``) for what ``kind`` cannot hold.

    f32 rows are passed on as they are, whatever is in them.
    """
    limit = _KINDS[kind].limit
    if kind == EXACT_ACTIVATIONS or not rows.size:
        return
    if not (float(rows.max()) < limit and float(rows.min()) > -limit):  # not a number: neither
        raise LimitExceeded(
            f"An activation of this model is too large for {kind}, or is no number.",
            code="activation_overflow",
            remedy="Load the model with --activations bf16 or f32.",
        )


def pack_rows(rows: Activations, kind: str) -> bytes | memoryview:
    """Return the little-endian bytes of ``rows``; what does not fit becomes an infinity."""
    number_bytes(kind)
    plain = np.ascontiguousarray(rows, dtype=_F32)
    if kind == EXACT_ACTIVATIONS:
        return plain.data
    if kind == "f16":
        with np.errstate(over="ignore"):
            return plain.astype(_F16).tobytes()
    bits = plain.view(_U32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    return rounded.astype(_U16).tobytes()


def unpack_rows(data: Buffer, n: int, n_embd: int, kind: str, offset: int = 0) -> Activations:
    """Return the (n, n_embd) rows that lie at ``offset``, for f32 as a view of ``data``."""
    count = n * n_embd
    if kind == EXACT_ACTIVATIONS:
        exact: Activations = np.frombuffer(data, _F32, count, offset).reshape(n, n_embd)
        return exact
    if kind == "f16":
        halves = np.frombuffer(data, _F16, count, offset)
        return halves.astype(np.float32).reshape(n, n_embd)
    rows = np.empty((n, n_embd), _U32)
    high = np.frombuffer(data, _U16, count, offset).reshape(n, n_embd)
    np.left_shift(high, np.uint32(16), out=rows)
    found: Activations = rows.view(_F32)
    return found


def crossed(classes: tuple[str, ...], kind: str, first_layer: int) -> tuple[str, ...]:
    """Return the exactness classes of a session that crosses into ``first_layer`` in ``kind``.

    One of them names the type and all places so far: ``activations/f16/0,10,20``.  Where it would
    be too long the places are hashed.  Nothing is added for f32, which changes no bit.
    """
    if kind == EXACT_ACTIVATIONS:
        return classes
    before = next((each for each in classes if each.startswith(_PREFIX)), "")
    rest = tuple(each for each in classes if each != before)
    here = f"{before},{first_layer}" if before else f"{_PREFIX}{kind}/{first_layer}"
    if len(here) > MAX_CLASS:
        here = f"{_PREFIX}{kind}/#{blake3(here.encode()).hex()[:_HASHED]}"
    return tuple(sorted((*rest, here)))
