"""MiniLM-L6 (all-MiniLM-L6-v2, int8) over ONNX Runtime: the usual :class:`Embedder`.

The libraries are the optional ones of ``pyagent-node[context]`` and are imported when a model is
opened.  The two files are named by the caller and are checked against their digests before a parser
sees them (``inference.models.encoders`` brings them).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pyagent_node.base.errors import CorruptData, Unavailable
from pyagent_node.base.files import read_limited
from pyagent_node.base.limits import MIB
from pyagent_node.sharding.context.embedder import Vectors, check_texts
from pyagent_node.sharding.context.rerank import says_something, word_likenesses

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from tokenizers import Encoding, Tokenizer

MODEL_SHA256: Final = "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"
TOKENIZER_SHA256: Final = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
NAME: Final = "minilm"
"""What settings call it."""
DIMENSIONS: Final = 384
IDENTITY: Final = f"all-MiniLM-L6-v2/int8/{MODEL_SHA256[:16]}/{TOKENIZER_SHA256[:16]}"
"""The model, its digest, and that of its vocabulary."""
MAX_TOKENS: Final = 256
"""Tokens of a text beyond these are not seen: the model was trained on no more."""
BATCH: Final = 32
"""Texts of about the same length computed together."""
COMPARED_BATCH: Final = 8
"""The same where there are few texts, which would else be filled up to the longest."""
COMPARED_TOKENS: Final = 48
"""Tokens of a text beyond these are not compared: nearly all windows have fewer."""
COMPARED_STATES: Final = "layer_norm_8"
"""The states that are compared: those after four of the six layers, which still tell words apart.
The last ones are all about the text as a whole."""
_LAST: Final = "last_hidden_state"
_FIRST_WORD: Final = 1996
"""The vocabulary has signs and single letters up to here, then words, the most frequent first."""


class MiniLm:
    """The model over its two files; ``threads`` is how many it may use (0: one a core).

    Raises :class:`Unavailable` (``context_extra_missing``), :class:`CorruptData`
    (``encoder_corrupt``) for files that are not the pinned ones, and what reading raises.
    """

    def __init__(self, model: Path, tokenizer: Path, *, threads: int = 0) -> None:
        try:
            import onnxruntime  # noqa: PLC0415 - optional, and slow to import
            import tokenizers  # noqa: PLC0415
        except ImportError:
            raise Unavailable(
                "Embedding text needs ONNX Runtime and tokenizers.",
                code="context_extra_missing",
                remedy="Run: pip install 'pyagent-node[context]'",
            ) from None
        model_bytes = _pinned(model, MODEL_SHA256)
        tokenizer_bytes = _pinned(tokenizer, TOKENIZER_SHA256)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: InferenceSession = onnxruntime.InferenceSession(
            _with_output(model_bytes, COMPARED_STATES), options, providers=["CPUExecutionProvider"]
        )
        self._tokenizer: Tokenizer = tokenizers.Tokenizer.from_str(tokenizer_bytes.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def identity(self) -> str:
        """The model, its digest, and that of its vocabulary."""
        return IDENTITY

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        return DIMENSIONS

    @property
    def centre(self) -> NDArray[np.float32] | None:
        """Its axes were learned, and their centre with them."""
        return None

    def embed_question(self, question: str) -> NDArray[np.float32]:
        """Return the unit vector of a question: that of any other text."""
        return np.asarray(self.embed([question])[0], np.float32)

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32]:
        """Return the likeness of words (see ``rerank``).

        A word of the question counts by how rare it is in the language times how rare it is among
        the candidates.
        """
        check_texts([question, *texts])
        asked = self._tokenizer.encode(question)
        texts_of = self._tokenizer.encode_batch(list(texts))
        (states,), mask = self._states([asked], COMPARED_STATES)
        # The marks at both ends are no words.
        every = range(1, int(mask.sum()) - 1)
        rows = [i for i in every if says_something(asked.tokens[i])] or list(every)
        if not rows:
            return np.zeros(len(texts), np.float32)
        weights = [_weight(question, asked, i, rarities) for i in rows]
        found = [np.zeros((0, DIMENSIONS), np.float32)] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts_of[i].ids))
        for at in range(0, len(order), COMPARED_BATCH):
            batch = order[at : at + COMPARED_BATCH]
            own, seen = self._states(
                [texts_of[i] for i in batch], COMPARED_STATES, most=COMPARED_TOKENS
            )
            for place, rows_of, there in zip(batch, own, seen, strict=True):
                found[place] = rows_of[there > 0]
        return word_likenesses(states[rows], weights, found)

    def count_tokens(self, text: str) -> int:
        """Return how many word pieces ``text`` has."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return unit vectors ``[len(texts), 384]``: the mean over a text's tokens."""
        check_texts(texts)
        encodings = self._tokenizer.encode_batch(list(texts))
        order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
        vectors = np.zeros((len(texts), DIMENSIONS), np.float32)
        for at in range(0, len(order), BATCH):
            batch = order[at : at + BATCH]
            vectors[batch] = self._run([encodings[i] for i in batch])
        return vectors

    def _run(self, encodings: Sequence[Encoding]) -> Vectors:
        states, mask = self._states(encodings, _LAST)
        means = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1)[:, None]
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        return np.asarray(means / np.maximum(norms, 1e-12), np.float32)

    def _states(
        self, encodings: Sequence[Encoding], output: str, *, most: int = MAX_TOKENS
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the states of tokens ``[texts, tokens, dimensions]``, and which are there."""
        rows = [_cut(encoding.ids, most) for encoding in encodings]
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        (hidden,) = self._session.run(
            [output],
            {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)},
        )
        return np.asarray(hidden, np.float32), mask


def _pinned(path: Path, sha256: str) -> bytes:
    data = read_limited(path, 64 * MIB)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptData(
            f"{path} is not the file that this version knows.",
            code="encoder_corrupt",
            remedy="Remove it, so that it is fetched again.",
        )
    return data


def _cut(ids: list[int], most: int) -> list[int]:
    """Return at most ``most`` ids; the last one is the mark that ends a text."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def _weight(question: str, asked: Encoding, token: int, rarities: Mapping[str, float]) -> float:
    """Return what a token of a question counts."""
    common = math.log(2 + max(0, asked.ids[token] - _FIRST_WORD))
    span = asked.token_to_chars(token)
    word = asked.token_to_word(token)
    whole = span if word is None else asked.word_to_chars(word)
    term = question[slice(*whole)].casefold() if whole else ""
    return common * rarities.get(term, max(rarities.values(), default=1.0))


def _with_output(model: bytes, name: str) -> bytes:
    """Return an ONNX model that tells one more of its inner values.

    A message of Protocol Buffers may go on in a second piece, whose repeated fields are joined to
    those of the first.  Field 7 of a model is its graph, 12 of a graph an output, 1 its name.
    """
    output = b"\x0a" + bytes([len(name)]) + name.encode()
    graph = b"\x62" + bytes([len(output)]) + output
    return model + b"\x3a" + bytes([len(graph)]) + graph
