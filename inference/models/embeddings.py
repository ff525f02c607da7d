"""Looks token embeddings up in a GGUF file, as llama.cpp's own lookup would."""

from __future__ import annotations

import mmap
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import quants
from numpy.typing import NDArray

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.base.files import mapped
from pyagent_node.inference.models.architectures import EMBEDDING, model_shape
from pyagent_node.inference.models.gguf_types import ByteRange
from pyagent_node.inference.models.model_file import ModelFile


class EmbeddingTable:
    """The rows of ``token_embd``, dequantised on demand.

    The table stays in the file (mapped, so only rows in use take memory).  ``source`` may be a
    partial :class:`ModelFile` that holds header and table.  Use it as a context manager or call
    :meth:`close`.

    Raises :class:`Unavailable` (``bytes_missing``) and :class:`Unsupported`
    (``unsupported_embedding``) for a tensor type that cannot be dequantised here.
    """

    def __init__(self, source: Path | ModelFile) -> None:
        file = source if isinstance(source, ModelFile) else ModelFile.open(source)
        shape = model_shape(file.header)
        tensor = file.header.tensor(EMBEDDING)
        file.require([tensor.data])
        self.n_embd = shape.n_embd
        self.n_vocab = shape.n_vocab
        self.type = tensor.type
        row_bytes = tensor.nbytes // self.n_vocab
        base = tensor.data.start - tensor.data.start % mmap.ALLOCATIONGRANULARITY
        with mapped(file.path, "reading"), file.path.open("rb") as opened:
            self._map = mmap.mmap(
                opened.fileno(), tensor.data.stop - base, access=mmap.ACCESS_READ, offset=base
            )
        self._rows: NDArray[np.uint8] | None = np.frombuffer(
            self._map, np.uint8, count=tensor.nbytes, offset=tensor.data.start - base
        ).reshape(self.n_vocab, row_bytes)
        try:
            self.rows(np.zeros(1, np.int32))
        except NotImplementedError:
            self.close()
            raise Unsupported(
                f"Embedding tables of type {tensor.type.name} cannot be looked up here.",
                code="unsupported_embedding",
                remedy="Use a model whose token_embd is F32, F16, BF16, Q4 to Q8 or a K-quant.",
            ) from None

    def rows(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the embeddings of ``tokens``, shape (n,), as float32 of shape (n, n_embd).

        Raises :class:`InvalidRequest` (``bad_token``) for a token outside the vocabulary.
        """
        if self._rows is None:
            raise ValueError("the embedding table is closed")
        if tokens.ndim != 1:
            raise ValueError(f"tokens of shape {tokens.shape}, not one-dimensional")
        if tokens.size == 0:
            return np.empty((0, self.n_embd), np.float32)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.n_vocab:
            raise InvalidRequest(
                f"Token {low if low < 0 else high} is outside the vocabulary of {self.n_vocab}.",
                code="bad_token",
            )
        picked = self._rows[tokens]
        with np.errstate(all="ignore"):  # a NaN in the file is a NaN here
            rows: NDArray[np.float32] = quants.dequantize(picked, self.type)
        return np.ascontiguousarray(rows.reshape(len(tokens), self.n_embd), np.float32)

    def close(self) -> None:
        """Release the mapping; idempotent."""
        self._rows = None
        self._map.close()

    def __enter__(self) -> EmbeddingTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def embedding_ranges(file: ModelFile) -> tuple[ByteRange, ...]:
    """Return the bytes that an :class:`EmbeddingTable` reads: header and table."""
    header = file.header
    return ByteRange(0, header.length), header.tensor(EMBEDDING).data
