"""Lists that benches take as one word: ``1,4,16`` or ``code,prose``."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pyagent_node.base.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Number = TypeVar("Number", int, float)
Name = TypeVar("Name", bound=str)

SHOWN = 80
"""Characters of what was given that a message shows."""


def numbers(
    option: str,
    text: str,
    read: Callable[[str], Number],
    *,
    least: Number,
    most: Number,
    remedy: str,
) -> tuple[Number, ...]:
    """Read numbers from ``least`` to ``most``, with commas; of equals the first is left.

    Raises :class:`InvalidRequest` (``usage``) with what ``option`` was, and ``remedy``.
    """
    try:
        asked = tuple(dict.fromkeys(read(part) for part in text.split(",")))
    except ValueError:
        asked = ()
    if not asked or not all(least <= number <= most for number in asked):
        raise refused(option, text, remedy)
    return asked


def names(option: str, text: str, known: Sequence[Name]) -> tuple[Name, ...]:
    """Read some of ``known``, with commas; of equals the first is left.

    Raises :class:`InvalidRequest` (``usage``).
    """
    asked = dict.fromkeys(part.strip() for part in text.split(","))
    found: dict[str, Name] = {name: name for name in known}
    if not all(name in found for name in asked):
        raise refused(option, text, f"Write some of these with commas: {','.join(known)}.")
    return tuple(found[name] for name in asked)


def refused(option: str, text: str, remedy: str) -> InvalidRequest:
    """Return the error for a list that cannot be read."""
    return InvalidRequest(f"{option} is {text[:SHOWN]!r}.", code="usage", remedy=remedy)
