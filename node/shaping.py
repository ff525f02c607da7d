"""A slow link on purpose: when what a node writes to a connection leaves it.  Pure.

For trying a mesh out on one fast network, without root: ``up --shape "rtt=80ms,rate=50mbit"``
delays what this node sends by half of the round trip and lets it out at the rate; with the same
shape on every node, the round trip between any two is the one named.  A connection is a stream, so
nothing is lost or overtaken here; the WAN lab (``simulations/lab``) does that, to packets.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest

MAX_DELAY_SECONDS: Final = 10.0
"""Longest round trip and jitter that may be asked for."""
MIN_RATE: Final = 8_000.0
MAX_RATE: Final = 1e12
"""Bounds of a rate, in bits a second."""

_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(us|ms|s)")
_SECONDS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATE: Final = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmg]?)bit(?:/s|ps)?", re.IGNORECASE)
_BITS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
MAX_TEXT: Final = 200


class Shape(msgspec.Struct, frozen=True):
    """What a link is like: round trip, its spread, and bits a second (``None``: no bound).

    ``jitter`` is how much each write's delay differs at most from half of the round trip, either
    way; both are in seconds.
    """

    rtt: float = 0.0
    jitter: float = 0.0
    rate: float | None = None


def parse_duration(text: str) -> float:
    """Return the seconds in ``"80ms"``, ``"1.5s"`` or ``"300us"``.

    Raises :class:`InvalidRequest` (``bad_shape``).
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else MAX_DELAY_SECONDS + 1
    if seconds > MAX_DELAY_SECONDS:
        raise InvalidRequest(
            f"{text[:40]!r} is no time from 0 to {MAX_DELAY_SECONDS:g} s.",
            code="bad_shape",
            remedy="Write it as 80ms, 300us or 1.5s.",
        )
    return seconds


def parse_rate(text: str) -> float:
    """Return the bits a second in ``"50mbit"``, ``"1.5gbit"`` or ``"512kbit"``.

    Raises :class:`InvalidRequest` (``bad_shape``).
    """
    match = _RATE.fullmatch(text.strip())
    rate = float(match[1]) * _BITS[match[2].lower()] if match else 0.0
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequest(
            f"{text[:40]!r} is no rate from 8kbit to 1000gbit.",
            code="bad_shape",
            remedy="Write it as 50mbit, 512kbit or 1gbit (bits a second).",
        )
    return rate


def parse_shape(text: str) -> Shape | None:
    """Read ``"rtt=80ms,rate=50mbit,jitter=5ms"``, each part at most once; empty text is ``None``.

    Raises :class:`InvalidRequest` (``bad_shape``) that says what is allowed.
    """
    if not text.strip():
        return None
    if len(text) > MAX_TEXT:
        raise _bad("the text is too long")
    parts: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise _bad(f"{part.strip()[:40]!r} is not NAME=VALUE")
        if name == "loss":
            raise _bad("a connection loses no bytes, so it cannot be shaped to; `lab run` can")
        if name not in ("rtt", "rate", "jitter"):
            raise _bad(f"{name[:40]!r} is not known")
        if name in parts:
            raise _bad(f"{name} is there twice")
        parts[name] = value
    shape = Shape(
        rtt=parse_duration(parts["rtt"]) if "rtt" in parts else 0.0,
        jitter=parse_duration(parts["jitter"]) if "jitter" in parts else 0.0,
        rate=parse_rate(parts["rate"]) if "rate" in parts else None,
    )
    if shape.jitter > shape.rtt / 2:
        raise _bad("jitter is more than half of rtt")
    return shape


def _bad(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The shape of the links is wrong: {why}.",
        code="bad_shape",
        remedy='Write it as "rtt=80ms,rate=50mbit,jitter=5ms", any of the three.',
    )


class Pacer:
    """One direction of one connection: when bytes that are written now reach the other end.

    The bytes queue for the rate first and travel then; what was written earlier arrives earlier.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._sent_at = 0.0
        self._arrives_at = 0.0

    def write(self, size: int, now: float, draw: float) -> tuple[float, float]:
        """Take ``size`` bytes at ``now``; return when they are sent and when they arrive.

        ``draw`` in [0, 1) decides the jitter.
        """
        shape = self._shape
        begin = max(now, self._sent_at)
        self._sent_at = begin if shape.rate is None else begin + size * 8 / shape.rate
        delay = shape.rtt / 2 + shape.jitter * (2 * draw - 1)
        self._arrives_at = max(self._arrives_at, self._sent_at + delay)
        return self._sent_at, self._arrives_at
