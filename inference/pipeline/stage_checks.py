"""What a stage lets in: openings and steps against the shape of the slice and the limits."""

from __future__ import annotations

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded
from pyagent_node.inference.backend import PREFILL_CHUNK
from pyagent_node.inference.pipeline.frames import OpenSession, Step, Tail, unpack_tail
from pyagent_node.inference.pipeline.stage_queue import QueuedStep, ServedSession, StageQueue
from pyagent_node.inference.pipeline.stage_types import StageLimits, StageSpec


def check_opening(spec: StageSpec, message: OpenSession) -> None:
    """Check what a session asks for; raises :class:`InvalidRequest` (``bad_parameter``)."""
    if not 1 <= message.prompt_tokens <= message.positions <= spec.n_ctx:
        raise InvalidRequest(
            f"A session of {message.prompt_tokens} prompt tokens and {message.positions} positions"
            f" does not fit a context of {spec.n_ctx}.",
            code="bad_parameter",
            n_ctx=spec.n_ctx,
        )
    if spec.is_tail:
        message.sampling.check(spec.n_vocab)


def check_step(
    message: Step,
    tail: Tail,
    *,
    spec: StageSpec,
    limits: StageLimits,
    queue: StageQueue,
    session: ServedSession,
) -> QueuedStep:
    """Return a step of ``session`` ready to be queued.

    Raises :class:`CorruptData` (``out_of_order``, ``malformed_step``), :class:`InvalidRequest`
    (``step_too_long``, ``bad_parameter``) and :class:`LimitExceeded` (``too_many_steps``).
    """
    if message.step != session.next_step or message.position != session.next_position:
        raise CorruptData(
            f"Step {message.step} at position {message.position} came where step"
            f" {session.next_step} at {session.next_position} was due.",
            code="out_of_order",
        )
    end = message.position + message.n
    if not 1 <= message.n <= PREFILL_CHUNK or end > session.positions:
        raise InvalidRequest(
            f"A step of {message.n} tokens up to position {end} is outside the bounds of"
            f" {PREFILL_CHUNK} tokens and {session.positions} positions.",
            code="step_too_long",
        )
    tokens, activations = unpack_tail(tail, message.n, spec.n_embd)
    if (activations is None) != spec.is_whole:
        raise CorruptData(
            "Activations are sent to every stage but one that holds the whole model.",
            code="malformed_step",
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= spec.n_vocab:
        raise InvalidRequest(
            f"Tokens run from 0 to {spec.n_vocab - 1}.",
            code="bad_parameter",
            parameter="tokens",
        )
    size = memoryview(tail).nbytes
    if (
        len(session.queue) >= limits.steps_per_session
        or queue.steps >= limits.queued_steps
        or queue.bytes + size > limits.queued_bytes
    ):
        raise LimitExceeded(
            f"Rank {spec.rank} has {queue.steps} steps waiting and takes no more.",
            code="too_many_steps",
            remedy="Send fewer requests at once, or place the model on faster nodes.",
            queued=queue.steps,
        )
    return QueuedStep(message, tokens, activations, size)
