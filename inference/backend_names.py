"""The names of the backends, what is known of them on a node, and which is chosen.  Pure.

``auto`` takes the first of :data:`PREFERENCE` that is installed and computes on something better
than the processor, else llama.cpp, which is always there and the fastest on processors.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, cast, get_args

import msgspec

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.base.types import AUTO_BACKEND
from pyagent_node.native import blake3

BackendName = Literal["llama.cpp", "torch", "mlx"]
BACKENDS: Final[tuple[BackendName, ...]] = get_args(BackendName)
"""Every backend, the one that every node has first."""
AUTO: Final = AUTO_BACKEND
"""Asks for the best backend of each node."""
CHOICES: Final = (AUTO, *BACKENDS)
"""What the load option ``backend`` takes."""
DEFAULT: Final[BackendName] = "llama.cpp"
PREFERENCE: Final[tuple[BackendName, ...]] = ("mlx", "torch")
"""Backends that are better than llama.cpp where they have an accelerator."""


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


MAX_CLASSES: Final = 8
"""Exactness classes that ranks of one pipeline may be of."""
MAX_CLASS: Final = 64
"""Characters of the name of one."""
ADOPTED: Final = "+kv"
"""What the class of a rank ends in that goes on from KV that another class computed."""


def is_adopted(name: str) -> bool:
    """Whether a class is that of a rank that went on from KV of another class."""
    return name.endswith(ADOPTED)


def joined_classes(before: tuple[str, ...], own: str) -> tuple[str, ...]:
    """Return the exactness classes of the ranks up to one of class ``own``, which may be empty."""
    return before if not own or own in before else tuple(sorted((*before, own)))


def rooted(root: bytes, classes: tuple[str, ...]) -> bytes:
    """Return what the names of KV blocks begin with behind ranks of these classes.

    The bits of a block depend on every layer before: only ranks behind the same classes share.
    Where all is llama.cpp's the names are those of a plain root.
    """
    if not root or all(each.startswith(f"{DEFAULT}/") for each in classes):
        return root
    return blake3(b"\0".join((root, *(each.encode() for each in classes))))


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


def install_hint(name: str) -> str:
    """Return the command that installs a backend."""
    extra = None if name == DEFAULT else name
    what = "pyagent-node" if extra is None else f"'pyagent-node[{extra}]'"
    return f"Install it: pip install {what}"
