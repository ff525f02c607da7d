"""What says that two files are the same model, whatever their format: digests of what they mean.

A tensor's digest is that of its numbers in f16 in llama.cpp's row order.  So a quantised file and
its own conversion to f16 are the same weights, and two quantisations of one model are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData
from pyagent_node.base.files import mapped, read_limited
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest
from pyagent_node.inference.formats.gguf_weights import GgufWeights
from pyagent_node.inference.formats.safetensors_weights import SafetensorsWeights
from pyagent_node.inference.formats.weights import Array, Weights, expected_shapes
from pyagent_node.inference.models.gguf_header import GgufHeader, read_header
from pyagent_node.native import blake3

TOKENIZER_GGUF: Final = "tokenizer.gguf"
"""In a folder of safetensors: the tokenizer as llama.cpp loads it, a GGUF file without tensors."""
TOKENIZER_JSON: Final = "tokenizer.json"
MANIFEST_SUFFIX: Final = ".identity.json"
"""Behind the name of a GGUF file: where its identity is kept."""
MANIFEST: Final = "identity.json"
"""The same in a folder."""
VERSION: Final = 1
_MAX_MANIFEST: Final = 16 * MIB
_MAX_TOKENIZER: Final = 256 * MIB
_TOKENIZER_PREFIX: Final = "tokenizer."

Report = Callable[[int, int], None]
"""Gets the bytes done and all of them."""


class ModelIdentity(msgspec.Struct, frozen=True):
    """A model in any format.

    ``config`` is the digest of its numbers, ``tokenizer`` that of its tokenizer's metadata in GGUF
    (``""``: the file has none, ``json:...``: a ``tokenizer.json``, which cannot be compared with
    it), ``tensors`` those of each tensor in f16, by GGUF name.
    """

    version: int
    config: Digest
    tokenizer: str
    tensors: dict[str, Digest]

    @property
    def weights(self) -> Digest:
        """One digest of the numbers and all tensors: equal says that they compute the same."""
        return Digest(
            blake3(msgspec.json.encode((self.config, sorted(self.tensors.items())))).hex()
        )

    def differs(self, other: ModelIdentity) -> list[str]:
        """Return what differs: ``config``, ``tokenizer``, names of tensors."""
        names = sorted({*self.tensors, *other.tensors})
        found = [name for name in names if self.tensors.get(name) != other.tensors.get(name)]
        if self.config != other.config:
            found.insert(0, "config")
        if self.tokenizer != other.tokenizer:
            found.insert(0, "tokenizer")
        return found


def identify(weights: Weights, *, report: Report | None = None) -> ModelIdentity:
    """Read every tensor of a whole model and return its identity; errors as for reading."""
    shapes = expected_shapes(weights)
    total, done = sum(int(np.prod(shape)) for shape in shapes.values()), 0
    tensors: dict[str, Digest] = {}
    for name, shape in shapes.items():
        tensors[name] = tensor_digest(weights.tensor(name, np.float16))
        done += int(np.prod(shape))
        if report is not None:
            report(2 * done, 2 * total)
    return ModelIdentity(VERSION, weights.config.digest, tokenizer_digest(weights), tensors)


def tensor_digest(values: Array) -> Digest:
    """Return the digest of a tensor in f16."""
    return Digest(blake3(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hex())


def tokenizer_digest(weights: Weights) -> str:
    """Return the digest of the tokenizer beside, or in, a model's weights."""
    if isinstance(weights, GgufWeights):
        return _gguf_tokenizer(weights.path, weights.header)
    if isinstance(weights, SafetensorsWeights):
        path = weights.path / TOKENIZER_GGUF
        if path.is_file():
            return _gguf_tokenizer(path, read_header(path))
        path = weights.path / TOKENIZER_JSON
        if path.is_file():
            return f"json:{blake3(read_limited(path, _MAX_TOKENIZER)).hex()}"
    return ""


def _gguf_tokenizer(path: Path, header: GgufHeader) -> str:
    keys = sorted(key for key in header.fields if key.startswith(_TOKENIZER_PREFIX))
    if f"{_TOKENIZER_PREFIX}ggml.tokens" not in keys:
        return ""
    parts: list[bytes] = []
    with mapped(path, "reading"), path.open("rb") as file:
        for key in keys:
            span = header.fields[key].span
            file.seek(span.start)
            parts.append(blake3(file.read(span.stop - span.start)))
    return blake3(b"".join(parts)).hex()


def manifest_path(path: Path) -> Path:
    """Return where the identity of a model at ``path`` is kept."""
    return path / MANIFEST if path.is_dir() else path.with_name(path.name + MANIFEST_SUFFIX)


def read_identity(path: Path) -> ModelIdentity:
    """Read an identity that a conversion wrote; raises :class:`CorruptData` and errors of disk."""
    try:
        found = msgspec.json.decode(read_limited(path, _MAX_MANIFEST), type=ModelIdentity)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _foreign(path, str(error)) from None
    if found.version != VERSION:
        raise _foreign(path, f"version {found.version}")
    return found


def _foreign(path: Path, what: str) -> CorruptData:
    return CorruptData(f"{path} is no model identity: {what[:200]}.", code="identity_malformed")
