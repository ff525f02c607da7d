"""What the tests of failover share: requests, their undisturbed answers, and a sink of journals."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import trio

from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationEvent,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.journal import Outcome, SessionJournal
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.simulations.backend import toy_generate
from pyagent_node.simulations.pipeline import NAME, PipelineWorld

LAYERS = 10


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Return a prompt of ``length`` characters."""
    rng = random.Random(seed)
    return tuple(rng.randrange(128) for _ in range(length))


def request(
    tokens: Sequence[int],
    n: int = 30,
    *,
    sampling: SamplingParams | None = None,
    stop: tuple[str, ...] = (),
    session: SessionId | None = None,
) -> GenerationRequest:
    """Return a request for ``n`` tokens of the toy."""
    return GenerationRequest(
        NAME,
        tokens=tuple(tokens),
        max_tokens=n,
        sampling=sampling or SamplingParams(seed=3, temperature=0.8),
        stop=stop,
        session=session,
    )


def expected(ask: GenerationRequest) -> list[int]:
    """Return the tokens of the whole toy model."""
    assert ask.tokens is not None
    assert ask.max_tokens is not None
    return toy_generate(LAYERS, ask.tokens, ask.max_tokens, ask.sampling)


def tokens_of(events: Sequence[GenerationEvent]) -> list[int]:
    """Return the tokens of a stream."""
    return [event.token for event in events if isinstance(event, Generated)]


def timeless(events: Sequence[GenerationEvent]) -> list[tuple[object, ...]]:
    """Return a stream without its times and places."""
    kept: list[tuple[object, ...]] = []
    for event in events:
        if isinstance(event, Finished):
            counts = (event.usage.prompt_tokens, event.usage.completion_tokens)
            kept.append((event.reason, event.text, *counts))
        else:
            kept.append((event.token, event.text, event.piece, event.logprob, event.top))
    return kept


async def stream(
    world: PipelineWorld,
    ask: GenerationRequest,
    *,
    node: int = 0,
    pause: float = 0.0,
    got: list[GenerationEvent] | None = None,
) -> list[GenerationEvent]:
    """Ask and return all events; the reader is away for ``pause`` seconds after each 70th."""
    events = [] if got is None else got
    async with world.pipelines[node].engine.generate(ask) as source:
        async for event in source:
            events.append(event)
            if pause and len(events) % 70 == 1:
                await trio.sleep(pause)
    return events


async def drained(world: PipelineWorld) -> None:
    """Give closings a second to arrive, and check that nothing is left anywhere."""
    await trio.sleep(1)
    assert world.sessions == 0
    assert world.open_slots == 0
    assert all(view.queued == 0 for p in world.pipelines for view in p.stages.views())
    assert all(p.engine.sessions() == [] for p in world.pipelines)


class Journals:
    """A sink that keeps every journal, and checks the order of the calls."""

    def __init__(self) -> None:
        self.open: dict[SessionId, SessionJournal] = {}
        self.ended: dict[SessionId, tuple[SessionJournal, Outcome]] = {}

    def begin(self, journal: SessionJournal) -> None:
        """Note a session."""
        assert journal.session not in self.open
        self.open[journal.session] = journal

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """Note tokens."""
        journal = self.open[session]
        assert tokens
        assert start == len(journal.tokens)
        tokens = (*journal.tokens, *tokens)
        self.open[session] = msgspec.structs.replace(journal, tokens=tokens)

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """Note the end."""
        self.ended[session] = self.open.pop(session), outcome
