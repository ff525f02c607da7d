"""Somebody who adds documents to a context of the swarm, changes them, and asks for what they say.

Every document says in its text which version it is and holds a word of its own, so whatever comes
back shows what it is.  A document that a node took must never be lost, and once a node knows of a
version it must not answer from an older one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import ContextId, ContextPolicy
from pyagent_node.consensus.commands import CreateContext, SetMeshSetting
from pyagent_node.sharding.context.port import Answer
from pyagent_node.sharding.context.records import ChunkId, Version
from pyagent_node.simulations.contexts import ENCODER, toy_document, toy_vector

if TYPE_CHECKING:
    from pyagent_node.node.context_mesh import ContextService
    from pyagent_node.simulations.swarm import Swarm

NAME: Final = "shelf"
PATIENCE: Final = 5
"""Seconds that a node may be away before others get its chunks."""
ADD_SECONDS: Final = 1.5
ASK_SECONDS: Final = 0.7
RESIZE_SECONDS: Final = 8.0
HITS: Final = 4
SENTENCES: Final = 8
_SOUNDS: Final = (
    "ba",
    "de",
    "fi",
    "go",
    "ku",
    "la",
    "me",
    "ni",
    "po",
    "ru",
    "sa",
    "te",
    "vi",
    "zo",
)


class Acknowledged(NamedTuple):
    """A document as a node took it."""

    version: Version
    edition: int
    chunks: tuple[ChunkId, ...]


class Librarian:
    """``shelf`` holds, by source, what nodes have taken."""

    def __init__(self, swarm: Swarm, rng: random.Random) -> None:
        self.info: ContextInfo | None = None
        self.shelf: dict[str, Acknowledged] = {}
        self.asked = 0
        self._swarm = swarm
        self._rng = rng
        self._editions: dict[str, int] = {}
        self._made: dict[tuple[str, Version], int] = {}
        """The last edition of each version: one may have been tried before at the same node."""

    async def open(self) -> None:
        """Have a context made."""
        info = ContextInfo(NAME, ContextId(self._rng.randbytes(16)), ContextPolicy(), ENCODER, 0)
        await self._swarm.propose(SetMeshSetting("context_patience", PATIENCE))
        if await self._swarm.propose(CreateContext(info)) is None:
            self._swarm.violation("contexts", "no context could be made")
            return
        self.info = info

    async def run(self) -> None:
        """Add and ask for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._add_for_ever, nursery)
            nursery.start_soon(self._ask_for_ever, nursery)
            nursery.start_soon(self._resize_for_ever)

    async def _resize_for_ever(self) -> None:
        """Have the sketches spread over the nodes, and brought back to all of them."""
        rng = random.Random(self._rng.random())  # noqa: S311 - must repeat itself
        while True:
            await trio.sleep(rng.uniform(0.2, 1.0) * RESIZE_SECONDS)
            limit = rng.choice((0, 0, None))
            await self._swarm.propose(SetMeshSetting("context_index_bytes", limit))

    async def _add_for_ever(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(self._rng.uniform(0.5, 1.5) * ADD_SECONDS)
            number = self._rng.randrange(2 * len(self.shelf) + 2)
            service = self._somebody()
            if service is not None:
                nursery.start_soon(self._add, f"leaf{number}.txt", service)

    async def _ask_for_ever(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(self._rng.uniform(0.5, 1.5) * ASK_SECONDS)
            service = self._somebody()
            if service is not None and self.shelf:
                source = self._rng.choice(sorted(self.shelf))
                nursery.start_soon(self._ask, source, service)

    def _somebody(self) -> ContextService | None:
        up = [m.parts for m in self._swarm.machines if m.parts is not None and not m.gone]
        return self._rng.choice(up).contexts if up else None

    async def _add(self, source: str, service: ContextService) -> None:
        if self.info is None or self.info.name not in {c.name for c in service.contexts()}:
            return
        edition = self._editions[source] = self._editions.get(source, 0) + 1
        version = service.catalog(self.info.id).next_version(source, service.peer_id)
        record, bodies = toy_document(self.info.id, source, text_of(source, edition), version)
        number = self._number(service)
        self._made[source, version] = edition
        try:
            await service.publish(record, bodies)
        except PyAgentError as error:
            self._swarm.trace.add(number, "librarian", f"{source}: {error.code}")
            return
        known = self.shelf.get(source)
        if known is None or known.version < version:
            self.shelf[source] = Acknowledged(version, edition, tuple(b.id for b in bodies))
        self._swarm.trace.add(number, "librarian", f"{source} edition {edition}")

    async def _ask(self, source: str, service: ContextService) -> Answer | None:
        if self.info is None:
            return None
        known = service.catalog(self.info.id).get(source)
        question = question_of(source)
        try:
            answer = await service.search(self.info, question, toy_vector(question), count=HITS)
        except PyAgentError as error:
            self._swarm.trace.add(self._number(service), "librarian", error.code)
            return None
        self.asked += 1
        for hit in answer.hits:
            old = known is not None and hit.version < known.record.version
            edition = self._made.get((hit.source, hit.version), 0)
            if (hit.source == source and old) or hit.text not in text_of(hit.source, edition):
                self._swarm.violation(
                    "contexts",
                    f"node {self._number(service)} answered from an old version of {hit.source}",
                )
        return answer

    def _number(self, service: ContextService) -> int:
        return next(m.number for m in self._swarm.machines if m.peer_id == service.peer_id)

    async def ask_last(self) -> None:
        """Ask a mended swarm for every document at every node: all must find the same."""
        if self.info is None:
            return
        for source in sorted(self.shelf):
            answers: dict[int, list[tuple[str, str, float]]] = {}
            for machine in self._swarm.up():
                if machine.parts is None or machine.gone:
                    continue
                answer = await self._ask(source, machine.parts.contexts)
                if answer is None:
                    continue
                texts = [(hit.source, hit.text, hit.score) for hit in answer.hits]
                answers[machine.number] = texts
                if not any(self._says(source, hit) for hit in texts):
                    self._swarm.violation(
                        "contexts", f"node {machine.number} does not find {source} any more"
                    )
            if len({tuple(each) for each in answers.values()}) > 1:
                self._swarm.violation("contexts", f"nodes answer differently about {source}")

    def _says(self, source: str, hit: tuple[str, str, float]) -> bool:
        """Whether a hit is of the document, in an edition that there was."""
        found, text, _ = hit
        if found != source:
            return False
        tries = range(1, self._editions[source] + 1)
        # Nodes that were apart may have numbered their versions alike, so that an earlier edition
        # won: which one did, all nodes agree upon.
        return any(_key(source, edition) in text for edition in tries)


def text_of(source: str, edition: int) -> str:
    """Return the text of an edition of a document."""
    rng = random.Random(f"{source} {edition}")  # noqa: S311 - must repeat itself
    lines = [" ".join(_word(rng) for _ in range(12)) + "." for _ in range(SENTENCES)]
    key = f"The {_subject(source)} says {_key(source, edition)}."
    lines.insert(rng.randrange(len(lines) + 1), key)
    return "\n\n".join(lines)


def question_of(source: str) -> str:
    """Return a question that every edition of a document answers."""
    return f"what says the {_subject(source)}"


def _subject(source: str) -> str:
    rng = random.Random(f"subject of {source}")  # noqa: S311 - must repeat itself
    return " ".join(_word(rng) for _ in range(3))


def _key(source: str, edition: int) -> str:
    return f"{source.partition('.')[0]}x{edition}x"


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(_SOUNDS) for _ in range(4))
