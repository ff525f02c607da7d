"""Checks of cells that come from elsewhere, in the format that all backends share.  Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.inference.backend import KV_ROWS, KvRange, Tokens
from pyagent_node.inference.stepping.pruning import kept_positions
from pyagent_node.inference.stepping.sequences import SequenceLog

HalfRows = NDArray[np.float16]
"""Keys or values of one layer, shape (cells, numbers of a row)."""


def checked_rows(
    kv: KvRange, tokens: Tokens, first: int, n_layers: int, width: int
) -> list[tuple[HalfRows, HalfRows]]:
    """Return keys and values of a range, a pair a layer, as views of its bytes.

    The range must have the layers ``[first, first + n_layers)`` in order, in rows of ``width``
    numbers.  Raises :class:`Unsupported` (``kv_codec``) and :class:`CorruptData`
    (``kv_malformed``, ``not_finite``).
    """
    check_codec(kv)
    check_tokens(kv, tokens)
    count = len(kept_positions(kv))
    if [layer.layer for layer in kv.layers] != list(range(first, first + n_layers)):
        raise CorruptData(
            f"KV of the layers {first} to {first + n_layers} was expected in order;"
            f" {len(kv.layers)} came.",
            code="kv_malformed",
        )

    def rows(data: bytes, layer: int) -> HalfRows:
        if len(data) != count * width * 2:
            raise CorruptData(
                f"Layer {layer} has {len(data)} bytes for {count} cells of {width * 2}.",
                code="kv_malformed",
                layer=layer,
            )
        found: HalfRows = np.frombuffer(data, "<f2").reshape(count, width)
        if not np.isfinite(found).all():
            raise CorruptData(f"The KV of layer {layer} is not all finite.", code="not_finite")
        return found

    return [(rows(x.keys, x.layer), rows(x.values, x.layer)) for x in kv.layers]


def check_tokens(kv: KvRange, tokens: Tokens) -> None:
    """Raise :class:`CorruptData` (``kv_malformed``) unless there is a token for each position."""
    count = kv.stop - kv.start
    if tokens.shape != (max(0, count),) or tokens.dtype != np.int32:
        raise CorruptData(f"{count} cells need {count} tokens.", code="kv_malformed")


def note_cells(log: SequenceLog, kv: KvRange, tokens: Tokens) -> None:
    """Note the cells of a range behind those of a sequence, and which of them are not there."""
    before, positions = log.count, kept_positions(kv)
    log.append(kv.start, tokens)
    old = np.arange(before, dtype=np.intp)
    log.prune(np.concatenate([old, before + (positions - kv.start).astype(np.intp)]))


def check_codec(kv: KvRange) -> None:
    """Raise :class:`Unsupported` (``kv_codec``) for cells in another format."""
    if kv.codec != KV_ROWS:
        raise Unsupported(
            f"KV in the form {kv.codec[:64]!r} cannot be loaded here, only {KV_ROWS!r}.",
            code="kv_codec",
            remedy="Run the same version on every node.",
        )


def check_append(log: SequenceLog, start: int, stop: int) -> None:
    """Check that cells ``[start, stop)`` can follow a sequence.

    Raises :class:`InvalidRequest` (``kv_range``) and :class:`LimitExceeded` (``kv_full``).
    """
    if not 0 <= start < stop or (log.count and log.end != start):
        raise InvalidRequest(
            f"Cells {start} to {stop} cannot follow a sequence that ends at {log.end}.",
            code="kv_range",
            seq=log.seq,
        )
    log.check_room(start, stop - start)


def check_copy(log: SequenceLog, source: SequenceLog, start: int, stop: int) -> NDArray[np.intp]:
    """Return the indices of the cells to copy; errors as for :func:`check_append`."""
    if log is source:
        raise InvalidRequest("A sequence cannot be copied to itself.", code="kv_range")
    picked = source.select(start, stop)
    check_append(log, start, stop)
    return picked
