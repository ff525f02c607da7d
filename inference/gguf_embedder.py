"""Any GGUF embedding model behind the ``Embedder`` port, in processes of its own.

llama.cpp may abort or be killed for memory; then the request that met with it fails, and the next
one starts the process anew.  Tokens are counted by a second process, which has the vocabulary
alone: cutting one document must not wait until the windows of another are embedded.

All calls block, so they run in worker threads; calls of several threads queue up.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote

import msgspec
import numpy as np
import psutil
from numpy.typing import NDArray

from pyagent_node.base.contexts import MAX_IDENTITY
from pyagent_node.base.errors import (
    ConfigError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.types import Digest
from pyagent_node.inference.encoder_pipe import Answer, read_frame, write_frame
from pyagent_node.inference.runner_process import runner_environment
from pyagent_node.sharding.context.embedder import MAX_CHARACTERS, Vectors, check_texts

COMMAND: Final = ("-P", "-m", "pyagent_node.inference.llama.embedder_main")
TEXTS_AT_ONCE: Final = 64
"""Texts that one request of the process carries."""
END_SECONDS: Final = 5.0
"""Longest wait for a process that is told to end; then it is killed."""
_PREFIX: Final = "gguf/"


class GgufIdentity(msgspec.Struct, frozen=True):
    """What makes the vectors of an encoder comparable: the file, and what is put before texts.

    ``digest`` and ``manifest`` name the file in the model store, so that any node can fetch it from
    its peers.  ``question`` and ``text`` are put before what is asked and what is added.
    """

    digest: Digest
    manifest: Digest
    question: str = ""
    text: str = ""

    def __str__(self) -> str:
        parts = (self.digest, self.manifest, quote(self.question, ""), quote(self.text, ""))
        return _PREFIX + "/".join(parts).rstrip("/")

    @classmethod
    def parse(cls, identity: str) -> GgufIdentity | None:
        """Return what an identity says, or ``None`` where it is not one of a GGUF encoder."""
        if not identity.startswith(_PREFIX):
            return None
        parts = [*identity.removeprefix(_PREFIX).split("/"), "", ""]
        if len(parts) > 6 or len(parts) < 4 or not all(map(_is_digest, parts[:2])):
            return None
        digest, manifest, question, text = parts[:4]
        return cls(Digest(digest), Digest(manifest), unquote(question), unquote(text))

    def checked(self) -> str:
        """Return it as text; raises :class:`ConfigError` (``bad_setting``) if that is too long."""
        text = str(self)
        if len(text) > MAX_IDENTITY:
            raise ConfigError(
                "What is put before questions and texts is too long.",
                code="bad_setting",
                remedy="context_question_prefix and context_text_prefix have about 40 characters"
                " each.",
            )
        return text


class GgufEmbedder:
    """Implements ``Embedder``; ``threads`` as in the node's settings (0: one a core).

    The first call of :meth:`embed` loads the file.  ``on_start`` is called in the thread of a call
    that starts a process.  Raises :class:`Unavailable`
    (``encoder_failed``) where its process ends, and what ``llama.embedder`` raises.
    """

    def __init__(
        self,
        path: Path,
        identity: GgufIdentity,
        *,
        dimensions: int,
        threads: int = 0,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._name = identity.checked()
        self._dimensions = dimensions
        self.centre: NDArray[np.float32] | None = None
        count = threads or psutil.cpu_count(logical=False) or 1
        self._encoder = _Child(path, "embed", count, on_start)
        self._counter = _Child(path, "count", 1, on_start)

    @property
    def identity(self) -> str:
        """See ``Embedder``."""
        return self._name

    @property
    def dimensions(self) -> int:
        """See ``Embedder``."""
        return self._dimensions

    def embed(self, texts: Sequence[str]) -> Vectors:
        """See ``Embedder``."""
        return self._embed([self._identity.text + text for text in texts])

    def embed_question(self, question: str) -> NDArray[np.float32]:
        """See ``Embedder``."""
        return np.asarray(self._embed([self._identity.question + question])[0], np.float32)

    def compare(
        self, question: str, texts: Sequence[str], rarities: Mapping[str, float]
    ) -> NDArray[np.float32] | None:
        """See ``Embedder``; not measured for models of this kind, so it is not done."""
        del question, texts, rarities
        return None

    def count_tokens(self, text: str) -> int:
        """See ``Embedder``."""
        if any("\ud800" <= c <= "\udfff" for c in text):
            text = text.encode(errors="replace").decode()
        # What is too long for one request is counted in parts: a token more or less at each cut.
        parts = [text[at : at + MAX_CHARACTERS] for at in range(0, len(text), MAX_CHARACTERS)]
        return sum(self._counter.ask([part]).count for part in parts)

    def close(self) -> None:
        """End the processes; idempotent.  The next call starts them again."""
        self._encoder.close()
        self._counter.close()

    def rest(self) -> None:
        """End those processes that answer nobody now; the next call starts them again."""
        self._encoder.rest()
        self._counter.rest()

    def shut(self) -> None:
        """End the processes for good, in the middle of a request too, which fails."""
        self._encoder.shut()
        self._counter.shut()

    @property
    def runs(self) -> bool:
        """Whether a process of this encoder is there."""
        return self._encoder.runs or self._counter.runs

    def _embed(self, texts: list[str]) -> Vectors:
        check_texts(texts)
        vectors = np.zeros((len(texts), self._dimensions), np.float32)
        for at in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[at : at + TEXTS_AT_ONCE]
            answer = self._encoder.ask(some)
            numbers = np.frombuffer(answer.numbers, "<f4")
            if answer.width != self._dimensions or numbers.size != len(some) * answer.width:
                raise Unavailable(
                    f"The encoder gave vectors of {answer.width} numbers, not {self._dimensions}.",
                    code="encoder_failed",
                )
            vectors[at : at + len(some)] = numbers.reshape(len(some), answer.width)
        return vectors


class _Child:
    """A process that answers one request at a time, started when it is first needed."""

    def __init__(
        self,
        path: Path,
        kind: Literal["embed", "count"],
        threads: int,
        on_start: Callable[[], None],
    ) -> None:
        self._on_start = on_start
        self._shut = False
        self._command = [sys.executable, *COMMAND, str(path), kind, str(threads)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, texts: list[str]) -> Answer:
        with self._lock:
            process = self._running()
            assert process.stdin is not None, "started with pipes"
            assert process.stdout is not None, "started with pipes"
            reply = None
            with contextlib.suppress(OSError):
                write_frame(process.stdin, msgspec.msgpack.encode(texts))
                reply = read_frame(process.stdout)
            if reply is None:
                code = self._end()
                raise Unavailable(
                    f"The process of the encoder ended (exit code {code}).",
                    code="encoder_failed",
                    remedy="Try again; it is started anew.  If it ends each time, there may be too"
                    " little memory for this model: set another context_encoder.",
                )
        try:
            answer = msgspec.msgpack.decode(reply, type=Answer)
        except (msgspec.DecodeError, ValueError):
            raise Unavailable(
                "The process of the encoder makes no sense.", code="encoder_failed"
            ) from None
        if answer.error is not None:
            raise error_from_info(answer.error)
        return answer

    @property
    def runs(self) -> bool:
        return self._process is not None

    def close(self) -> None:
        with self._lock:
            self._end()

    def rest(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._lock.release()

    def shut(self) -> None:
        self._shut = True
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for its answer holds the lock
        if self._lock.acquire(timeout=END_SECONDS):
            try:
                self._end()
            finally:
                self._lock.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None and not self._shut:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=runner_environment(os.environ),
                )
            except OSError as error:
                raise Unavailable(
                    f"The process of the encoder could not be started: {error}.",
                    code="encoder_failed",
                ) from error
            self._on_start()
        if self._shut or self._process is None:  # perhaps while it was started
            self._end()
            raise Unavailable("The encoder was closed.", code="encoder_failed")
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(OSError):
            assert process.stdin is not None, "started with pipes"
            process.stdin.close()  # it ends by itself
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        return process.returncode


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
