"""Weights in a folder of safetensors, as ``transformers`` and ``mlx-lm`` keep a model.

The library checks each file when it is opened.  Tensors are then read from the mapped file at the
place that its header names, so that a slice touches its own tensors' bytes only; the library's own
arrays know no bfloat16.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import safetensors
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import mapped, read_limited
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import ModelConfig, end_shapes, shapes_of
from pyagent_node.inference.formats.hf_config import read_config
from pyagent_node.inference.formats.names import hf_name, is_paired, to_pairs
from pyagent_node.inference.formats.weights import (
    Array,
    Float,
    as_dtype,
    tensor_malformed,
    tensor_type,
)

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
MAX_JSON: Final = 64 * MIB
MAX_FILES: Final = 1024
_ITEM_BYTES: Final = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _File:
    """One mapped file: where each tensor lies."""

    def __init__(self, path: Path) -> None:
        with mapped(path, "reading"):
            try:
                with safetensors.safe_open(path, framework="np"):
                    pass
            except safetensors.SafetensorError as error:
                raise _malformed(path.name, str(error)) from None
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        (length,) = struct.unpack_from("<Q", self._map)
        self._start = 8 + length
        try:
            header = msgspec.json.decode(self._map[8 : self._start], type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            self.entries = {
                name: msgspec.json.decode(raw, type=_Entry) for name, raw in header.items()
            }
        except msgspec.MsgspecError as error:
            raise _malformed(path.name, str(error)) from None
        self._data: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)

    def read(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a tensor."""
        assert self._data is not None, "the file is open"
        first, last = self.entries[name].data_offsets
        return self._data[self._start + first : self._start + last]

    def close(self) -> None:
        self._data = None
        try:
            self._map.close()
        except BufferError:
            return  # an exception that is on its way still holds a view: the map goes with that


class SafetensorsWeights:
    """A whole model in ``config.json`` and safetensors; see the port."""

    def __init__(self, path: Path) -> None:
        """Open the folder ``path``; raises what :func:`open_weights` says."""
        self.path = path
        data = read_limited(path / CONFIG, MAX_JSON)
        self._config = read_config(data, name=path.name)
        self._files: list[_File] = []
        self._places: dict[str, _File] = {}
        try:
            for name in _file_names(path):
                file = _File(path / name)
                self._files.append(file)
                self._places |= dict.fromkeys(file.entries, file)
        except BaseException:
            self.close()
            raise
        if hf_name("output.weight") not in self._places and not self._config.tied:
            # a head that is left out of the file is the embedding table, whatever the settings say
            self._config = msgspec.structs.replace(self._config, tied=True)
        self._shapes = end_shapes(self._config) | shapes_of(
            self._config, range(self._config.n_layers)
        )

    @property
    def config(self) -> ModelConfig:
        """The numbers of the model."""
        return self._config

    @property
    def held(self) -> Slice:
        """All layers."""
        return Slice(0, self._config.n_layers, head=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in the folder."""
        entries = [entry for file in self._files for entry in file.entries.values()]
        return sum(entry.data_offsets[1] - entry.data_offsets[0] for entry in entries)

    def tensor(self, name: str, dtype: Float) -> Array:
        """Return one tensor; see the port."""
        shape = self._shapes.get(name)
        file = self._places.get(hf_name(name)) if shape is not None else None
        if shape is None or file is None:
            raise tensor_malformed(name, "it is missing")
        entry = file.entries[hf_name(name)]
        if entry.shape != shape:
            raise tensor_malformed(name, f"its shape is {entry.shape}, not {shape}")
        if entry.dtype not in _ITEM_BYTES:
            raise tensor_type(name, entry.dtype)
        values = _floats(file.read(hf_name(name)), entry.dtype)
        made = np.array(as_dtype(values, dtype, name)).reshape(shape)
        if is_paired(self._config, name):
            return to_pairs(made, self._config.head_dim)
        return made

    def close(self) -> None:
        """Release the files; idempotent."""
        for file in self._files:
            file.close()


def _file_names(path: Path) -> list[str]:
    """Return the files of a folder; an index may name files in the folder only."""
    if not (path / INDEX).is_file():
        return [SINGLE]
    try:
        index = msgspec.json.decode(read_limited(path / INDEX, MAX_JSON), type=_Index)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _malformed(INDEX, str(error)) from None
    names = sorted(set(index.weight_map.values()))
    if not 0 < len(names) <= MAX_FILES or any(Path(name).name != name for name in names):
        raise _malformed(INDEX, f"it names {len(names)} files, or one outside the folder")
    return names


def _floats(data: NDArray[np.uint8], kind: str) -> Array:
    if kind == "BF16":
        # the upper half of a float32
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "F64":
        with np.errstate(over="ignore"):
            return data.view("<f8").astype(np.float32)
    return data.view("<f2") if kind == "F16" else data.view("<f4")


def _malformed(name: str, what: str) -> CorruptData:
    return CorruptData(
        f"The file {name} is malformed: {what[:200]}.",
        code="safetensors_malformed",
        remedy="Get the model again, or convert it again.",
    )
