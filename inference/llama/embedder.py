"""A GGUF model as an encoder of texts: one vector a text, pooled as the file says.

Any model that llama.cpp can pool will do: encoders (BERT and the like), and language models, whose
vectors are the mean of what leaves the last layer unless the file names another pooling.  Vectors
are scaled to length one, whatever the file was trained for: likeness is an inner product here.

llama.cpp may abort, so this lives in a process of its own (``embedder_main``).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from llama_cpp import llama_cpp as lc
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, Unsupported
from pyagent_node.inference.llama import library
from pyagent_node.inference.llama.memory import HEADROOM, available_memory
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header

MAX_TOKENS: Final = 512
"""Tokens of a text beyond these are not seen, nor those beyond what the model was trained for."""
BATCH_TOKENS: Final = 1024
"""Tokens that are computed together, of as many texts as they hold,"""
BATCH_TEXTS: Final = 64
"""and of no more than these."""
_Ids = list[int]


class GgufVocabulary:
    """The tokens of a file, without its weights."""

    def __init__(self, path: Path) -> None:
        read_header(path)
        self._model = library.load_model(path, vocab_only=True)

    def count(self, text: str) -> int:
        """Return how many tokens a text has, without marks of the model's own."""
        return len(tokens_of(self._model, text, special=False))

    def close(self) -> None:
        """Release the vocabulary; idempotent."""
        self._model.close()


class GgufEncoder:
    """A loaded encoder with so many ``threads``.

    Raises what reading the header and loading do; :class:`Unsupported` (``no_encoder``) for a model
    that gives no vector for a text; :class:`LimitExceeded` (``not_enough_memory``).
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        header = read_header(path)
        shape = model_shape(header)
        need = path.stat().st_size + HEADROOM
        if need > available_memory():
            raise LimitExceeded(
                f"The encoder {path.name} needs {need} bytes of memory.", code="not_enough_memory"
            )
        pooling = header.integer(
            f"{shape.architecture}.pooling_type", lc.LLAMA_POOLING_TYPE_UNSPECIFIED
        )
        if pooling == lc.LLAMA_POOLING_TYPE_RANK:
            raise Unsupported(
                f"{path.name} ranks pairs of texts: it has no vector for one.", code="no_encoder"
            )
        self._model = library.load_model(path)
        self.dimensions = self._model.n_embd
        self._most = min(MAX_TOKENS, self._model.n_ctx_train)
        params = lc.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = BATCH_TEXTS
        params.n_threads = params.n_threads_batch = threads
        params.embeddings = True
        params.kv_unified = True
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        if pooling in (lc.LLAMA_POOLING_TYPE_NONE, lc.LLAMA_POOLING_TYPE_UNSPECIFIED):
            params.pooling_type = lc.LLAMA_POOLING_TYPE_MEAN
        library.complaints()
        handle = lc.llama_init_from_model(self._model.handle, params)
        if not handle:
            text = library.complaints() or "no reason given"
            self._model.close()
            raise Unsupported(
                f"llama.cpp cannot make an encoder of {path.name}: {text}", code="no_encoder"
            )
        self._context = handle
        self._memory = lc.llama_get_memory(handle)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit vectors ``[len(texts), dimensions]``."""
        tokens = [self._cut(tokens_of(self._model, text, special=True)) for text in texts]
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for rows in batches([len(ids) for ids in tokens]):
            vectors[rows] = self._run([tokens[row] for row in rows])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / np.maximum(norms, 1e-12), np.float32)

    def close(self) -> None:
        """Release the model; idempotent."""
        handle, self._context = self._context, None
        if handle:
            lc.llama_free(handle)
        self._model.close()

    def _cut(self, ids: _Ids) -> _Ids:
        """Return ids that the model can take; the last one may be the mark that ends a text."""
        if not ids:
            return [max(0, int(lc.llama_vocab_bos(self._model.vocab)))]
        return ids if len(ids) <= self._most else [*ids[: self._most - 1], ids[-1]]

    def _run(self, texts: Sequence[_Ids]) -> NDArray[np.float32]:
        batch = lc.llama_batch_init(sum(map(len, texts)), 0, 1)
        try:
            at = 0
            for seq, ids in enumerate(texts):
                for position, token in enumerate(ids):
                    batch.token[at] = token
                    batch.pos[at] = position
                    batch.n_seq_id[at] = 1
                    batch.seq_id[at][0] = seq
                    batch.logits[at] = True
                    at += 1
            batch.n_tokens = at
            if self._memory:
                lc.llama_memory_clear(self._memory, True)
                failed = lc.llama_decode(self._context, batch)
            else:
                failed = lc.llama_encode(self._context, batch)
            if failed:
                raise library.failure("embedding texts", "embed_failed")
            return np.stack([self._vector(seq) for seq in range(len(texts))])
        finally:
            lc.llama_batch_free(batch)

    def _vector(self, seq: int) -> NDArray[np.float32]:
        pointer = lc.llama_get_embeddings_seq(self._context, seq)
        if not pointer:
            raise library.failure("embedding texts", "embed_failed")
        vector = np.ctypeslib.as_array(pointer, (self.dimensions,)).astype(np.float32)
        if not np.isfinite(vector).all():
            raise CorruptData(
                "The encoder gave a vector that holds no numbers.",
                code="encoder_corrupt",
                remedy="Get the model file again, or take another one.",
            )
        return vector


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the rows that are computed together: of about the same length, in bounded batches."""
    held: list[int] = []
    size = 0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if held and (size + lengths[row] > BATCH_TOKENS or len(held) == BATCH_TEXTS):
            yield held
            held, size = [], 0
        held.append(row)
        size += lengths[row]
    if held:
        yield held


def tokens_of(model: library.Model, text: str, *, special: bool) -> _Ids:
    """Return the tokens of a text; what looks like a control token in it is text."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("A text holds half characters.", code="bad_context_text") from None
    room = len(data) + 8
    tokens = (ctypes.c_int32 * room)()
    count = int(lc.llama_tokenize(model.vocab, data, len(data), tokens, room, special, False))
    if count < 0:
        room = -count
        tokens = (ctypes.c_int32 * room)()
        count = int(lc.llama_tokenize(model.vocab, data, len(data), tokens, room, special, False))
    if count < 0:
        raise InvalidRequest("A text is too long to tokenise.", code="text_too_long")
    return list(tokens[:count])


assert MAX_TOKENS <= BATCH_TOKENS
