"""What a stage lets in: openings and steps against the shape of the slice and the limits."""

from __future__ import annotations

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded
from pyagent_node.inference.backend import MAX_DECODE_ROWS, MAX_DRAFTS, PREFILL_CHUNK
from pyagent_node.inference.backend_names import MAX_CLASS, MAX_CLASSES
from pyagent_node.inference.kv.budgets import MAX_COUNT, numbers_of
from pyagent_node.inference.pipeline.frames import OpenSession, Step, Tail, unpack_tail
from pyagent_node.inference.pipeline.origins import CUTS, check_origins
from pyagent_node.inference.pipeline.stage_queue import StageQueue
from pyagent_node.inference.pipeline.stage_session import QueuedStep, ServedSession
from pyagent_node.inference.pipeline.stage_types import StageLimits, StageSpec
from pyagent_node.inference.trees import check_tree, depths
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS, LINK_BYTES


def check_opening(spec: StageSpec, message: OpenSession) -> None:
    """Check what a session asks for; raises :class:`InvalidRequest` (``bad_parameter``)."""
    if len(message.root) not in (0, LINK_BYTES) or message.cut not in CUTS:
        raise InvalidRequest(
            f"A session's cache root has {LINK_BYTES} bytes, or none, and its cut is a multiple"
            f" of {BLOCK_TOKENS} up to {PREFILL_CHUNK}.",
            code="bad_parameter",
            parameter="root",
        )
    if message.pruning is not None and message.root:
        raise InvalidRequest(
            "A session that is pruned keeps no blocks.", code="bad_parameter", parameter="root"
        )
    classes = message.classes
    if len(classes) > MAX_CLASSES or any(not 0 < len(each) <= MAX_CLASS for each in classes):
        raise InvalidRequest(
            f"A session has {len(classes)} exactness classes, or one of a length that cannot be.",
            code="bad_parameter",
            parameter="classes",
        )
    check_origins(message.trail)
    check_origins(message.former)
    if spec.is_tail:
        message.sampling.check(spec.n_vocab)


def check_room(rank: int, limits: StageLimits, *, held: int, sessions: int) -> None:
    """Check that there may be one session more; its head has ``held`` of the ``sessions``.

    Raises :class:`LimitExceeded` (``too_many_sessions``).
    """
    for count, limit, whose in (
        (held, limits.sessions_per_peer, "that node"),
        (sessions, limits.sessions, "all nodes"),
    ):
        if count >= limit:
            raise LimitExceeded(
                f"Rank {rank} serves {count} sessions of {whose}, its limit.",
                code="too_many_sessions",
                remedy="Wait until another request has ended.",
                limit=limit,
            )


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
    (``step_too_long``, ``bad_parameter``, ``bad_tree``), :class:`LimitExceeded`
    (``too_many_steps``) and :class:`Unsupported` (``unsupported_activations``).
    """
    position = message.position
    if position <= session.floor:
        raise CorruptData(
            f"Step {message.step} goes back to position {position}; cells up to {session.floor} may"
            " be gone.",
            code="out_of_order",
        )
    plain = message.parent is None and message.step == session.next_step
    if not (plain and position == session.sure == session.next_position) and not _in_order(
        message, session
    ):
        raise CorruptData(
            f"Step {message.step} at position {message.position} came where step"
            f" {session.next_step} at {session.next_position} was due.",
            code="out_of_order",
        )
    if message.drafts and not _may_guess(message, session):
        raise InvalidRequest(
            f"A step of {message.n} tokens cannot have {message.drafts} guesses;"
            f" at most {MAX_DRAFTS} may follow a token of the answer.",
            code="bad_parameter",
            parameter="drafts",
        )
    _check_numbers(message)
    _check_end(message, position + message.n if not message.parents else position, session)
    tokens, activations = unpack_tail(tail, message.n, spec.n_embd, spec.activations)
    if message.parents:
        check_tree(message.parents, tokens.tolist(), message.drafts)
        known = message.known
        _check_end(message, position + known + max(depths(message.parents, known)), session)
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


def _check_numbers(message: Step) -> None:
    """Check that no number without other bounds is negative, or so large that a sum overflows."""
    numbers = (message.step, message.spent, message.settled, *numbers_of(message.evicted))
    if not all(0 <= number <= MAX_COUNT for number in numbers):
        raise CorruptData("A step has a number that cannot be.", code="malformed_step")


def _check_end(message: Step, end: int, session: ServedSession) -> None:
    if not 1 <= message.n <= PREFILL_CHUNK or end > session.positions:
        raise InvalidRequest(
            f"A step of {message.n} tokens up to position {end} is outside the bounds of"
            f" {PREFILL_CHUNK} tokens and {session.positions} positions.",
            code="step_too_long",
        )


def _in_order(message: Step, session: ServedSession) -> bool:
    """Whether a step will find the cells before it, however the guesses before it turn out.

    The prompt comes without a gap, after what was restored of it, but for cells of pieces that are
    there to fill it.  A step with a parent follows on
    it; any other may go back, but not beyond what is sure to be there.
    """
    if session.restores and message.step == session.next_step == 0 and message.parent is None:
        return 0 <= message.position <= session.sure
    if session.gaps and message.parent is None and message.step == session.next_step:
        taken = session.gaps.get(session.next_position)
        if taken is not None and message.position == taken[0].stop:
            return True
    if message.parent is not None:
        follows = message.step == session.next_step and message.parent == message.step - 1
        return follows and session.prompt_tokens <= message.position == session.next_position
    ahead = message.step >= session.next_step
    return ahead and session.prompt_tokens <= message.position <= session.sure


def _may_guess(message: Step, session: ServedSession) -> bool:
    within = 0 < message.drafts <= MAX_DRAFTS and 1 <= message.known <= MAX_DECODE_ROWS
    return within and message.sample and message.position >= session.prompt_tokens
