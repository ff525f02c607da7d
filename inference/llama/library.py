"""The one module that loads llama.cpp: its library, its log and its models.

Uses the low-level ``ctypes`` API of llama-cpp-python, whose version is pinned.  Errors of llama.cpp
reach us as null pointers and log lines; :func:`load_model` turns both into errors of ours.  Some
mistakes make llama.cpp abort the process: that is why it runs in a runner process of its own.
"""

# pyright: reportArgumentType=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from pathlib import Path
from typing import Final

import llama_cpp
from llama_cpp import llama_cpp as lc

from pyagent_node.base.errors import CorruptData, PyAgentError, Unavailable, Unsupported

log = logging.getLogger("pyagent_node.llama")

VERSION: Final = llama_cpp.__version__
"""Version of llama-cpp-python, which pins the version of llama.cpp built into it."""

MAX_LINE: Final = 500
"""Characters of one log line of llama.cpp that are kept."""
KEPT_LINES: Final = 8
"""Warnings and errors of llama.cpp that are kept to explain a failure."""

# ggml_log_level; 5 continues the line before
_LEVELS: Final = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
_CONTINUED: Final = 5


class _LogSink:
    """Joins the pieces llama.cpp logs into lines and keeps the last complaints."""

    def __init__(self) -> None:
        self.complaints: deque[str] = deque(maxlen=KEPT_LINES)
        self._line = ""
        self._level = logging.DEBUG

    def write(self, level: int, text: str) -> None:
        if level != _CONTINUED:
            self._flush()
            self._level = _LEVELS.get(level, logging.DEBUG)
        self._line = (self._line + text)[: MAX_LINE + 1]
        if text.endswith("\n"):
            self._flush()

    def _flush(self) -> None:
        line, self._line = self._line.strip()[:MAX_LINE], ""
        if line.strip("."):
            log.log(self._level, "%s", line)
            if self._level >= logging.WARNING:
                self.complaints.append(line)


_sink = _LogSink()


@lc.llama_log_callback  # type: ignore[untyped-decorator]  # of ctypes
def _on_log(level: int, text: bytes, _data: int | None) -> None:
    _sink.write(level, text.decode("utf-8", "replace"))


_initialised = False


def initialise() -> None:
    """Prepare the library: route its log to ours, and start its backend the first time."""
    global _initialised  # noqa: PLW0603 - a library has one state a process
    # Every time: a process has one log of llama.cpp, and another user of it may have taken it.
    lc.llama_log_set(_on_log, ctypes.c_void_p(0))
    if not _initialised:
        lc.llama_backend_init()
        _initialised = True


def complaints() -> str:
    """Return the last warnings of llama.cpp as one bounded line, and forget them."""
    text = "; ".join(_sink.complaints)[-MAX_LINE:]
    _sink.complaints.clear()
    return text


def failure(doing: str, code: str) -> PyAgentError:
    """Return an error for a call that llama.cpp refused without a reason of its own."""
    return Unavailable(f"llama.cpp failed {doing}: {complaints() or 'no reason given'}.", code=code)


def symbol(name: str) -> int:
    """Return the address of an exported function of llama.cpp or ggml."""
    for library in _libraries():
        try:
            function = getattr(library, name)
        except AttributeError:
            continue
        address = ctypes.cast(function, ctypes.c_void_p).value
        if address:
            return address
    raise Unsupported(
        f"This build of llama.cpp does not export {name}.",
        code="llama_build",
        remedy=f"Install llama-cpp-python {VERSION} as the project pins it.",
    )


_OBJECT_BYTES: Final = 32
"""What ggml adds to the size of a tensor for the object around it."""


def tensor_bytes() -> int:
    """Return how many bytes a tensor takes without its data."""
    overhead = ctypes.CFUNCTYPE(ctypes.c_size_t)(symbol("ggml_tensor_overhead"))
    return int(overhead()) - _OBJECT_BYTES


def _libraries() -> list[ctypes.CDLL]:
    # On Linux and macOS a lookup also searches the libraries that libllama depends on.
    libraries: list[ctypes.CDLL] = [lc._lib]
    folder = Path(llama_cpp.__file__).parent / "lib"
    if os.name == "nt":
        libraries += [ctypes.CDLL(str(path)) for path in sorted(folder.glob("ggml*.dll"))]
    return libraries


class Model:
    """A loaded GGUF file: weights and vocabulary, or the vocabulary alone."""

    def __init__(self, handle: lc.llama_model_p) -> None:
        self.handle = handle
        self.vocab = lc.llama_model_get_vocab(handle)
        assert self.vocab, "every model has a vocabulary, if only an empty one"

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return int(lc.llama_vocab_n_tokens(self.vocab))

    @property
    def n_embd(self) -> int:
        """Width of the residual stream."""
        return int(lc.llama_model_n_embd(self.handle))

    @property
    def n_layers(self) -> int:
        """Layers in the file."""
        return int(lc.llama_model_n_layer(self.handle))

    @property
    def n_ctx_train(self) -> int:
        """Context length that the model was trained for."""
        return int(lc.llama_model_n_ctx_train(self.handle))

    def close(self) -> None:
        """Free the model; idempotent."""
        handle, self.handle = self.handle, None  # type: ignore[assignment]  # nobody asks again
        if handle:
            lc.llama_model_free(handle)


def load_model(path: Path, *, vocab_only: bool = False) -> Model:
    """Load a GGUF file whose header was checked before; weights stay mapped, on the CPU.

    Raises :class:`Unsupported` (``unsupported_architecture``) and :class:`CorruptData`
    (``model_refused``) with llama.cpp's own words.
    """
    initialise()
    params = lc.llama_model_default_params()
    params.n_gpu_layers = 0
    params.vocab_only = vocab_only
    complaints()
    handle = lc.llama_model_load_from_file(os.fsencode(path), params)
    if handle:
        return Model(handle)
    text = complaints() or "no reason given"
    if "unknown model architecture" in text:
        raise Unsupported(
            f"llama.cpp {VERSION} does not know the architecture of {path.name}: {text}",
            code="unsupported_architecture",
        )
    raise CorruptData(
        f"llama.cpp refused {path.name}: {text}",
        code="model_refused",
        remedy="Get the model file again.",
    )
