"""One session as a stage sees it: its slot, its cells, and the steps that wait for their turn.

``stage`` notes what comes in here, ``stage_queue`` decides by it what is computed next, and
``stage_blocks``, ``stage_pruning`` and ``stage_joins`` keep their parts of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from pyagent_node.inference.backend import Activations, KvRange, Tokens
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.pieces import Marks
from pyagent_node.inference.pipeline.frames import OpenSession, Step
from pyagent_node.inference.pipeline.session_blocks import SessionBlocks
from pyagent_node.inference.sampling import Sampled, SamplingParams


class QueuedStep(NamedTuple):
    """A step that waits; ``size`` counts the bytes of its tail."""

    message: Step
    tokens: Tokens
    activations: Activations | None
    size: int


class ServedSession:
    """One session on this stage; ``seq`` is its slot, ``None`` while it waits for one.

    ``next_step`` and ``next_position`` follow on the last step that came in.  ``end`` is where the
    cells end after what was given to the runner, ``sure`` where they will end at least, whatever
    queued guesses turn out to be.  ``verdict`` is the last step that sampled and its last token, -1
    if one of its guesses was wrong; ``void`` the last step that was dropped; ``cancelled`` the
    steps from which to which the head cancelled.  ``served`` counts its rows on the queue's scale,
    ``due`` is what that came to when its next step became ready.  ``blocks`` is ``None`` where no
    KV is kept or reused; ``restores`` says whether its head has asked for blocks, or pieces.
    ``cut`` is the greatest ``prefill_cut`` of the ranks up to this one, ``gaps`` has the cells
    that can be taken over, by where they begin, and their tokens; ``keeps`` says that the head is
    to be told when its blocks are kept.  ``pruning`` says how many cells it may hold, ``None`` for
    all of them; ``evicted`` cells were given up, and ``watched`` says that its attention is
    measured.  Later steps may go back to ``back``, and must not to ``floor`` or before, where cells
    are gone.  ``marks`` says which landmarks are to be made of its prompt, ``None`` for none or
    when that is done.  ``classes`` are the exactness classes of the ranks up to this one, and
    ``trail`` are those ranks, until the last one has told the head of them.
    """

    __slots__ = (
        "back",
        "blocks",
        "cancelled",
        "classes",
        "closed",
        "cut",
        "due",
        "end",
        "epoch",
        "evicted",
        "first_sample",
        "floor",
        "gaps",
        "generated",
        "head",
        "id",
        "in_flight",
        "keeps",
        "last_seen",
        "marks",
        "next_position",
        "next_step",
        "positions",
        "prompt_tokens",
        "pruning",
        "queue",
        "restores",
        "sampling",
        "seq",
        "served",
        "settled",
        "sure",
        "sure_step",
        "trail",
        "verdict",
        "void",
        "watched",
    )

    def __init__(self, message: OpenSession, now: float) -> None:
        self.id = message.session
        self.epoch = message.epoch
        self.head = message.head
        self.positions = message.positions
        self.prompt_tokens = message.prompt_tokens
        self.sampling: SamplingParams = message.sampling
        self.seq: int | None = None
        self.queue: deque[QueuedStep] = deque()
        self.in_flight = False
        self.closed = False
        self.next_position = 0
        self.next_step = 0
        self.end = 0
        self.sure = 0
        self.sure_step = 0
        self.settled = 0
        self.verdict: tuple[int, int] = (-1, -1)
        self.void = -1
        self.cancelled: tuple[int, int] = (0, 0)
        self.served = 0
        self.due = 0
        self.generated = 0
        self.first_sample: float | None = None
        self.last_seen = now
        self.blocks: SessionBlocks | None = None
        self.restores = False
        self.cut = message.cut
        self.classes = message.classes
        self.trail = message.trail
        self.gaps: dict[int, tuple[KvRange, Tokens]] = {}
        self.keeps = False
        self.pruning: Pruning | None = None
        self.evicted = 0
        self.back = 0
        self.floor = -1
        self.watched = False
        self.marks: Marks | None = None

    def came(self, step: Step, *, keeps: bool) -> None:
        """Note a step that came in; the runner ``keeps`` guesses on every rank but the last."""
        self.next_step = step.step + 1
        self.next_position = step.stop
        if step.parent is None:
            self.sure = step.stop if keeps else step.position + step.known
            self.sure_step = step.step

    def computed(self, queued: QueuedStep, sampled: Sequence[Sampled]) -> None:
        """Note what a step has come to; ``sampled`` is empty on every rank but the last."""
        step = queued.message
        if sampled:
            right = len(sampled) - 1
            self.end = step.position + step.known + right
            holds = self.end == step.stop and _straight(queued, sampled)
            self.verdict = (step.step, sampled[-1].token if holds else -1)
        if step.step >= self.sure_step:
            self.sure = self.end
        if step.sample:
            known = step.position + step.known
            self.generated = self.generated + known - self.settled if self.generated else 1
            self.settled = known

    def is_void(self, step: Step, first: int, *, tail: bool) -> bool:
        """Whether a step with ``first`` for its first token need not be computed any more."""
        parent = step.parent
        if parent is None:
            return False
        if parent == self.void or self.cancelled[0] <= step.step < self.cancelled[1]:
            return True
        return tail and self.verdict != (parent, first)


def _straight(queued: QueuedStep, sampled: Sequence[Sampled]) -> bool:
    """Whether the sampled tokens but the last are the first guesses of the step."""
    known = queued.message.known
    right: list[int] = queued.tokens[known : known + len(sampled) - 1].tolist()
    return right == [one.token for one in sampled[:-1]]
