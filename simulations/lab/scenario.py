"""What a scenario file says: places, links, events, the model and the question.  Pure.

The format is TOML; ``docs/lab.md`` describes it.  Whatever is wrong is a :class:`ConfigError`
(``bad_scenario``) that names the place in the file and what is allowed there.
"""

from __future__ import annotations

import tomllib
from typing import Annotated, Final

import msgspec

from pyagent_node.base.limits import KIB
from pyagent_node.simulations.lab.link import LinkSpec
from pyagent_node.simulations.lab.parts import (
    MAX_HOSTS,
    BetweenTable,
    Host,
    LinkTable,
    SiteTable,
    Strict,
    bad_scenario,
    check_name,
    read_hosts,
    read_link,
)
from pyagent_node.simulations.lab.timeline import Event, Pair, Timeline, read_timeline

MAX_FILE: Final = 64 * KIB
MAX_ABOUT: Final = 400

Count = Annotated[int, msgspec.Meta(ge=0, le=4)]


class ModelPlan(Strict, frozen=True):
    """What is loaded where.  ``everywhere``: every host has the file before the daemons start.

    Otherwise the first host has it and the others fetch their slices over the links.  ``layers``
    are the inner boundaries between ranks; without them ``ranks`` cuts evenly.  ``on`` names the
    hosts of the ranks in order (default: the first ones).
    """

    source: Annotated[str, msgspec.Meta(min_length=1, max_length=400)] = "smollm2-135m"
    ranks: Annotated[int, msgspec.Meta(ge=1, le=MAX_HOSTS)] | None = None
    layers: tuple[int, ...] | None = None
    on: tuple[str, ...] | None = None
    everywhere: bool = True
    standbys: Count = 0
    spares: Count = 0


class Question(Strict, frozen=True):
    """What is asked, and of which host (default: the first)."""

    of: str | None = None
    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=4000)] = "Name three rivers."
    tokens: Annotated[int, msgspec.Meta(ge=2, le=1500)] = 48
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 7
    temperature: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.8


class _File(Strict, frozen=True, kw_only=True):
    name: str
    about: Annotated[str, msgspec.Meta(max_length=MAX_ABOUT)] = ""
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    site: tuple[SiteTable, ...]
    lan: LinkTable = LinkTable()
    wan: LinkTable = LinkTable()
    link: tuple[BetweenTable, ...] = ()
    event: tuple[Event, ...] = ()
    model: ModelPlan = ModelPlan()
    answer: Question = Question()


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A checked scenario.

    ``links`` holds the link of every pair of sites, and of each site alone for the hosts in it.
    """

    name: str
    about: str
    seed: int
    hosts: tuple[Host, ...]
    links: dict[Pair, LinkSpec]
    timeline: Timeline
    model: ModelPlan
    answer: Question

    def between(self, one: Host, other: Host) -> LinkSpec:
        """Return the link between two hosts as it is at the beginning."""
        return self.links[frozenset((one.site, other.site))]

    @property
    def asked(self) -> str:
        """The host that is asked."""
        return self.answer.of or self.hosts[0].name

    @property
    def holders(self) -> tuple[str, ...]:
        """The hosts of the ranks, in order."""
        names = self.model.on or tuple(host.name for host in self.hosts)
        return names[: self.rank_count]

    @property
    def rank_count(self) -> int:
        """Into how many ranks the model is cut."""
        plan = self.model
        if plan.layers is not None:
            return len(plan.layers) + 1
        return plan.ranks or len(plan.on or self.hosts)


def parse_scenario(text: str) -> Scenario:
    """Read a scenario; raises :class:`ConfigError` (``bad_scenario``)."""
    if len(text) > MAX_FILE:
        raise bad_scenario("it is longer than 64 KiB")
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, RecursionError) as error:
        why = str(error).replace("Object", "The table").replace("`$.", "`")
        raise bad_scenario(why.rstrip(".")) from None
    check_name(file.name, "name")
    hosts = read_hosts(file.site)
    links = _links(file)
    asked = file.answer.of or hosts[0].name
    if asked not in {host.name for host in hosts}:
        raise bad_scenario(f"answer.of is {asked[:40]!r}, which is no host")
    _check_plan(file.model, [host.name for host in hosts])
    return Scenario(
        name=file.name,
        about=file.about,
        seed=file.seed,
        hosts=hosts,
        links=links,
        timeline=read_timeline(file.event, hosts, links.__getitem__, asked),
        model=file.model,
        answer=file.answer,
    )


def _links(file: _File) -> dict[Pair, LinkSpec]:
    sites = [site.name for site in file.site]
    wan = read_link(file.wan, LinkSpec(), "wan")
    lan = read_link(file.lan, LinkSpec(), "lan")
    links = {frozenset((a, b)): wan if a != b else lan for a in sites for b in sites}
    seen: set[Pair] = set()
    for number, table in enumerate(file.link):
        where = f"link[{number}]"
        pair = frozenset(table.between)
        if pair not in links:
            raise bad_scenario(f"{where}.between is {list(table.between)}: name sites")
        if pair in seen:
            raise bad_scenario(f"{where} describes a link that was described before")
        seen.add(pair)
        links[pair] = read_link(table, links[pair], where)
    return links


def _check_plan(plan: ModelPlan, names: list[str]) -> None:
    if plan.on is not None:
        unknown = [name for name in plan.on if name not in names]
        if unknown or not plan.on or len(set(plan.on)) != len(plan.on):
            raise bad_scenario(f"model.on must name different hosts of {', '.join(names)}")
    if plan.ranks is not None and plan.layers is not None:
        raise bad_scenario("model has both ranks and layers; give one")
    if plan.layers is not None and (
        sorted(set(plan.layers)) != list(plan.layers) or min(plan.layers, default=1) < 1
    ):
        raise bad_scenario("model.layers must grow and begin above 0")
    able = len(names if plan.on is None else plan.on)
    count = len(plan.layers) + 1 if plan.layers is not None else plan.ranks or able
    if count > able:
        raise bad_scenario(f"the model has {count} ranks, more than hosts to hold them")
