"""Where the time of adding documents goes: the encoder, and everything else.

``python -m pyagent_node.benchmarks.context_ingest --tokens 200000 --json`` adds modules of Python's
standard library to a context of this process alone.  ``--no-encoder`` takes random vectors instead
of the encoder's, so that only the rest is left.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import trio
from numpy.typing import NDArray

from pyagent_node.base.types import PeerId
from pyagent_node.inference.models.encoders import EncoderFiles, minilm_files
from pyagent_node.node.api.context_schema import CreateContextRequest
from pyagent_node.node.api.following import Report, nobody
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.config import load_settings
from pyagent_node.node.context_local import LocalContexts
from pyagent_node.node.context_store import open_context_store
from pyagent_node.node.contexts import Contexts
from pyagent_node.node.home import Home
from pyagent_node.node.offline import open_store
from pyagent_node.sharding.context.embedder import Embedder, Vectors
from pyagent_node.sharding.context.minilm import MiniLm


class IngestRow(msgspec.Struct, frozen=True):
    """What adding came to; seconds of the clock, and of the processor for the whole process."""

    tokens: int
    files: int
    windows: int
    seconds: float
    encoder_seconds: float
    other_share: float
    processor_seconds: float
    replicated_bytes_per_window: float


class TimedEncoder:
    """An encoder that counts its time; ``random``: vectors of no meaning, at once."""

    def __init__(self, inner: Embedder, *, random: bool) -> None:
        self._inner, self._random = inner, random
        self.identity, self.dimensions = inner.identity, inner.dimensions
        self.seconds = 0.0

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See ``Embedder``."""
        began = time.perf_counter()
        if self._random:
            generator = np.random.Generator(np.random.PCG64(len(texts)))
            found = generator.standard_normal((len(texts), self.dimensions)).astype(np.float32)
            found /= np.linalg.norm(found, axis=1, keepdims=True)
        else:
            found = self._inner.embed(texts)
        self.seconds += time.perf_counter() - began
        return found

    @property
    def centre(self) -> NDArray[np.float32] | None:
        """See ``Embedder``."""
        return self._inner.centre

    def embed_question(self, question: str) -> NDArray[np.float32]:
        """See ``Embedder``."""
        return np.asarray(self.embed([question])[0], np.float32)

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32] | None:
        """See ``Embedder``."""
        return self._inner.compare(question, texts, rarities)

    def count_tokens(self, text: str) -> int:
        """See ``Embedder``."""
        return self._inner.count_tokens(text)

    async def choose(self) -> str:
        """See ``EncoderSource``."""
        return self.identity

    def check(self, identity: str) -> None:
        """See ``EncoderSource``: it is there."""

    async def open(self, identity: str, report: Report) -> Embedder:
        """See ``EncoderSource``."""
        report(Progress(step="encoder"))
        return self


async def measure(files: EncoderFiles, tokens: int, *, random: bool) -> IngestRow:
    """Add modules until they have ``tokens`` tokens, or there are no more."""
    encoder = TimedEncoder(MiniLm(files.model, files.tokenizer), random=random)
    with tempfile.TemporaryDirectory() as folder:
        async with open_context_store(Path(folder), limit_bytes=1 << 40) as store:
            mesh = LocalContexts(PeerId("bench"), store, clock=time.time)
            contexts = Contexts(mesh, encoder, held=store.held)
            await contexts.create(CreateContextRequest("bench"))
            added, count = 0, 0
            began, worked = time.perf_counter(), time.process_time()
            for path in sorted(Path(os.__file__).parent.glob("*.py")):
                data = path.read_bytes()
                reply = await contexts.add("bench", path.name, data, modified=0, report=nobody)
                added, count = added + reply.tokens, count + 1
                if added >= tokens:
                    break
            seconds, worked = time.perf_counter() - began, time.process_time() - worked
            (view,) = (await contexts.list()).contexts
    return IngestRow(
        tokens=added,
        files=count,
        windows=view.windows,
        seconds=round(seconds, 1),
        encoder_seconds=round(encoder.seconds, 1),
        other_share=round((seconds - encoder.seconds) / seconds, 3),
        processor_seconds=round(worked, 1),
        replicated_bytes_per_window=round(view.record_bytes / max(1, view.windows), 2),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--no-encoder", action="store_true")
    parser.add_argument("--encoder", type=Path, help="a folder of model.onnx and tokenizer.json")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.encoder:
        files = EncoderFiles(args.encoder / "model.onnx", args.encoder / "tokenizer.json")
    else:
        home = Home.default()
        files = trio.run(minilm_files, open_store(home, load_settings(home)))
    row = msgspec.to_builtins(trio.run(lambda: measure(files, args.tokens, random=args.no_encoder)))
    if args.json:
        print(json.dumps(row))
    else:
        for name, value in row.items():
            print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
