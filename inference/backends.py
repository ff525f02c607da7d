"""Which backends are installed here, and loading a slice with one of them.

A backend's library is loaded in the runner process alone, and only when its slice is; here it is
looked for without importing it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from pyagent_node.base.errors import Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import Backend
from pyagent_node.inference.backend_names import (
    AUTO,
    BACKENDS,
    DEFAULT,
    BackendName,
    BackendState,
    choose,
    missing,
)

logger = logging.getLogger("pyagent_node.backends")


class _Library(NamedTuple):
    """``module`` and ``package`` are what is imported and what it is installed as."""

    module: str
    package: str


_LIBRARIES: Final[dict[BackendName, _Library]] = {
    "llama.cpp": _Library("llama_cpp", "llama-cpp-python"),
    "torch": _Library("torch", "torch"),
    "mlx": _Library("mlx.core", "mlx"),
}


def survey(device: Callable[[BackendName], str] | None = None) -> tuple[BackendState, ...]:
    """Return every backend with what is known of it here, without loading its library."""
    look = device or _device
    return tuple(
        BackendState(name, version := _version(name), look(name) if version else "cpu")
        for name in BACKENDS
    )


def open_chosen(
    wanted: str, path: Path, part: Slice, *, n_ctx: int, n_seq: int, threads: int
) -> Backend:
    """Load a slice with the backend of :func:`choose`; errors of both.

    Where the choice is free and the backend does not know the model, llama.cpp takes it.
    """
    name, why = choose(wanted, survey())
    logger.info("layers %s: %s (%s)", part, name, why)
    try:
        return open_backend(name, path, part, n_ctx=n_ctx, n_seq=n_seq, threads=threads)
    except Unsupported as error:
        if wanted != AUTO or name == DEFAULT:
            raise
        logger.warning("%s cannot take layers %s: %s", name, part, error.message)
    return open_backend(DEFAULT, path, part, n_ctx=n_ctx, n_seq=n_seq, threads=threads)


def open_backend(
    name: BackendName, path: Path, part: Slice, *, n_ctx: int, n_seq: int, threads: int
) -> Backend:
    """Load a slice in this process; raises what the backend's class raises, or ``backend_missing``.

    ``path`` is the slice's own GGUF file, or the whole model's for all of it.
    """
    if not _version(name):
        raise missing(name)
    if name == "mlx":
        from pyagent_node.inference.mlx_backend.backend import MlxBackend  # noqa: PLC0415 - extra

        return MlxBackend(path, part, n_ctx=n_ctx, n_seq=n_seq, threads=threads)
    if name == "torch":
        from pyagent_node.inference.torch_backend.backend import TorchBackend  # noqa: PLC0415 - heavy

        return TorchBackend(path, part, n_ctx=n_ctx, n_seq=n_seq, threads=threads)
    from pyagent_node.inference.llama.backend import LlamaBackend  # noqa: PLC0415 - heavy

    return LlamaBackend(path, part, n_ctx=n_ctx, n_seq=n_seq, threads=threads)


def _version(name: BackendName) -> str:
    library = _LIBRARIES[name]
    top = library.module.partition(".")[0]
    try:
        if importlib.util.find_spec(top) is None:
            return ""
        return importlib.metadata.version(library.package)
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        return ""


def _device(name: BackendName) -> str:
    """Say what a backend would compute on, as far as that shows without loading its library."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    if name == "mlx":
        return "metal" if apple else "cpu"
    if name == "torch":
        if apple:
            return "mps"
        return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"
    return "cpu"
