"""Moving the cells of a torch slice: between sequences, positions, slices and backends."""

from __future__ import annotations

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import KV_ROWS, KvRange, LayerKv, Tokens
from pyagent_node.inference.stepping.cell_checks import check_tokens, note_cells
from pyagent_node.inference.stepping.pruning import kept_positions
from pyagent_node.inference.stepping.sequences import SequenceLog
from pyagent_node.inference.torch_backend.context import TorchContext
from pyagent_node.inference.torch_backend.devices import torch_errors


class TorchCells:
    """See ``stepping.backend.CellMover``."""

    def __init__(self, context: TorchContext, part: Slice) -> None:
        self._context = context
        self._part = part

    def doubt(self, seq: int) -> None:
        """Nothing: a call that fails has written behind the cells that count."""

    def export(self, log: SequenceLog, start: int, stop: int) -> KvRange:
        """Return the cells of positions ``[start, stop)``; errors as for the port."""
        cells = log.select(start, stop)
        with torch_errors("to read KV"):
            pairs = [self._read(cache, log.seq, cells) for cache in self._caches()]
        layers = tuple(
            LayerKv(self._part.first + index, key.tobytes(), value.tobytes())
            for index, (key, value) in enumerate(zip(*pairs, strict=True))
        )
        return KvRange(KV_ROWS, start, stop, layers)

    def load(self, log: SequenceLog, kv: KvRange, tokens: Tokens) -> None:
        """Append cells that came from elsewhere; errors as for the port."""
        if kv.codec != KV_ROWS:
            raise Unsupported(
                f"KV in the form {kv.codec[:64]!r} cannot be loaded here, only {KV_ROWS!r}.",
                code="kv_codec",
                remedy="Run the same version on every node.",
            )
        _check_append(log, kv.start, kv.stop)
        check_tokens(kv, tokens)
        positions = kept_positions(kv)
        count = len(positions)
        expected = list(range(self._part.first, self._part.last))
        if [layer.layer for layer in kv.layers] != expected:
            raise CorruptData(
                f"KV of the layers {self._part} was expected in order; {len(kv.layers)} came.",
                code="kv_malformed",
            )
        keys = [self._checked(layer.layer, layer.keys, count) for layer in kv.layers]
        values = [self._checked(layer.layer, layer.values, count) for layer in kv.layers]
        with torch_errors("to write KV"):
            for cache, rows in zip(self._caches(), (keys, values), strict=True):
                self._write(cache, log.seq, np.stack(rows))
        self._context.add_cells(log.seq, positions)
        note_cells(log, kv, tokens)

    def copy(self, log: SequenceLog, source: SequenceLog, start: int, stop: int) -> None:
        """Append cells of another sequence; errors as for :meth:`load`."""
        if log is source:
            raise InvalidRequest("A sequence cannot be copied to itself.", code="kv_range")
        cells = source.select(start, stop)
        _check_append(log, start, stop)
        tokens, positions = source.tokens[cells], source.positions[cells]
        at = self._context.counts[log.seq]
        with torch_errors("to copy KV"):
            index = torch.from_numpy(cells).to(self._context.device.name)
            for cache in self._caches():
                rows = cache[:, source.seq].index_select(2, index)
                cache[:, log.seq, :, at : at + len(cells)] = rows
        self._context.add_cells(log.seq, positions)
        log.append(start, tokens)

    def shift(self, log: SequenceLog, start: int, stop: int, delta: int) -> None:
        """Move positions and turn the keys; errors as for :meth:`SequenceLog.shift`."""
        moved = np.flatnonzero((log.positions >= start) & (log.positions < stop))
        log.shift(start, stop, delta)
        if not len(moved) or not delta:
            return
        context = self._context
        with torch_errors("to move KV"), torch.inference_mode():
            turns = context.rotation.turns(np.full(1, delta, np.int32))
            index = torch.from_numpy(moved).to(context.device.name)
            rows = context.keys[:, log.seq].index_select(2, index).float()
            turned = context.rotation.turn(rows, turns).half()
            context.keys[:, log.seq, :, index] = turned.to(context.device.cache)
        context.positions[log.seq, moved] += delta

    def _caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._context.keys, self._context.values

    def _read(self, cache: torch.Tensor, seq: int, cells: NDArray[np.intp]) -> NDArray[np.float16]:
        """Return rows of every layer, shape (layers, cells, heads * width)."""
        index = torch.from_numpy(cells).to(self._context.device.name)
        picked = cache[:, seq].index_select(2, index).transpose(1, 2).half()
        rows: NDArray[np.float16] = picked.reshape(len(cache), len(cells), -1).cpu().numpy()
        return rows

    def _write(self, cache: torch.Tensor, seq: int, rows: NDArray[np.float16]) -> None:
        config = self._context.config
        layers, n = rows.shape[:2]
        made = torch.from_numpy(rows).view(layers, n, config.n_head_kv, config.head_dim)
        at = self._context.counts[seq]
        cache[:, seq, :, at : at + n] = made.transpose(1, 2).to(cache.device).to(cache.dtype)

    def _checked(self, layer: int, data: bytes, count: int) -> NDArray[np.float16]:
        row = self._context.config.n_head_kv * self._context.config.head_dim
        if len(data) != count * row * 2:
            raise CorruptData(
                f"Layer {layer} has {len(data)} bytes for {count} cells of {row * 2}.",
                code="kv_malformed",
                layer=layer,
            )
        rows = np.frombuffer(data, "<f2").reshape(count, row)
        if not np.isfinite(rows).all():
            # it would stay behind and reach the next user of the sequence
            raise CorruptData(f"The KV of layer {layer} is not all finite.", code="not_finite")
        return rows


def _check_append(log: SequenceLog, start: int, stop: int) -> None:
    if not 0 <= start < stop or (log.count and log.end != start):
        raise InvalidRequest(
            f"Cells {start} to {stop} cannot follow a sequence that ends at {log.end}.",
            code="kv_range",
            seq=log.seq,
        )
    log.check_room(start, stop - start)
