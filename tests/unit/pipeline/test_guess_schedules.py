"""Trim, cancel and accept over random schedules: heads, three stages, and lanes of any speed.

Every lane is first in, first out, and nothing else is promised: a cancelling may overtake the steps
that it cancels, or come long after them.  Runners refuse what does not follow on their cells.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.backend import (
    MAX_DECODE_ROWS,
    Activations,
    FreeSequence,
    OpenSequence,
    StepInput,
    StepOutput,
    Tokens,
    TrimSequence,
)
from pyagent_node.inference.drafting.controller import FixedController
from pyagent_node.inference.drafting.port import Draft, Plan
from pyagent_node.inference.generation import Finished, Generated
from pyagent_node.inference.pipeline.frames import OpenSession, PipeMessage, Result, Step, Tail
from pyagent_node.inference.pipeline.head import HeadCore
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.speculation import Speculation
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_queue import Batch
from pyagent_node.inference.pipeline.stage_types import Outgoing, StageSpec
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.inference.trees import decode_tree
from pyagent_node.simulations.guesses import random_tree

RANKS = 3
N_VOCAB = 50
N_CTX = 200
MODEL = Digest("a" * 64)
HEAD = PeerId("head")
PEERS = [PeerId(f"rank{r}") for r in range(RANKS)]
PLACEMENT = Placement(
    MODEL,
    1,
    tuple(Rank(r, Slice(r, r + 1, r == RANKS - 1), PEERS[r]) for r in range(RANKS)),
    N_CTX,
    4,
)
VOCABULARY = Vocabulary(tuple(b"x" for _ in range(N_VOCAB)), frozenset())


def following(history: Sequence[int]) -> int:
    """Return the token that the model samples after ``history``: few kinds, and each counts."""
    mixed = sum((token + 3) * (index + 1) for index, token in enumerate(history))
    return mixed * 7 % 11 % N_VOCAB


def answer(prompt: Sequence[int], n: int) -> list[int]:
    """Return what plain decoding gives."""
    history = list(prompt)
    for _ in range(n):
        history.append(following(history))
    return history[len(prompt) :]


class Guesser:
    """Guesses right with a probability, for as long as it has been right."""

    name = "guesser"

    def __init__(self, rng: random.Random, right: float) -> None:
        self._rng = rng
        self._right = right
        self._history: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in tokens."""
        self._history += tokens

    def look(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess."""
        history = [*self._history, *ahead]
        tokens: list[int] = []
        for _ in range(self._rng.randrange(limit + 1)):
            right = self._rng.random() < self._right
            tokens.append(following(history) if right else self._rng.randrange(N_VOCAB))
            history.append(tokens[-1])
        return Draft(tuple(tokens), (0.5,) * len(tokens), self.name)

    def look_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess in several ways."""
        history = [*self._history, *ahead]
        return random_tree(
            self._rng,
            self._rng.randrange(limit + 1),
            lambda path: following([*history, *path]),
            right=self._right,
            n_vocab=N_VOCAB,
        )

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess."""
        return self.look(ahead, limit)

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Guess in several ways."""
        return self.look_tree(ahead, limit)

    async def aclose(self) -> None:
        """Do nothing."""


class Runner:
    """The cells of one stage, and the batch that it computes."""

    def __init__(self, tail: bool) -> None:
        self.tail = tail
        self.cells: dict[int, list[int]] = {}
        self.computed = 0
        self.batch: Batch | None = None

    def start(self, batch: Batch) -> None:
        """Carry out the operations."""
        for op in batch.ops:
            match op:
                case OpenSequence(seq):
                    self.cells[seq] = []
                case FreeSequence(seq):
                    del self.cells[seq]
                case TrimSequence(seq, start):
                    assert 0 < start < len(self.cells[seq])
                    del self.cells[seq][start:]
        self.batch = batch if batch.inputs else None

    def finish(self) -> list[StepOutput]:
        """Compute the batch."""
        assert self.batch is not None
        return [self._step(step) for step in self.batch.inputs]

    def _step(self, step: StepInput) -> StepOutput:
        if step.parents:
            cells = self.cells[step.seq]
            return decode_tree(
                step, self._step, lambda start: cells.__delitem__(slice(start, None))
            )
        cells = self.cells[step.seq]
        assert step.position == len(cells)
        assert step.drafts or len(step.tokens) <= MAX_DECODE_ROWS, "no such rows after the prompt"
        sampled: list[Sampled] = []
        for index, token in enumerate(step.tokens.tolist()):
            if sampled and sampled[-1].token != token:
                break
            self.computed += 1
            cells.append(token)
            if step.sample and index >= len(step.tokens) - step.drafts - 1:
                sampled.append(Sampled(following(cells)))
        rows = None if self.tail else np.zeros((len(step.tokens), 1), np.float32)
        return StepOutput(rows, tuple(sampled))


def embed(tokens: Tokens) -> Activations:
    """Return rows of nothing."""
    return np.zeros((len(tokens), 1), np.float32)


class World:
    """Heads and stages; what is on its way lies in lanes."""

    def __init__(self, seed: int, sessions: int, right: float, *, tree: bool) -> None:
        self.rng = random.Random(seed)
        self.stages = [
            StageCore(
                StageSpec(
                    model=MODEL,
                    epoch=1,
                    rank=r,
                    peer_id=PEERS[r],
                    slice=PLACEMENT.ranks[r].slice,
                    upstream=PEERS[r - 1] if r else None,
                    downstream=PEERS[r + 1] if r + 1 < RANKS else None,
                    n_embd=1,
                    n_vocab=N_VOCAB,
                    n_ctx=N_CTX,
                    n_seq=4,
                )
            )
            for r in range(RANKS)
        ]
        self.runners = [Runner(r == RANKS - 1) for r in range(RANKS)]
        self.lanes: dict[tuple[PeerId, PeerId, bool], deque[tuple[PipeMessage, Tail]]] = {}
        self.heads: dict[SessionId, HeadCore] = {}
        self.shown: dict[SessionId, list[int]] = {}
        for index in range(sessions):
            self._begin(SessionId(f"s{index}"), right, tree=tree)

    def _begin(self, session: SessionId, right: float, *, tree: bool) -> None:
        rng = self.rng
        prompt = np.array([rng.randrange(N_VOCAB) for _ in range(rng.randrange(1, 8))], np.int32)
        plan = HeadPlan(
            session, HEAD, MODEL, rng.randrange(1, 40), (), False, SamplingParams(temperature=0.0)
        )
        spec = Speculation(
            Guesser(rng, right),
            FixedController(Plan(rng.randrange(32 if tree else 6), rng.randrange(1, 6), tree=tree)),
            n_vocab=N_VOCAB,
            clock=lambda: 0.0,
        )
        spec.tell(prompt.tolist())
        spec.prepared = True
        core = HeadCore(plan, prompt, VOCABULARY, 0.0, spec)
        self.heads[session] = core
        self.shown[session] = []
        opening = core.begin(session, PLACEMENT, embed, 0.0)
        assert opening
        self.send(HEAD, opening)
        while (chunk := core.next_chunk()) is not None:
            assert core.attempt is not None
            rows = embed(core.attempt.tokens(chunk))
            self.send(HEAD, [core.attempt.send_chunk(chunk, rows, 0.0)])

    def send(self, sender: PeerId, out: Sequence[Outgoing]) -> None:
        """Put messages in their lanes."""
        for peer, message, tail in out:
            data = isinstance(message, Step | OpenSession)
            self.lanes.setdefault((sender, peer, data), deque()).append((message, tail))

    def run(self) -> None:
        """Do one thing after the other until there is nothing left to do."""
        while True:
            todo: list[tuple[str, object]] = [("lane", key) for key, q in self.lanes.items() if q]
            for rank in range(RANKS):
                if self.runners[rank].batch is not None:
                    todo.append(("finish", rank))
                elif self.stages[rank].has_work:
                    todo.append(("start", rank))
            if not todo:
                return
            kind, what = self.rng.choice(todo)
            if kind == "lane":
                assert isinstance(what, tuple)
                self._deliver(what)
            else:
                assert isinstance(what, int)
                self._compute(what)

    def _deliver(self, key: tuple[PeerId, PeerId, bool]) -> None:
        sender, to, _ = key
        message, tail = self.lanes[key].popleft()
        if to != HEAD:
            self.send(to, self.stages[PEERS.index(to)].receive(sender, message, tail, 0.0))
            return
        assert isinstance(message, Result), message
        core = self.heads[message.session]
        self.send(HEAD, core.on_result(sender, message, 0.0))
        while (event := core.take(0.0)[0]) is not None:
            if isinstance(event, Generated):
                self.shown[message.session].append(event.token)
            else:
                assert isinstance(event, Finished)
                self.send(HEAD, core.close())

    def _compute(self, rank: int) -> None:
        stage, runner = self.stages[rank], self.runners[rank]
        if runner.batch is not None:
            batch, outputs = runner.batch, runner.finish()
            runner.batch = None
            self.send(PEERS[rank], stage.completed(batch, outputs, 0.001, 0.0))
            return
        batch_or_none = stage.next_batch()
        assert batch_or_none is not None
        runner.start(batch_or_none)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sessions=st.sampled_from([1, 1, 2, 8]),
    right=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    tree=st.booleans(),
)
def test_any_schedule_gives_the_tokens_of_plain_decoding(
    seed: int, sessions: int, right: float, tree: bool
) -> None:
    world = World(seed, sessions, right, tree=tree)
    world.run()
    for session, core in world.heads.items():
        assert world.shown[session] == answer(core.prompt.tolist(), core.plan.budget)
        assert core.outcome == "finished"
    for stage, runner in zip(world.stages, world.runners, strict=True):
        view = stage.view()
        assert (view.sessions, view.queued, view.refused) == (0, 0, 0)
        assert runner.cells == {}
