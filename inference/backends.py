"""Which backends there are: what each needs, whether it is installed here, and which is chosen.

A backend's library is loaded in the runner process alone, and only when its slice is; here it is
looked for without importing it.  ``auto`` takes the first of :data:`PREFERENCE` that is installed
and computes on something better than the processor, else llama.cpp, which is always there and the
fastest on processors.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, cast, get_args

import msgspec

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.base.types import Slice
from pyagent_node.inference.backend import Backend

BackendName = Literal["llama.cpp", "torch", "mlx"]
BACKENDS: Final[tuple[BackendName, ...]] = get_args(BackendName)
"""Every backend, the one that every node has first."""
AUTO: Final = "auto"
"""Asks for the best backend of each node."""
CHOICES: Final = (AUTO, *BACKENDS)
"""What the load option ``backend`` takes."""
DEFAULT: Final[BackendName] = "llama.cpp"
PREFERENCE: Final[tuple[BackendName, ...]] = ("mlx", "torch")
"""Backends that are better than llama.cpp where they have an accelerator."""


class _Library(NamedTuple):
    """``module`` and ``package`` are what is imported and what it is installed as."""

    module: str
    package: str
    extra: str | None


_LIBRARIES: Final[dict[BackendName, _Library]] = {
    "llama.cpp": _Library("llama_cpp", "llama-cpp-python", None),
    "torch": _Library("torch", "torch", "torch"),
    "mlx": _Library("mlx.core", "mlx", "mlx"),
}


class BackendState(msgspec.Struct, frozen=True):
    """A backend on this machine; ``version`` is empty where it is not installed.

    ``device`` is what it would compute on: ``cpu``, ``cuda``, ``mps`` or ``metal``.
    """

    name: str
    version: str
    device: str

    @property
    def installed(self) -> bool:
        """Whether it can be used."""
        return bool(self.version)

    @property
    def accelerated(self) -> bool:
        """Whether it computes on something better than the processor."""
        return self.installed and self.device != "cpu"


class Choice(NamedTuple):
    """The backend that was chosen, and why, in a few words."""

    name: BackendName
    why: str


def check_choice(name: str) -> str:
    """Return ``name`` if it may be asked for; raises :class:`InvalidRequest` (``bad_backend``)."""
    if name not in CHOICES:
        raise InvalidRequest(
            f"There is no backend {name[:40]!r}.",
            code="bad_backend",
            remedy=f"Choose one of {', '.join(CHOICES)}.",
        )
    return name


def survey(device: Callable[[BackendName], str] | None = None) -> tuple[BackendState, ...]:
    """Return every backend with what is known of it here, without loading its library."""
    look = device or _device
    return tuple(
        BackendState(name, version := _version(name), look(name) if version else "cpu")
        for name in BACKENDS
    )


def choose(wanted: str, states: Iterable[BackendState]) -> Choice:
    """Return the backend for ``wanted``, a name or :data:`AUTO`.

    Raises :class:`InvalidRequest` (``bad_backend``) and :class:`Unsupported`
    (``backend_missing``), which says what to install.
    """
    check_choice(wanted)
    known = {state.name: state for state in states}
    if wanted != AUTO:
        name = cast(BackendName, wanted)
        if name not in known or not known[name].installed:
            raise missing(name)
        return Choice(name, "as asked for")
    for name in PREFERENCE:
        if name in known and known[name].accelerated:
            return Choice(name, f"it computes on {known[name].device}")
    return Choice(DEFAULT, "the fastest on a processor")


def missing(name: BackendName) -> Unsupported:
    """Return the error for a backend whose library is not installed."""
    return Unsupported(
        f"The backend {name} is not installed on this machine.",
        code="backend_missing",
        remedy=install_hint(name),
        backend=name,
    )


def install_hint(name: BackendName) -> str:
    """Return the command that installs a backend."""
    extra = _LIBRARIES[name].extra
    what = "pyagent-node" if extra is None else f"'pyagent-node[{extra}]'"
    return f"Install it: pip install {what}"


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


def names(states: Sequence[BackendState]) -> tuple[str, ...]:
    """Return the names of those that are installed."""
    return tuple(state.name for state in states if state.installed)


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
