"""The encoder of this node's contexts: found, fetched and opened when it is first needed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final, Protocol

import trio

from pyagent_node.inference.models.encoders import minilm_files
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.node.api.following import Report
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.context_readers import missing_extra
from pyagent_node.sharding.context import minilm
from pyagent_node.sharding.context.embedder import Embedder

LIBRARIES: Final = ("datasketch", "onnxruntime", "tokenizers")


class EncoderSource(Protocol):
    """Where an encoder comes from."""

    @property
    def identity(self) -> str:
        """The identity that the opened encoder has."""
        ...

    def check(self) -> None:
        """Raise :class:`Unavailable` (``context_extra_missing``) where it cannot be opened."""
        ...

    async def open(self, report: Report) -> Embedder:
        """Return the encoder, the same one each time; ``report`` gets the progress of fetching."""
        ...


class MiniLmSource:
    """MiniLM in ``store``, with as many threads as the node gives (0: one a core)."""

    def __init__(self, store: ModelStore, *, threads: int = 0) -> None:
        self._store, self._threads = store, threads
        self._opening = trio.Lock()
        self._open: Embedder | None = None

    @property
    def identity(self) -> str:
        """See :class:`EncoderSource`."""
        return minilm.IDENTITY

    def check(self) -> None:
        """See :class:`EncoderSource`."""
        if any(find_spec(name) is None for name in LIBRARIES):
            raise missing_extra()

    async def open(self, report: Report) -> Embedder:
        """See :class:`EncoderSource`."""
        self.check()
        async with self._opening:
            if self._open is None:

                def told(done: int, total: int | None) -> None:
                    text = "fetching the encoder of contexts"
                    report(Progress(step="encoder", text=text, done=done, total=total))

                files = await minilm_files(self._store, progress=told)
                self._open = await trio.to_thread.run_sync(
                    lambda: minilm.MiniLm(files.model, files.tokenizer, threads=self._threads)
                )
            return self._open
