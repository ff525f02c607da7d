"""Whose KV a session's ranks go on from: which classes computed it, and under which names it lies.

The bits of a block depend on the exactness class of every rank before, so its name does, too
(``backend_names.rooted``).  When a failover brings a rank of another class, its blocks and those of
the ranks behind it would be looked for under names that nobody has used, and the whole context be
computed again.  Instead the head tells the new ranks where the KV of before lies
(``OpenSession.former``): they *adopt* it.  What they compute on top of that is no class's own, so
such a rank is of a class of its own (its name ends in :data:`ADOPTED`, in the reply, too), and
the names of its blocks are the session's alone.  Ranks whose names come out as before adopt
nothing: a failover within a class is exact as ever.  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import SessionId, Slice
from pyagent_node.inference.backend import PREFILL_CHUNK
from pyagent_node.inference.backend_names import (
    ADOPTED,
    MAX_CLASS,
    is_adopted,
    joined_classes,
    rooted,
)
from pyagent_node.native import blake3
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, LINK_BYTES

CUTS: Final = range(BLOCK_TOKENS, PREFILL_CHUNK + 1, BLOCK_TOKENS)
"""What a rank may say of the places where a prompt can be cut."""
MAX_ORIGINS: Final = 256
"""Ranks that a session may say this of."""


class Origin(msgspec.Struct, frozen=True, gc=False):
    """One rank of a session: its first layer, its class, and what its blocks' names depend on.

    ``root`` is what they begin with, ``cut`` is as in ``OpenSession``.
    """

    first: int
    label: str
    root: bytes
    cut: int = BLOCK_TOKENS


class Source(NamedTuple):
    """Under which names the blocks lie that a rank begins from; see :class:`Origin`."""

    root: bytes
    cut: int


class Roots(NamedTuple):
    """What a rank makes of an opening.

    ``classes`` are those of the ranks up to this one, which is ``origin`` (but for its cut); its
    blocks are looked for under the names of ``source``, or also its own.
    """

    classes: tuple[str, ...]
    origin: Origin
    source: Source | None = None


def roots(
    root: bytes,
    classes: tuple[str, ...],
    trail: Sequence[Origin],
    former: Sequence[Origin],
    *,
    session: SessionId,
    part: Slice,
    own: str,
) -> Roots:
    """Return the names of a rank that holds ``part`` and is of the class ``own``.

    ``root``, ``classes``, ``trail`` (the ranks before) and ``former`` (the ranks of before) are as
    in ``OpenSession``.
    """

    def named(label: str) -> Roots:
        joined = joined_classes(classes, label)
        origins = (*trail, Origin(part.first, label, b""))
        name = block_root(root, joined, origins, session=session)
        return Roots(joined, Origin(part.first, label, name))

    plain = named(own)
    source = _source(former, part)
    if not root or not own or source is None or source.root == plain.origin.root:
        return plain
    return named(adopting(own))._replace(source=source)


def block_root(
    root: bytes, classes: tuple[str, ...], origins: Sequence[Origin], *, session: SessionId
) -> bytes:
    """Return what the names of blocks begin with on the last rank of ``origins``.

    ``root`` is what a request says, ``classes`` are those of these ranks and their crossings.
    """
    name, runs = rooted(root, classes), _runs(origins)
    if name and len(runs) > 1:  # the same classes may meet at another layer
        name = blake3(b"\0".join((name, *(b"%d %s" % (at, of.encode()) for at, of in runs))))
    if name and any(is_adopted(label) for _, label in runs):
        name = blake3(b"\0".join((name, session.encode())))
    return name


def adopting(label: str) -> str:
    """Return the class of a rank that goes on from the KV of another one."""
    return label[: MAX_CLASS - len(ADOPTED)] + ADOPTED


def check_origins(origins: Sequence[Origin]) -> None:
    """Check what is said of the ranks of a session.

    Raises :class:`InvalidRequest` (``bad_parameter``).
    """
    wrong = len(origins) > MAX_ORIGINS or any(
        origin.first < 0
        or len(origin.label) > MAX_CLASS
        or len(origin.root) not in (0, LINK_BYTES)
        or origin.cut not in CUTS
        for origin in origins
    )
    if wrong:
        raise InvalidRequest(
            "A session says of its ranks what cannot be.", code="bad_parameter", parameter="trail"
        )


def _runs(origins: Sequence[Origin]) -> list[tuple[int, str]]:
    """Return where which class begins; neighbours of one class are one."""
    found: list[tuple[int, str]] = []
    for origin in origins:
        if origin.label and (not found or found[-1][1] != origin.label):
            found.append((origin.first, origin.label))
    return found


def _source(former: Sequence[Origin], part: Slice) -> Source | None:
    """Return the names under which all layers of ``part`` lay, ``None`` if there are none."""
    stops = [origin.first for origin in former[1:]]
    found = {
        Source(origin.root, origin.cut)
        for origin, stop in zip(former, [*stops, part.last], strict=False)
        if origin.first < part.last and stop > part.first
    }
    return found.pop() if len(found) == 1 else None
