"""The guessing parts of a simulated node: its drafters, its drafting model, its drafter rank.

Every node has the same drafters (see ``drafters``).  The suffix drafter and the drafter that asks a
model are the real ones; the model of the latter is a toy in a "process" of its own, which dies with
the node's other runners.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.backend import SequenceOp, StepInput, StepOutput
from pyagent_node.inference.drafting.combined import CombinedDrafters
from pyagent_node.inference.drafting.model import ModelDrafters
from pyagent_node.inference.drafting.port import DrafterFactory
from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.sampling import Sampled
from pyagent_node.node.holdings import RunnerKey
from pyagent_node.simulations.backend import N_VOCAB, ToyRunner, toy_vocabulary
from pyagent_node.simulations.drafters import KINDS, WRONG, OracleFactory
from pyagent_node.simulations.draws import N_LAYERS
from pyagent_node.simulations.placements import RECORD, ToyAssets

SUFFIX: Final = "suffix"
MODEL: Final = "little"
COMBINED: Final = f"{MODEL}+{SUFFIX}"
RANK: Final = "rank"
RANK_AND_SUFFIX: Final = f"{RANK}+{SUFFIX}"
DRAFTERS: Final = (SUFFIX, MODEL, COMBINED, RANK, RANK_AND_SUFFIX, *KINDS)
"""Whom a request may ask for on a simulated node."""
RELOAD_SECONDS: Final = 2.0
"""How long a node is without its drafting model when that has died."""
DRAFT_N_CTX: Final = 160
"""Fewer positions than some sessions have: those outgrow the model."""
DRAFT_N_SEQ: Final = 3
"""Fewer sessions than there may be: the others do without."""

DRAFT_RECORD: Final = msgspec.structs.replace(
    RECORD, digest=Digest("71" * 32), manifest=Digest("71" * 32), name=RANK, n_ctx_train=DRAFT_N_CTX
)
"""The model of the drafter rank."""


class DraftingRunner(ToyRunner):
    """The whole toy in a process of its own, which says something else now and then.

    Several drafters may ask at once; it serves one after the other.
    """

    def __init__(self, rng: random.Random, seconds: float, *, n_ctx: int, n_seq: int) -> None:
        part = Slice(0, N_LAYERS, True)
        super().__init__(part, whole=True, n_ctx=n_ctx, n_seq=n_seq, seconds=seconds)
        self._rng = rng
        self._wrong = rng.choice(WRONG)
        self._turn = trio.Lock()

    async def apply(self, ops: Sequence[SequenceOp]) -> None:
        """Carry out sequence operations."""
        async with self._turn:
            await super().apply(ops)

    async def decode(self, steps: Sequence[StepInput]) -> list[StepOutput]:
        """Compute one batch, and err."""
        async with self._turn:
            outputs = await super().decode(steps)
        return [
            StepOutput(output.activations, tuple(map(self._err, output.sampled)))
            for output in outputs
        ]

    def _err(self, sampled: Sampled) -> Sampled:
        if self._rng.random() >= self._wrong:
            return sampled
        return Sampled(self._rng.randrange(N_VOCAB), sampled.logprob)


class SwarmAssets(ToyAssets):
    """Those of a node that may be the drafter rank."""

    def __init__(self, seconds: float, rng: random.Random) -> None:
        super().__init__(seconds)
        self._rng = rng

    def make_runner(self, key: RunnerKey) -> ToyRunner:
        """Return a runner of a toy; the drafting one is ten times as fast, and errs."""
        if key.model != DRAFT_RECORD.digest:
            return super().make_runner(key)
        return DraftingRunner(self._rng, self.pace / 10, n_ctx=key.n_ctx, n_seq=key.n_seq)


class Guessers:
    """The drafters of one node: :attr:`speculators` for its pipeline, and the model's process.

    ``complaints`` are what drafters say of how they are treated; there should be none.
    """

    def __init__(self, rng: random.Random, seconds: float) -> None:
        self.complaints: list[str] = []
        self.runner: DraftingRunner | None = None
        self._seconds = seconds
        self.factories = {
            name: OracleFactory(name, lambda: rng.choice(WRONG), rng, self.complaints.append)
            for name in KINDS
        }
        self._rng = rng
        self._suffix = SuffixDrafters()
        factories: list[DrafterFactory] = [self._suffix, *self.factories.values()]
        self.speculators = Speculators(factories, clock=trio.current_time)

    async def keep_drafting(self) -> None:
        """Have the drafting model there, and load it again when it has died."""
        pieces = toy_vocabulary().pieces
        while True:
            self.runner = runner = DraftingRunner(
                self._rng, self._seconds, n_ctx=DRAFT_N_CTX, n_seq=DRAFT_N_SEQ
            )
            model = ModelDrafters(MODEL, runner, pieces)
            both = CombinedDrafters(COMBINED, self._suffix, model)
            with self.speculators.offering(both, model):
                await runner.failed.wait()
            await trio.sleep(RELOAD_SECONDS)

    def kill(self) -> None:
        """Kill the drafting model's process, if it runs."""
        if self.runner is not None and self.runner.failure is None:
            self.runner.kill()

    def set_seconds(self, seconds: float) -> None:
        """Say what one decode of the drafting model takes."""
        self._seconds = seconds
        if self.runner is not None:
            self.runner.seconds = seconds
