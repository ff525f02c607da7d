"""People who ask the simulated swarm, and know what must come out.

Every request has a seed, so the toy model's answer to it is known beforehand.  Whatever breaks
meanwhile, the tokens that arrive must be a prefix of it, and in the end all of it.  Somebody whose
node dies goes on reading at another one, or asks again if the session was too young to be saved.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.consensus.commands import Checkpoint
from pyagent_node.inference.generation import (
    AUTO_SPECULATION,
    NO_SPECULATION,
    Finished,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.journal_messages import public_id
from pyagent_node.node.live_session import Reader
from pyagent_node.simulations.drafters import answer_to
from pyagent_node.simulations.guessers import COMBINED, DRAFTERS, MODEL, RANK, SUFFIX
from pyagent_node.simulations.machine import session_ids
from pyagent_node.simulations.pipeline import NAME

if TYPE_CHECKING:
    from pyagent_node.simulations.machine import Machine
    from pyagent_node.simulations.swarm import Swarm

MARK: Final = "TOP-SECRET"
"""Begins every prompt; it must never show in a log line or in the replicated log."""
COMMON: Final = "Answer in one line, without any flourish, as if it cost a coin a letter. " * 2
"""Goes on every fourth prompt: more than a block, that those who ask have in common."""
PAUSE_SECONDS: Final = 0.5
SILENCE_SECONDS: Final = 4.0
"""After so long without another token, every other person tries another node."""
LATELY_SECONDS: Final = 5.0
"""How long after its last token a session must still be there for its reader."""
COMING_BACK_SECONDS: Final = 30.0
"""How long the node is asked to go on for somebody who left it."""
READ_SECONDS: Final = 0.5
"""Pause between two linearizable reads."""
BARRIER_SECONDS: Final = 3.0
LAST_TOKENS: Final = 60
"""Least length of the answer to the last question."""
LAST_SECONDS: Final = 60.0
"""How long the last answer may take."""
LOOK_SECONDS: Final = 0.1

LIKELY: Final = (AUTO_SPECULATION, SUFFIX, MODEL, COMBINED, RANK, "quick", "slow", "quick growing")
"""Drafters that people ask for more often than for the others."""
LENGTHS: Final = (None, None, 0, 1, 2, 4, 8, 16, 31)
DEPTHS: Final = (None, 1, 2, 3, 5, 8)
MOST_GUESSES: Final = 32
"""In flight at a time; computing more of them makes a run slow and shows nothing new."""


class Guessing(NamedTuple):
    """How a person wants an answer guessed ahead."""

    drafter: str | None = None
    length: int | None = None
    depth: int | None = None
    tree: bool | None = None


def draw_guessing(rng: random.Random) -> Guessing:
    """Draw whether, by whom and how far an answer is guessed ahead."""
    kind = rng.random()
    if kind < 0.25:
        return Guessing(rng.choice((None, NO_SPECULATION)))
    drafter = rng.choice(LIKELY if kind < 0.8 else DRAFTERS)
    length, depth = rng.choice(LENGTHS), rng.choice(DEPTHS)
    if length and depth:
        depth = min(depth, max(1, MOST_GUESSES // length))
    return Guessing(drafter, length, depth, rng.choice((None, None, True)))


def draw_sampling(rng: random.Random) -> SamplingParams:
    """Draw parameters: those of every day, penalties, and a text that repeats itself."""
    bias = {rng.randrange(1, 128): 6.0 for _ in range(rng.choice((0, 0, 3)))}
    return SamplingParams(
        seed=rng.randrange(1 << 32),
        temperature=rng.choice((0.0, 0.8)),
        top_k=rng.choice((0, 20)),
        repetition_penalty=rng.choice((1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
        logit_bias=bias,
    )


class Person:
    """Asks one question and reads the answer to its end, which is ``guessed`` ahead or is not."""

    def __init__(
        self, number: int, swarm: Swarm, rng: random.Random, *, guessed: bool = True
    ) -> None:
        self.number = number
        self.finished = False
        self._swarm = swarm
        self._rng = rng
        self._ids = session_ids(rng)
        count = rng.randint(1, 60)
        begun = COMMON if number % 4 == 3 else ""
        self._prompt = [
            *MARK.encode(),
            *begun.encode(),
            *(rng.randrange(1, 128) for _ in range(count)),
        ]
        self._n = rng.randint(2, 120)
        self._params = draw_sampling(rng)
        self._guessing = draw_guessing(rng) if guessed else Guessing()
        self.expected = answer_to(self._prompt, self._params).first(self._n)
        self.got: list[int] = []
        self.reading: Machine | None = None
        """The node whose answer is being read."""
        self.session = self._ids()
        self.public = public_id(self.session)
        """Under what name the log knows the session."""
        self._patience = rng.choice((math.inf, SILENCE_SECONDS))
        self._checkpoint: Checkpoint | None = None
        """What the log said last of the session while it was read."""
        self._holders: list[tuple[Machine, int]] = []
        """Who held copies then, each in which of its lives."""
        self._heard = -math.inf
        """When the last token came."""

    def _anew(self) -> None:
        """Ask again as if for the first time."""
        self.got, self._checkpoint, self._holders = [], None, []
        self.session = self._ids()
        self.public = public_id(self.session)

    async def ask(self) -> None:
        """Ask until the whole answer is here."""
        while not self.finished:
            machine = self._choose()
            if machine is not None:
                try:
                    await self._read(machine)
                except PyAgentError as error:
                    self._swarm.trace.add(machine.number, "asker", f"{self.number}: {error.code}")
                    if error.code == "session_not_found":
                        self._look_for_it(machine)
                    if error.code == "bad_parameter":
                        self._guessing = Guessing()  # whom it asked for is not there now
                    if error.code in ("session_not_found", "beyond_end", "bad_journal"):
                        self._anew()
                if not self.got:
                    self._anew()
            if not self.finished:
                await trio.sleep(PAUSE_SECONDS)

    def _choose(self) -> Machine | None:
        up = [m for m in self._swarm.machines if m.up and not m.gone]
        return self._rng.choice(up) if up else None

    def _look_for_it(self, machine: Machine) -> None:
        """A node says that there is no such session: it must not be in its log then.

        And if it was there a moment ago, with holders that have not died since, one has a copy.
        """
        if machine.parts is None:
            return
        known = machine.parts.consensus.state.checkpoints.get(self.public)
        lost = (
            trio.current_time() - self._heard < LATELY_SECONDS
            and bool(self._holders)
            and all(holder.up and holder.lives == life for holder, life in self._holders)
        )
        if lost or (known is not None and known.expires > machine.wall() + BARRIER_SECONDS):
            self._swarm.violation(
                "sessions stay known",
                f"node {machine.number} denies the session of request {self.number}",
            )

    def _note(self, machine: Machine) -> None:
        """Remember who holds the session's journal."""
        self._heard = trio.current_time()
        if machine.parts is None:
            return
        known = machine.parts.consensus.state.checkpoints.get(self.public)
        if known is not None and known is not self._checkpoint:
            self._checkpoint = known
            self._holders = [
                (each, each.lives) for each in self._swarm.up() if each.peer_id in known.holders
            ]

    async def _read(self, machine: Machine) -> None:
        """Read from one node until the answer or the node ends; goes on with what has begun."""
        assert machine.parts is not None, "chosen among those that run"
        live = machine.parts.sessions.live
        with trio.CancelScope() as scope:
            machine.readers.add(scope)
            try:
                if self.got:
                    opened = live.attach(self.session, len(self.got))
                else:
                    opened = live.generate(
                        GenerationRequest(
                            NAME,
                            tokens=tuple(self._prompt),
                            max_tokens=self._n,
                            sampling=self._params,
                            session=self.session,
                            speculation=self._guessing.drafter,
                            draft_length=self._guessing.length,
                            draft_depth=self._guessing.depth,
                            draft_tree=self._guessing.tree,
                        ),
                        resume_seconds=COMING_BACK_SECONDS if self._patience < math.inf else 0.0,
                    )
                async with opened as reader:
                    self.reading = machine
                    await self._follow(machine, reader)
            finally:
                self.reading = None
                machine.readers.discard(scope)

    async def _follow(self, machine: Machine, reader: Reader) -> None:
        while True:
            event: GenerationEvent | None = None
            with trio.move_on_after(self._patience if self.got else math.inf):
                event = await anext(reader)
            if event is None:
                self._swarm.trace.add(machine.number, "asker", f"{self.number}: leaves")
                return
            if isinstance(event, Finished):
                self._end(machine, event)
                return
            at = len(self.got)
            if at >= len(self.expected) or event.token != self.expected[at]:
                self._swarm.violation(
                    "tokens",
                    f"request {self.number}: token {at} is {event.token},"
                    f" not {self.expected[at] if at < len(self.expected) else 'the end'}",
                )
                self.finished = True
                return
            self.got.append(event.token)
            self._note(machine)

    def _end(self, machine: Machine, last: Finished) -> None:
        self.finished = True
        told = f"{self.number}: {len(self.got)} tokens"
        guesses = last.usage.speculation
        if guesses is not None:
            told += f", {guesses.accepted} of {guesses.drafted} guessed by {guesses.drafter}"
        self._swarm.trace.add(machine.number, "answered", told)
        if self.got != self.expected:
            self._swarm.violation(
                "tokens", f"request {self.number} ended after {len(self.got)} tokens"
            )


