"""The ``Weights`` port: a model's weights by layer, as arrays, whatever file they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, NotFound, Unsupported
from pyagent_node.base.files import mapped
from pyagent_node.base.types import Slice
from pyagent_node.inference.formats.config import ModelConfig, end_shapes, shapes_of

Array = NDArray[np.float16 | np.float32]
Float = type[np.float16] | type[np.float32]


class Weights(Protocol):
    """The weights in a file or folder, which stays mapped: only what is read takes memory.

    Errors of reading: :class:`InvalidRequest` (``wrong_slice``) for what is not in the file,
    :class:`CorruptData` (``tensor_malformed``, ``not_finite``), :class:`Unsupported`
    (``tensor_type``) and those of the disk.
    """

    @property
    def config(self) -> ModelConfig:
        """The numbers of the model; ``n_layers`` and ``n_vocab`` are those of this file."""
        ...

    @property
    def held(self) -> Slice:
        """Which layers of the whole model are here, and whether the output head is."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in the file."""
        ...

    def tensor(self, name: str, dtype: Float) -> Array:
        """Return one tensor, rows first, by its GGUF name in this file's numbering.

        The array is the caller's own.
        """
        ...

    def close(self) -> None:
        """Release the file; idempotent."""
        ...


def layer_weights(weights: Weights, layer: int, dtype: Float) -> dict[str, Array]:
    """Return the tensors of one layer of the whole model, named ``attn_q.weight`` and so on.

    Matrices, shape (out, in), are of ``dtype``; norms and biases always of float32.  Rows of
    queries and keys lie as llama.cpp has them (``ModelConfig.rope_halves``).
    """
    held = weights.held
    if not held.first <= layer < held.last:
        raise InvalidRequest(f"Layer {layer} is not in the file: {held}.", code="wrong_slice")
    local = layer - held.first
    prefix = f"blk.{local}."
    shapes = shapes_of(weights.config, [local])
    return {
        name.removeprefix(prefix): weights.tensor(name, dtype if len(shape) > 1 else np.float32)
        for name, shape in shapes.items()
    }


def embedding_weights(weights: Weights, dtype: Float) -> Array:
    """Return the embedding table, shape (n_vocab, n_embd); in the whole model, or a tied head."""
    return weights.tensor("token_embd.weight", dtype)


def head_weights(weights: Weights, dtype: Float) -> tuple[Array, Array]:
    """Return the norm before the output head, float32, and the head, shape (n_vocab, n_embd)."""
    if not weights.held.head:
        raise InvalidRequest(
            f"The output head is not in the file: {weights.held}.", code="wrong_slice"
        )
    name = "token_embd.weight" if weights.config.tied else "output.weight"
    return weights.tensor("output_norm.weight", np.float32), weights.tensor(name, dtype)


def check_part(weights: Weights, part: Slice) -> None:
    """Check that a file holds a slice.

    Raises :class:`InvalidRequest` (``wrong_slice``).
    """
    held = weights.held
    inside = held.first <= part.first < part.last <= held.last
    if not inside or (part.head and not (held.head and part.last == held.last)):
        raise InvalidRequest(f"The file holds layers {held}, not {part}.", code="wrong_slice")


def expected_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Return the tensors that a whole model has, in the order in which they are written."""
    config = weights.config
    return end_shapes(config) | shapes_of(config, range(config.n_layers))


def as_dtype(values: Array, dtype: Float, name: str) -> Array:
    """Return ``values`` in ``dtype``, checked.

    Raises :class:`CorruptData` (``not_finite``) for NaN and infinity, which a weight that f16
    cannot hold becomes, too.
    """
    with np.errstate(over="ignore"):
        made: Array = values.astype(dtype, copy=False)
    if not np.isfinite(made).all():
        raise CorruptData(
            f"The tensor {name!r} has numbers that are not finite in {np.dtype(dtype).name}.",
            code="not_finite",
            remedy="Get the model again; or convert with --type f32.",
        )
    return made


def tensor_type(name: str, kind: str) -> Unsupported:
    """Return the error for a tensor whose type cannot be read."""
    return Unsupported(
        f"The tensor {name!r} is of type {kind[:32]}, which cannot be read here.",
        code="tensor_type",
        remedy="Serve the model's GGUF file with llama.cpp.",
    )


def tensor_malformed(name: str, what: str) -> CorruptData:
    """Return the error for a tensor that is not as the model's numbers want it."""
    return CorruptData(
        f"The tensor {name!r} is malformed: {what}.",
        code="tensor_malformed",
        remedy="Get the model again, or convert it again.",
    )


def open_weights(path: Path) -> Weights:
    """Open a GGUF file, a slice of one, or a folder of safetensors.

    Raises the errors of reading, :class:`NotFound` (``file_not_found``), :class:`CorruptData` and
    :class:`Unsupported` (``unsupported_architecture``).
    """
    from pyagent_node.inference.formats.gguf_weights import GgufWeights  # noqa: PLC0415 - by kind
    from pyagent_node.inference.formats.safetensors_weights import (  # noqa: PLC0415 - by kind
        SafetensorsWeights,
    )

    with mapped(path, "reading"):
        if path.is_dir():
            return SafetensorsWeights(path)
        if path.is_file():
            return GgufWeights(path)
    raise NotFound(f"{path} does not exist.", code="file_not_found", path=str(path))
