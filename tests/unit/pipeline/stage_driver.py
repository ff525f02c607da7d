"""Short-hand for driving a stage's core by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyagent_node.base.types import Digest, PeerId, SessionId, Slice
from pyagent_node.inference.backend import StepInput, StepOutput
from pyagent_node.inference.pipeline.frames import (
    CancelSteps,
    CloseSession,
    OpenSession,
    Result,
    StageError,
    Step,
    pack_tail,
)
from pyagent_node.inference.pipeline.stage import StageCore
from pyagent_node.inference.pipeline.stage_queue import Batch
from pyagent_node.inference.pipeline.stage_types import Outgoing, StageLimits, StageSpec
from pyagent_node.inference.sampling import Sampled, SamplingParams

MODEL = Digest("a" * 64)
HEAD, BEFORE, HERE, AFTER = (PeerId(p) for p in ("head", "before", "here", "after"))
N_EMBD, N_VOCAB, EPOCH = 2, 100, 7


def spec(rank: int = 1, ranks: int = 3, *, n_seq: int = 2, width: int = 8) -> StageSpec:
    """Return a stage of ten layers."""
    last = rank == ranks - 1
    return StageSpec(
        model=MODEL,
        epoch=EPOCH,
        rank=rank,
        peer_id=HERE,
        slice=Slice(rank * 10, rank * 10 + 10, last),
        upstream=None if rank == 0 else BEFORE,
        downstream=None if last else AFTER,
        n_embd=N_EMBD,
        n_vocab=N_VOCAB,
        n_ctx=4096,
        n_seq=n_seq,
        max_width=width,
    )


class Driver:
    """One stage and the steps that its sessions are at."""

    def __init__(
        self,
        stage: StageSpec,
        limits: StageLimits | None = None,
        joint_shapes: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.core = StageCore(stage, limits, joint_shapes)
        self.spec = stage
        self.at: dict[str, tuple[int, int]] = {}
        self.now = 0.0

    @property
    def sender(self) -> PeerId:
        """Who sends to this stage."""
        return self.spec.upstream or HEAD

    def open(
        self,
        name: str,
        *,
        head: PeerId = HEAD,
        sender: PeerId | None = None,
        positions: int = 4096,
        prompt_tokens: int = 1,
        epoch: int = EPOCH,
        sampling: SamplingParams | None = None,
    ) -> list[Outgoing]:
        """Open session ``name``."""
        self.at[name] = (0, 0)
        message = OpenSession(
            SessionId(name),
            MODEL,
            epoch,
            self.spec.rank,
            head,
            positions,
            prompt_tokens,
            sampling or SamplingParams(),
        )
        return self.core.receive(sender or self.spec.upstream or head, message, b"", self.now)

    def step(
        self,
        name: str,
        n: int = 1,
        *,
        sender: PeerId | None = None,
        sample: bool = True,
        epoch: int = EPOCH,
        step: int | None = None,
        position: int | None = None,
        token: int = 1,
        tail: bytes | None = None,
        drafts: int = 0,
        parent: int | None = None,
        parents: tuple[int, ...] = (),
        tokens: Sequence[int] = (),
    ) -> list[Outgoing]:
        """Send the next step of session ``name``."""
        step_at, position_at = self.at.get(name, (0, 0))
        message = Step(
            SessionId(name),
            MODEL,
            epoch,
            self.spec.rank,
            step_at if step is None else step,
            position_at if position is None else position,
            n,
            sample,
            drafts=drafts,
            parent=parent,
            parents=parents,
        )
        self.at[name] = (message.step + 1, message.position + n)
        if tail is None:
            ids = np.full(n, token, dtype=np.int32)
            ids[: len(tokens)] = tokens
            rows = None if self.spec.is_whole else np.ones((n, N_EMBD), dtype=np.float32)
            tail = pack_tail(ids, rows)
        return self.core.receive(sender or self.sender, message, tail, self.now)

    def close(self, name: str, *, sender: PeerId = HEAD) -> list[Outgoing]:
        """Close session ``name``."""
        message = CloseSession(SessionId(name), MODEL, EPOCH, self.spec.rank)
        return self.core.receive(sender, message, b"", self.now)

    def cancel(self, name: str, first: int, stop: int, *, sender: PeerId = HEAD) -> list[Outgoing]:
        """Cancel steps of session ``name``."""
        message = CancelSteps(SessionId(name), MODEL, EPOCH, self.spec.rank, first, stop)
        return self.core.receive(sender, message, b"", self.now)

    def batch(self) -> Batch:
        """Take the next batch, which must be there."""
        batch = self.core.next_batch()
        assert batch is not None
        return batch

    def run(self, batch: Batch, seconds: float = 0.5) -> list[Outgoing]:
        """Report a batch as computed."""
        return self.core.completed(batch, self.outputs(batch.inputs), seconds, self.now)

    def verdict(self, *tokens: int) -> list[Outgoing]:
        """Report the next batch, of one step, as computed by the last rank."""
        output = StepOutput(sampled=tuple(Sampled(token) for token in tokens))
        return self.core.completed(self.batch(), [output], 0.5, self.now)

    def outputs(self, inputs: Sequence[StepInput]) -> list[StepOutput]:
        """Return what a runner would."""
        if self.spec.is_tail:
            return [StepOutput(sampled=(Sampled(5),) if s.sample else ()) for s in inputs]
        return [
            StepOutput(activations=np.full((len(s.tokens), N_EMBD), 2, dtype=np.float32))
            for s in inputs
        ]


def names(batch: Batch) -> list[str]:
    """Return the sessions in a batch."""
    return [session.id for session, _ in batch.work]


def errors(out: Sequence[Outgoing]) -> list[tuple[PeerId, str, str]]:
    """Return (receiver, session, code) of each error, asserting that nothing else is there."""
    found = []
    for peer, message, _ in out:
        assert isinstance(message, StageError), message
        found.append((peer, str(message.session), message.error.code))
    return found


def results(out: Sequence[Outgoing]) -> list[Result]:
    """Return the results in ``out``, asserting that nothing else is there."""
    found = []
    for _, message, _ in out:
        assert isinstance(message, Result), message
        found.append(message)
    return found
