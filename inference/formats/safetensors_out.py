"""Writes a folder of safetensors that ``transformers`` and ``mlx-lm`` load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
import safetensors
from safetensors.numpy import save_file

from pyagent_node.base.errors import Unavailable
from pyagent_node.base.files import write_atomic
from pyagent_node.base.limits import MIB
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.formats.hf_config import write_config
from pyagent_node.inference.formats.names import hf_name, is_paired, to_halves
from pyagent_node.inference.formats.safetensors_weights import CONFIG, INDEX, SINGLE
from pyagent_node.inference.formats.weights import Array
from pyagent_node.inference.models.model_file import ModelFile

if TYPE_CHECKING:
    from pyagent_node.inference.formats.convert import Tensor

FILE_BYTES: Final = 1024 * MIB
"""Most bytes of a file: the library takes a whole one from memory."""
_PUBLIC: Final = 0o644


def write_safetensors(
    folder: Path,
    config: ModelConfig,
    tensors: Sequence[Tensor],
    vocabulary: ModelFile | None,
    *,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write ``config.json`` and the tensors, in several files when they are more than one takes.

    Raises :class:`Unsupported` for what ``config.json`` cannot say, and errors of the disk.
    """
    dtype = max((t.dtype for t in tensors if len(t.shape) > 1), key=lambda d: np.dtype(d).itemsize)
    tokens = {"bos": _token(vocabulary, "bos"), "eos": _token(vocabulary, "eos")}
    write_atomic(
        folder / CONFIG, write_config(config, dtype=np.dtype(dtype).name, **tokens), _PUBLIC
    )
    files = _files(tensors, file_bytes)
    places: dict[str, str] = {}
    for number, group in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        arrays: dict[str, Array] = {}
        for tensor in group:
            rows = tensor.read()
            if is_paired(config, tensor.name):
                rows = to_halves(rows, config.head_dim)
            arrays[hf_name(tensor.name)] = rows
        try:
            save_file(arrays, folder / name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise Unavailable(
                f"Writing {name} failed: {str(error)[:200]}.", code="disk_failed"
            ) from None
        places |= dict.fromkeys(arrays, name)
    if len(files) > 1:
        size = sum(_nbytes(tensor) for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_atomic(folder / INDEX, msgspec.json.format(msgspec.json.encode(index)), _PUBLIC)


def _nbytes(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


def _files(tensors: Sequence[Tensor], file_bytes: int) -> list[list[Tensor]]:
    """Cut the tensors, in order, into files of at most so many bytes, or of one tensor."""
    files: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not files or size + _nbytes(tensor) > file_bytes:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += _nbytes(tensor)
    return files


def _token(vocabulary: ModelFile | None, name: str) -> int | None:
    if vocabulary is None:
        return None
    value = vocabulary.header.integer(f"tokenizer.ggml.{name}_token_id", -1)
    return value if value >= 0 else None
