"""Weights in a GGUF file, dequantised by the functions of the ``gguf`` library."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from pyagent_node.base.files import mapped
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import ModelConfig, end_shapes, shapes_of
from pyagent_node.inference.formats.gguf_config import gguf_config, held_slice
from pyagent_node.inference.formats.weights import (
    Array,
    Float,
    as_dtype,
    tensor_malformed,
    tensor_type,
)
from pyagent_node.inference.models.gguf_header import GgufHeader, read_header
from pyagent_node.inference.models.gguf_types import GgufTensor

_PIECE_BYTES: Final = 8 * MIB
"""About how many bytes are dequantised at a time: the steps on the way take a multiple of it."""


class GgufWeights:
    """A whole model or a slice of one; see the port."""

    def __init__(self, path: Path) -> None:
        """Open ``path``; raises what :func:`open_weights` says."""
        self.path = path
        self.header: GgufHeader = read_header(path)
        with mapped(path, "reading"), path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        try:
            self._held = held_slice(self.header)
            self._config = gguf_config(self.header, self._bytes)
        except BaseException:
            self.close()
            raise
        self._shapes = end_shapes(self._config) | shapes_of(
            self._config, range(self._config.n_layers)
        )

    @property
    def config(self) -> ModelConfig:
        """The numbers of the model."""
        return self._config

    @property
    def held(self) -> Slice:
        """Which layers are here."""
        return self._held

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in the file."""
        return sum(tensor.nbytes for tensor in self.header.tensors.values())

    def _bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        assert self._data is not None, "the file is open"
        return self._data[tensor.data.start : tensor.data.stop]

    def tensor(self, name: str, dtype: Float) -> Array:
        """Return one tensor; see the port."""
        shape = self._shapes.get(name)
        tensor = self.header.tensors.get(name)
        if shape is None or tensor is None:
            raise tensor_malformed(name, "it is missing")
        if tensor.shape[::-1] != shape:
            raise tensor_malformed(name, f"its shape is {tensor.shape[::-1]}, not {shape}")
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        row_bytes = shape[-1] // block * block_bytes
        rows = self._bytes(tensor).reshape(-1, row_bytes)
        out = np.empty((len(rows), shape[-1]), dtype)
        step = max(1, _PIECE_BYTES // (4 * shape[-1]))
        for at in range(0, len(rows), step):
            try:
                with np.errstate(all="ignore"):  # what is not finite is refused below
                    piece = quants.dequantize(rows[at : at + step], tensor.type)
            except NotImplementedError:
                raise tensor_type(name, tensor.type.name) from None
            out[at : at + step] = as_dtype(piece, dtype, name)
        return out.reshape(shape)

    def close(self) -> None:
        """Release the file; idempotent."""
        self._data = None
        try:
            self._map.close()
        except BufferError:
            # an exception that is on its way still holds a view: the map goes with that
            return
