"""Writes a GGUF file that llama.cpp loads: numbers, tokenizer, tensors.

The fields of the tokenizer are copied byte by byte from the GGUF file that has them: tokens need
not be valid text, which the ``gguf`` library's writer wants them to be.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType, LlamaFileType

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.files import mapped
from pyagent_node.inference.formats.config import ModelConfig
from pyagent_node.inference.formats.gguf_config import ROPE_FACTORS
from pyagent_node.inference.models.gguf_format import DEFAULT_ALIGNMENT
from pyagent_node.inference.models.gguf_types import pad_to
from pyagent_node.inference.models.gguf_writer import (
    TensorEntry,
    preamble,
    tensor_list,
    text_field,
    u32_field,
)
from pyagent_node.inference.models.model_file import ModelFile

if TYPE_CHECKING:
    from pyagent_node.inference.formats.convert import Tensor

_KINDS: Final = {np.float16: GGMLQuantizationType.F16, np.float32: GGMLQuantizationType.F32}


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Sequence[Tensor],
    vocabulary: ModelFile,
    *,
    f16: bool,
) -> None:
    """Write the model with the tokenizer of ``vocabulary``.

    Raises :class:`InvalidRequest` (``wrong_vocabulary``) for one of another size, and errors of the
    disk.
    """
    tokens = vocabulary.header.fields["tokenizer.ggml.tokens"].items
    if tokens > config.n_vocab:
        raise InvalidRequest(
            f"The tokenizer has {tokens} tokens and the model {config.n_vocab}.",
            code="wrong_vocabulary",
            remedy="Name a GGUF file of the same model with --tokenizer.",
        )
    entries = [_entry(tensor) for tensor in tensors]
    factors = np.array(config.rope_factors, "<f4")
    if len(factors):
        kind = GGMLQuantizationType.F32
        entries.insert(0, TensorEntry(ROPE_FACTORS, factors.shape, kind, factors.nbytes))
    fields = [*_fields(config, f16=f16), *_tokenizer(vocabulary)]
    head = b"".join(
        (preamble(len(entries), len(fields)), *fields, tensor_list(entries, DEFAULT_ALIGNMENT))
    )
    with mapped(path, "writing"), path.open("xb") as file:
        file.write(head)
        if len(factors):
            file.write(bytes(pad_to(file.tell(), DEFAULT_ALIGNMENT) - file.tell()))
            file.write(factors.tobytes())
        for tensor in tensors:
            file.write(bytes(pad_to(file.tell(), DEFAULT_ALIGNMENT) - file.tell()))
            tensor.read().tofile(file)
        file.write(bytes(pad_to(file.tell(), DEFAULT_ALIGNMENT) - file.tell()))


def _entry(tensor: Tensor) -> TensorEntry:
    nbytes = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
    return TensorEntry(tensor.name, tensor.shape[::-1], _KINDS[tensor.dtype], nbytes)


def _fields(config: ModelConfig, *, f16: bool) -> list[bytes]:
    arch = config.architecture
    kind = LlamaFileType.MOSTLY_F16 if f16 else LlamaFileType.ALL_F32
    numbers = {
        "vocab_size": config.n_vocab,
        "context_length": config.n_ctx_train,
        "embedding_length": config.n_embd,
        "block_count": config.n_layers,
        "feed_forward_length": config.n_ff,
        "rope.dimension_count": config.head_dim,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head_kv,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    fields = [
        text_field("general.architecture", arch),
        text_field("general.type", "model"),
        text_field("general.name", config.name),
        u32_field("general.file_type", kind),
        u32_field("general.quantization_version", 2),
        *(u32_field(f"{arch}.{key}", value) for key, value in numbers.items()),
        _f32_field(f"{arch}.rope.freq_base", config.rope_base),
        _f32_field(f"{arch}.attention.layer_norm_rms_epsilon", config.norm_eps),
    ]
    if config.rope_scale != 1.0:
        fields.append(text_field(f"{arch}.rope.scaling.type", "linear"))
        fields.append(_f32_field(f"{arch}.rope.scaling.factor", config.rope_scale))
    return fields


def _f32_field(key: str, value: float) -> bytes:
    raw = key.encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<If", GGUFValueType.FLOAT32, value)


def _tokenizer(vocabulary: ModelFile) -> list[bytes]:
    found: list[bytes] = []
    with mapped(vocabulary.path, "reading"), vocabulary.path.open("rb") as file:
        for key, field in vocabulary.header.fields.items():
            if key.startswith("tokenizer."):
                file.seek(field.span.start)
                found.append(file.read(field.span.stop - field.span.start))
    return found