class Clerk:
    """Reads the log behind a barrier on one node after the other: what is read must be current."""

    def __init__(self, swarm: Swarm, rng: random.Random) -> None:
        self._swarm = swarm
        self._rng = rng

    async def run(self) -> None:
        """Read for ever."""
        while True:
            await trio.sleep(self._rng.uniform(0.5, 1.5) * READ_SECONDS)
            up = self._swarm.up()
            if up:
                await self._read(self._rng.choice(up))

    async def _read(self, machine: Machine) -> None:
        """Whatever any node had applied before a read began, the reader must have applied too."""
        parts = machine.parts
        assert parts is not None, "it runs"
        before = max(
            each.parts.consensus.state.index for each in self._swarm.up() if each.parts is not None
        )
        passed = False
        with trio.move_on_after(BARRIER_SECONDS):
            try:
                await parts.consensus.read_barrier()
                passed = True
            except PyAgentError as error:
                self._swarm.trace.add(machine.number, "clerk", error.code)
        index = parts.consensus.state.index
        if passed and machine.parts is parts and index < before:
            self._swarm.violation(
                "reads are current",
                f"node {machine.number} read entry {index} after {before} had been applied",
            )


async def ask_last(swarm: Swarm) -> None:
    """Ask one more question of a mended swarm, and see that the answer's journal is copied."""
    rng = random.Random(swarm.rng.random())  # noqa: S311 - must repeat itself
    person = Person(len(swarm.people), swarm, rng, guessed=False)
    while len(person.expected) < LAST_TOKENS:
        person = Person(len(swarm.people), swarm, rng, guessed=False)
    swarm.people.append(person)
    swarm.nursery.start_soon(person.ask)
    copies = wanted = 0
    with trio.move_on_after(LAST_SECONDS):
        while not person.finished:
            await trio.sleep(LOOK_SECONDS)
            copies, wanted = max(copies, _copies(swarm, person)), _wanted_copies(swarm)
    if not person.finished:
        swarm.violation("restored", f"request {person.number}, the last one, was not answered")
    elif copies < wanted:
        swarm.violation("restored", f"the last answer's journal had {copies} copies of {wanted}")


def _copies(swarm: Swarm, person: Person) -> int:
    """Return how many of the nodes that should keep a person's journal have it."""
    leader = swarm.leader()
    if leader is None or leader.parts is None:
        return 0
    known = leader.parts.consensus.state.checkpoints.get(person.public)
    now = trio.current_time()
    return sum(
        machine.parts.journals.holder.book.get(person.public, now) is not None
        for machine in swarm.up()
        if machine.parts is not None and known is not None and machine.peer_id in known.holders
    )


def _wanted_copies(swarm: Swarm) -> int:
    """Return how many copies there should be, besides the head's own journal."""
    leader = swarm.leader()
    if leader is None or leader.parts is None:
        return 0
    state = leader.parts.consensus.state
    able = [machine for machine in swarm.up() if not machine.gone]
    return min(state.settings["journal_copies"], len(able) - 1)
