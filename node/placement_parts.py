"""What the parts of a placement on a node are made of, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from pyagent_node.base.types import Digest, Slice
from pyagent_node.consensus.commands import ModelRecord
from pyagent_node.inference.pipeline.head_plan import Vocabulary
from pyagent_node.inference.pipeline.ports import EmbeddingRows, StageRunner, Tokenizer
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.node.keeping import HostProgress, Mortal


class HeadParts(Mortal, Protocol):
    """What a head is made of; ``failed`` is set when the tokenizer's process has died."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of every token, and the end tokens."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenises and renders."""
        ...

    @property
    def embeddings(self) -> EmbeddingRows | None:
        """The embedding table; ``None`` where one rank holds the whole model."""
        ...


class Assets(Protocol):
    """Where slices, runners and head assets come from (see ``node.assets``).

    All report ``"fetching"`` and ``"loading"`` on the way and raise errors of ``base.errors``.
    ``epoch`` is that of the model's placement at the time of the attempt.
    """

    def runner(
        self, model: ModelRecord, key: RunnerKey, epoch: int, progress: HostProgress
    ) -> AbstractAsyncContextManager[StageRunner]:
        """Fetch a slice and run it while the context lasts."""
        ...

    def head(
        self, model: ModelRecord, epoch: int, progress: HostProgress
    ) -> AbstractAsyncContextManager[HeadParts]:
        """Fetch header and embeddings and run a tokenizer while the context lasts."""
        ...

    async def spare(
        self, model: ModelRecord, part: Slice, epoch: int, progress: HostProgress
    ) -> None:
        """Make the file of a slice be on this node's disk."""
        ...

    async def tidy(self, model: Digest, needed: Callable[[], frozenset[Slice]]) -> None:
        """Delete slice files of a model but those that are ``needed`` (asked at that moment)."""
        ...
