"""What the pipeline asks of its neighbours: runners, tokenizers, embedding tables.

The real ones are ``inference.runner`` (child processes) and ``inference.models.embeddings``; the
simulator has toys behind the same interfaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import trio

from pyagent_node.base.errors import RunnerFailed
from pyagent_node.base.types import Placement
from pyagent_node.inference.backend import (
    Activations,
    BackendInfo,
    CellAttention,
    KvRange,
    SequenceOp,
    StepInput,
    StepOutput,
    Tokens,
)
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.pipeline.head_plan import Vocabulary


class StageRunner(Protocol):
    """A loaded slice behind an asynchronous interface (see ``inference.backend`` for shapes)."""

    @property
    def info(self) -> BackendInfo:
        """What the slice says of itself."""
        ...

    @property
    def failed(self) -> trio.Event:
        """Set when the runner has died."""
        ...

    @property
    def failure(self) -> RunnerFailed | None:
        """Why it died."""
        ...

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute ``steps`` as one batch; raises :class:`RunnerFailed` when it has died."""
        ...

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations in order."""
        ...

    async def export_kv(self, seq: int, start: int, stop: int) -> KvRange:
        """Copy the cells of tokens ``[start, stop)`` of a sequence out, layer by layer."""
        ...

    async def import_kv(self, seq: int, kv: KvRange, tokens: Tokens) -> None:
        """Append cells to a sequence that ends at ``kv.start``; see ``Backend.import_kv``."""
        ...

    async def attention(self, seq: int) -> CellAttention:
        """Return where a watched sequence attended; see ``Backend.attention``."""
        ...


class Tokenizer(Protocol):
    """The vocabulary of one model."""

    async def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Return the tokens of ``text``.

        ``add_special`` adds the model's BOS where it asks for one; ``parse_special`` reads control
        tokens in the text as such.
        """
        ...

    async def chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the tokens of a conversation in the model's template, ready for the answer."""
        ...


class EmbeddingRows(Protocol):
    """The embedding table of one model."""

    def rows(self, tokens: Tokens) -> Activations:
        """Return the rows of ``tokens``, shape (n, n_embd), float32."""
        ...


class HeadModel(msgspec.Struct, frozen=True):
    """Everything with which a node can be head for a placed model.

    ``embeddings`` may be ``None`` when one rank holds the whole model.  ``drafter`` is the name of
    the model that the placement's drafter rank guesses with, if it has one.  ``n_ctx_train`` are
    the positions that the model was trained for, 0 where only those of the placement are known.
    """

    name: str
    created: int
    placement: Placement
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    embeddings: EmbeddingRows | None
    drafter: str | None = None
    n_ctx_train: int = 0
