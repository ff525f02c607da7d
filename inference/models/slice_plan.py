"""Plans how the layers ``[first, last)`` of a GGUF file become a GGUF file of their own.  Pure.

Layers are renumbered from 0 and tensor bytes are copied as they are.  A slice without the output
head gets a ``no_vocab`` tokenizer, a dummy vocabulary of 32 rows and a dummy output norm: llama.cpp
wants them to exist, and the pipeline never reads what they produce (activations enter as embeddings
and leave through a tap on the last layer).  A slice with the output head keeps tokenizer and head;
where the embedding table is not the head too, its place is a hole (zeros that take no disk).

:mod:`slicing` carries the plans out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from pyagent_node.base.types import Slice
from pyagent_node.inference.models.architectures import (
    EMBEDDING,
    GLOBAL_TENSORS,
    HEAD_TENSORS,
    PER_LAYER,
    ModelShape,
    check_slice,
    check_sliceable,
    layer_of,
    model_shape,
)
from pyagent_node.inference.models.copy_plan import (
    CopyPlan,
    Hole,
    Segment,
    copy_plan,
    length,
)
from pyagent_node.inference.models.gguf_types import ByteRange, GgufHeader, pad_to
from pyagent_node.inference.models.gguf_writer import (
    TensorEntry,
    array_field,
    preamble,
    tensor_list,
    text_field,
    u32_field,
)

SLICE_FORMAT: Final = 1
"""Version of what the plans make; part of the names of cached slices."""
DUMMY_VOCAB: Final = 32
"""Rows of the dummy vocabulary."""
SLICE_KEY: Final = "pyagent.slice"
"""Field that names the layers of the source, as in ``10-20`` or ``20-30+head``."""
FORMAT_KEY: Final = "pyagent.slice_format"
VOCABULARY: Final = "vocabulary"
"""Value of :data:`SLICE_KEY` in a file without tensors."""

_KEPT_GENERAL: Final = frozenset(
    {
        "general.alignment",
        "general.architecture",
        "general.file_type",
        "general.name",
        "general.quantization_version",
    }
)


class SlicePlan(NamedTuple):
    """How to make a slice, and of which model."""

    part: Slice
    shape: ModelShape
    copy: CopyPlan


def slice_plan(header: GgufHeader, part: Slice) -> SlicePlan:
    """Plan the slice ``part`` of the model with this header.

    The whole model is one segment: the file as it is, of any architecture.  Raises
    :class:`Unsupported` (``unsupported_architecture``), :class:`InvalidRequest` (``bad_slice``) and
    :class:`CorruptData` (``gguf_malformed``).
    """
    if part.first == 0 and part.head:
        shape = model_shape(header)
        check_slice(part, shape.n_layers)
        everything = ByteRange(0, header.file_size)
        return SlicePlan(part, shape, copy_plan([everything]))
    shape = check_sliceable(header)
    check_slice(part, shape.n_layers)
    fields = [*_fields(header, shape, part)]
    tensors = [*_tensors(header, shape, part)]
    listing = tensor_list([entry for entry, _ in tensors], header.alignment)
    segments: list[Segment] = [preamble(len(tensors), len(fields)), *fields, listing]
    size = sum(length(segment) for segment in segments)
    for entry, data in tensors:
        padded = pad_to(size, header.alignment)
        if padded > size:
            segments.append(bytes(padded - size))
        segments.append(data)
        size = padded + entry.nbytes
    return SlicePlan(part, shape, copy_plan(segments, [ByteRange(0, header.length)]))


def vocabulary_plan(header: GgufHeader) -> CopyPlan:
    """Plan a file with every field of the source and no tensor: a tokenizer and its chat template.

    llama.cpp loads it with ``vocab_only``.
    """
    extra = [text_field(SLICE_KEY, VOCABULARY), u32_field(FORMAT_KEY, SLICE_FORMAT)]
    kept = [
        field.span for key, field in header.fields.items() if key not in (SLICE_KEY, FORMAT_KEY)
    ]
    return copy_plan(
        [preamble(0, len(kept) + len(extra)), *kept, *extra], [ByteRange(0, header.length)]
    )


def _fields(header: GgufHeader, shape: ModelShape, part: Slice) -> Iterator[bytes | ByteRange]:
    """Yield each field of the slice, encoded or as its place in the source."""
    arch = shape.architecture
    dropped = {f"{arch}.block_count", SLICE_KEY, FORMAT_KEY}
    if not part.head:
        dropped.add(f"{arch}.vocab_size")
    for key, field in header.fields.items():
        setting = key.removeprefix(f"{arch}.")
        if key in dropped or not (part.head or setting != key or key in _KEPT_GENERAL):
            continue
        if setting in PER_LAYER and field.item_type is not None and isinstance(field.value, tuple):
            yield array_field(key, field.item_type, field.value[part.first : part.last])
        else:
            yield field.span
    yield u32_field(f"{arch}.block_count", part.last - part.first)
    if not part.head:
        yield u32_field(f"{arch}.vocab_size", DUMMY_VOCAB)
        yield text_field("tokenizer.ggml.model", "no_vocab")
    yield text_field(SLICE_KEY, str(part))
    yield u32_field(FORMAT_KEY, SLICE_FORMAT)


def _tensors(
    header: GgufHeader, shape: ModelShape, part: Slice
) -> Iterator[tuple[TensorEntry, ByteRange | Hole | bytes]]:
    """Yield each tensor of the slice with where its bytes come from."""
    yield _embedding(header, shape, part)
    if not part.head:
        norm = np.ones(shape.n_embd, dtype="<f4").tobytes()
        yield _entry("output_norm.weight", (shape.n_embd,), len(norm)), norm
    for name, tensor in header.tensors.items():
        layer = layer_of(name)
        if layer is not None and part.first <= layer[0] < part.last:
            kept = f"blk.{layer[0] - part.first}.{layer[1]}"
        elif name in GLOBAL_TENSORS or (part.head and name in HEAD_TENSORS):
            kept = name
        else:
            continue
        yield TensorEntry(kept, tensor.shape, tensor.type, tensor.nbytes), tensor.data


def _embedding(
    header: GgufHeader, shape: ModelShape, part: Slice
) -> tuple[TensorEntry, ByteRange | Hole]:
    if not part.head:
        nbytes = DUMMY_VOCAB * shape.n_embd * 4
        return _entry(EMBEDDING, (shape.n_embd, DUMMY_VOCAB), nbytes), Hole(nbytes)
    tensor = header.tensor(EMBEDDING)
    entry = TensorEntry(EMBEDDING, tensor.shape, tensor.type, tensor.nbytes)
    return entry, tensor.data if shape.tied else Hole(tensor.nbytes)


def _entry(name: str, dims: tuple[int, ...], nbytes: int) -> TensorEntry:
    return TensorEntry(name, dims, GGMLQuantizationType.F32, nbytes)
