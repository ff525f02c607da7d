"""The pieces of a scenario file: places, links, times and how they are written.  Pure.

Whatever is wrong is a :class:`ConfigError` (``bad_scenario``) that names the place in the file and
what is allowed there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from pyagent_node.base.errors import ConfigError, InvalidRequest
from pyagent_node.base.limits import KIB, MIB
from pyagent_node.node.shaping import parse_duration, parse_rate
from pyagent_node.simulations.lab.link import LinkSpec

MAX_HOSTS: Final = 16
MAX_QUEUE: Final = 16 * MIB
MIN_QUEUE: Final = 2 * KIB
MAX_SPAN: Final = 3600.0
_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,23}")
_LOSS: Final = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_SIZE: Final = re.compile(r"(\d{1,9})\s*(B|KiB|MiB)")
_UNITS: Final = {"B": 1, "KiB": KIB, "MiB": MIB}
_SPAN: Final = re.compile(r"(\d{1,5}(?:\.\d{1,3})?)\s*(ms|s|min)")
_SPANS: Final = {"ms": 1e-3, "s": 1.0, "min": 60.0}


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table in which every word must be known."""


class LinkTable(Strict, frozen=True):
    """A link as the file describes it; what is left out is as it was (at first: perfect)."""

    rtt: str | None = None
    jitter: str | None = None
    loss: str | None = None
    rate: str | None = None
    queue: str | None = None


class SiteTable(Strict, frozen=True):
    """A place with machines in it."""

    name: str
    hosts: Annotated[int, msgspec.Meta(ge=1, le=MAX_HOSTS)] = 1


class BetweenTable(LinkTable, frozen=True, kw_only=True):
    """The link between two sites, where it differs from ``[wan]``."""

    between: tuple[str, str]


class Host(msgspec.Struct, frozen=True):
    """One machine of the lab and the place where it stands."""

    name: str
    site: str


def bad_scenario(why: str) -> ConfigError:
    """Return the error that says what is wrong in the file."""
    return ConfigError(
        f"The scenario is wrong: {why}.",
        code="bad_scenario",
        remedy="docs/lab.md describes the format; `pyagent-node lab list` names those there are.",
    )


def check_name(name: str, where: str) -> None:
    """Refuse a name that is no name."""
    if not _NAME.fullmatch(name):
        raise bad_scenario(
            f"{where} is {name[:40]!r}: use up to 24 of a-z, 0-9 and -, beginning with a letter"
        )


def read_hosts(sites: Sequence[SiteTable]) -> tuple[Host, ...]:
    """Return the machines: ``site`` where there is one, else ``site-1``, ``site-2`` and so on."""
    hosts: list[Host] = []
    for number, site in enumerate(sites):
        check_name(site.name, f"site[{number}].name")
        many = site.hosts > 1
        names = [f"{site.name}-{i + 1}" if many else site.name for i in range(site.hosts)]
        hosts += [Host(name, site.name) for name in names]
    names = [host.name for host in hosts] + [site.name for site in sites if site.hosts > 1]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise bad_scenario(f"{twice[0]!r} is the name of two places")
    if not 2 <= len(hosts) <= MAX_HOSTS:
        raise bad_scenario(f"it has {len(hosts)} hosts; allowed are 2 to {MAX_HOSTS}")
    return tuple(hosts)


def read_link(table: LinkTable, base: LinkSpec, where: str) -> LinkSpec:
    """Return ``base`` with what the table says instead."""
    try:
        rtt = 2 * base.delay if table.rtt is None else parse_duration(table.rtt)
        jitter = base.jitter if table.jitter is None else parse_duration(table.jitter)
        rate = base.rate if table.rate is None else parse_rate(table.rate)
    except InvalidRequest as error:
        raise bad_scenario(f"{where}: {error.message} {error.remedy or ''}".rstrip(". ")) from None
    if jitter > rtt / 2:
        raise bad_scenario(f"{where}: jitter is more than half of rtt")
    loss = base.loss
    if table.loss is not None:
        percent = _LOSS.fullmatch(table.loss.strip())
        if percent is None or float(percent[1]) > 100:
            raise bad_scenario(f"{where}: loss is {table.loss[:40]!r}; write it as 1% or 0.25%")
        loss = float(percent[1]) / 100
    queue = base.queue
    if table.queue is not None:
        if rate is None:
            raise bad_scenario(f"{where}: queue means nothing without rate")
        match = _SIZE.fullmatch(table.queue.strip())
        queue = int(match[1]) * _UNITS[match[2]] if match else 0
        if not MIN_QUEUE <= queue <= MAX_QUEUE:
            raise bad_scenario(
                f"{where}: queue is {table.queue[:40]!r}; write it as 256KiB (2KiB to 16MiB)"
            )
    return LinkSpec(
        delay=rtt / 2, jitter=jitter, loss=loss, rate=rate, queue=queue, burst=base.burst
    )


def read_span(text: str, where: str) -> float:
    """Return the seconds in ``10s``, ``500ms`` or ``2min``."""
    match = _SPAN.fullmatch(text.strip())
    seconds = float(match[1]) * _SPANS[match[2]] if match else -1.0
    if not 0 <= seconds <= MAX_SPAN:
        raise bad_scenario(
            f"{where} is {text[:40]!r}; write it as 10s, 500ms or 2min (up to 60min)"
        )
    return seconds


def read_side(side: Sequence[str], hosts: Sequence[Host], where: str) -> frozenset[str]:
    """Return the host names that a list of sites and hosts stands for."""
    members: set[str] = set()
    for name in side:
        named = {host.name for host in hosts if name in (host.name, host.site)}
        if not named:
            raise bad_scenario(f"{where} names {name[:40]!r}, which is no site or host")
        members |= named
    if not members:
        raise bad_scenario(f"{where} has an empty side")
    return frozenset(members)
