"""A child process that embeds texts, or counts their tokens, with a GGUF file.

``python -m pyagent_node.inference.llama.embedder_main FILE embed|count THREADS``; see
``gguf_embedder``.  It reads requests from stdin, one after the other, until that ends, and writes
an answer to each to stdout.  A request that takes longer than :data:`REQUEST_SECONDS` ends the
process: whoever waits for the answer sees its pipe close.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from pathlib import Path
from typing import Final

import msgspec

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.encoder_pipe import Answer, read_frame, write_frame
from pyagent_node.inference.llama.embedder import GgufEncoder, GgufVocabulary

REQUEST_SECONDS: Final = 600.0
"""Longest time for a request, the first of which loads the file."""


class Worker:
    """Answers requests: lists of texts.  An empty list asks for the width of a vector alone."""

    def __init__(self, path: Path, kind: str, threads: int) -> None:
        self._encoder = GgufEncoder(path, threads=threads) if kind == "embed" else None
        self._vocabulary = None if kind == "embed" else GgufVocabulary(path)

    def answer(self, texts: list[str]) -> Answer:
        """Return the answer to a request; raises what the model does."""
        if self._vocabulary is not None:
            return Answer(count=sum(map(self._vocabulary.count, texts)))
        assert self._encoder is not None, "one of the two is open"
        vectors = self._encoder.embed(texts)
        return Answer(self._encoder.dimensions, vectors.astype("<f4").tobytes())


def main(path: Path, kind: str, threads: int) -> None:
    """Answer until stdin ends."""
    logging.disable()
    # What llama.cpp prints must not get between the messages.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    worker: Worker | None = None
    while (request := read_frame(sys.stdin.buffer)) is not None:
        faulthandler.dump_traceback_later(REQUEST_SECONDS, exit=True)
        try:
            worker = worker or Worker(path, kind, threads)
            answer = worker.answer(msgspec.msgpack.decode(request, type=list[str]))
        except PyAgentError as error:
            answer = Answer(error=error.to_info())
        faulthandler.cancel_dump_traceback_later()
        write_frame(answers, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
