"""What the store says of a model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import msgspec

from pyagent_node.base.errors import NotFound, PyAgentError
from pyagent_node.base.files import read_limited, write_atomic
from pyagent_node.base.types import Digest

_FILE: Final = "about"
_LIMIT: Final = 65536


class About(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this node calls a model and where the whole file came from.

    ``sha256`` is that of the file as 64 hexadecimal digits, empty when unknown.
    """

    name: str
    source: str = ""
    sha256: str = ""


class StoredModel(msgspec.Struct, frozen=True):
    """A model as the store holds it.

    ``path`` is the whole file, ``None`` while only parts are here; ``bytes_held`` counts verified
    bytes of the original file; ``slices`` are those that were written out.
    """

    digest: Digest
    about: About
    size: int
    manifest: Digest
    path: Path | None
    bytes_held: int
    slices: tuple[str, ...]

    @property
    def name(self) -> str:
        """What this node calls it."""
        return self.about.name


def read_about(folder: Path, digest: Digest) -> About:
    """Return what is written beside a model; a missing or damaged note gives a name of its own."""
    with contextlib.suppress(PyAgentError, msgspec.DecodeError, ValueError):
        return msgspec.json.decode(read_limited(folder / _FILE, _LIMIT), type=About)
    return About(name=digest[:16])


def write_about(folder: Path, about: About) -> None:
    """Write the note beside a model."""
    write_atomic(folder / _FILE, msgspec.json.encode(about))


def unknown_model(name: str) -> NotFound:
    """Return the error for a model that the store does not have."""
    return NotFound(
        f"There is no model {name[:80]!r} on this node.",
        code="model_not_found",
        remedy="See: pyagent-node model list",
    )
