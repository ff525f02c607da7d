"""How a stage says that it gave a session up, and why."""

from __future__ import annotations

from typing import Final

from pyagent_node.base.errors import Conflict, PyAgentError, RunnerFailed, Unavailable
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.pipeline.frames import StageError
from pyagent_node.inference.pipeline.stage_types import StageSpec

NOT_JOINED: Final = "pieces_refused"
"""The code of an error after which a session computes all of its prompt."""

PRUNED: Final = "kv_pruned"
"""The code of an error of a session whose cells are gone: all of it is computed again."""


def stage_error(
    spec: StageSpec,
    session: SessionId,
    error: PyAgentError,
    *,
    rank: int | None = None,
    peer: PeerId | None = None,
    epoch: int | None = None,
) -> StageError:
    """Return the message; the rank at fault is this one where no other is given."""
    return StageError(
        session,
        spec.model,
        spec.epoch if epoch is None else epoch,
        spec.rank if rank is None else rank,
        peer or spec.peer_id,
        error.to_info(),
    )


def stale_epoch(spec: StageSpec, epoch: int) -> Conflict:
    """Return the error for a frame of another epoch."""
    return Conflict(
        f"Rank {spec.rank} is at epoch {spec.epoch}, the frame at {epoch}.",
        code="stale_epoch",
        remedy="The model was placed anew; ask again.",
        epoch=spec.epoch,
        frame_epoch=epoch,
    )


def runner_protocol(what: str) -> RunnerFailed:
    """Return the error for a runner that answers a step with ``what``."""
    return RunnerFailed(
        f"The runner answered a step with {what}.", code="runner_protocol", reason=what
    )


def not_joined(error: PyAgentError) -> Unavailable:
    """Return the error for cells of a piece that the runner refused: the head goes on without."""
    return Unavailable(f"Cells of a piece were refused: {error}", code=NOT_JOINED)


def not_pruned(error: PyAgentError) -> Unavailable:
    """Return the error for a session whose cells a runner was giving up when that failed."""
    return Unavailable(f"Giving up cells of a session failed: {error}", code=PRUNED)
