"""Moves a placed model to other ranks in two phases, while its sessions go on.

First the next ranks are *prepared*: the log names them, their nodes load the new slices beside the
old ones, and blocks of running sessions stream there.  When all of them are ready the change is
*committed* as a new epoch: the loaded runners become stages at once, and sessions begin their next
attempt on them.  Until then everything stays as it was, and whatever fails only drops what was
prepared.  A preparation is looked after by the node that asked for it; if that node dies, or a node
of it is lost, the leader drops it (see :func:`given_up`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    Conflict,
    DeadlineExceeded,
    LimitExceeded,
    NotFound,
    PyAgentError,
)
from pyagent_node.base.types import Digest, PeerId, Placement, Prepared
from pyagent_node.consensus.commands import DropPrepared, PreparePlacement, SetPlacement
from pyagent_node.consensus.port import Consensus
from pyagent_node.node.api.schema import Progress
from pyagent_node.node.detector import Health
from pyagent_node.node.part_reports import not_hosted
from pyagent_node.node.placement_board import (
    LOST_SECONDS,
    POLL_SECONDS,
    STALL_SECONDS,
    PlacementBoard,
    Report,
    raise_if_final,
)
from pyagent_node.node.placement_messages import PlacementReports, PreparedReport

logger = logging.getLogger("pyagent_node.placements")

BLOCKS_SECONDS: Final = 5.0
"""Longest wait for blocks of running sessions; what has not come by then is computed again."""
BLOCKS_POLL_SECONDS: Final = 0.1
DROP_SECONDS: Final = 5.0
"""Longest time to drop a preparation that nobody waits for any more."""
RETRY_SECONDS: Final = 1.0
"""Pause before it is tried again to drop one that nobody looks after."""


class Resharder:
    """One node's part in changing placements: sees to those that it was asked for."""

    def __init__(self, peer_id: PeerId, consensus: Consensus, board: PlacementBoard) -> None:
        self._peer_id = peer_id
        self._consensus = consensus
        self._board = board
        self._working: set[Digest] = set()

    async def run(self) -> None:
        """Drop preparations of this node that it does not work on, until cancelled.

        Such are there after a restart, or when a proposal was committed that had been given up.
        """
        while True:
            state = self._consensus.state
            for prepared in state.prepared.values():
                if prepared.by == self._peer_id and prepared.model not in self._working:
                    await self._drop(prepared, "nobody waits for it any more")
            try:
                async with self._consensus.applied(state.index) as entries:
                    with trio.move_on_after(RETRY_SECONDS if self._orphans() else float("inf")):
                        await entries.__anext__()
            except LimitExceeded:
                logger.debug("fell behind the log; reading the state anew")
            await trio.lowlevel.checkpoint()

    def _orphans(self) -> bool:
        return any(
            each.by == self._peer_id and each.model not in self._working
            for each in self._consensus.state.prepared.values()
        )

    async def reshard(self, command: SetPlacement, report: Report) -> Placement:
        """Prepare what ``command`` says, commit it when all is ready, and return the placement.

        Raises :class:`Conflict` (``change_in_progress``, ``stale_epoch``, ``not_prepared``), the
        error of a rank that cannot get ready, :class:`Unavailable` (``peer_lost``) and
        :class:`DeadlineExceeded` (``load_stalled``); then, or when it is cancelled, what was
        prepared is dropped and the placement in force stays.
        """
        model = command.model
        if model in self._working:
            raise _in_progress()
        self._working.add(model)
        try:
            prepared = await self._prepare(command)
            await self._wait_loaded(prepared, report)
            await self._wait_blocks(prepared, report)
            report(Progress(step="switch", text="switching to the new ranks"))
            await self._consensus.propose(
                msgspec.structs.replace(command, prepared=prepared.number)
            )
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(DROP_SECONDS):
                mine = self._consensus.state.prepared.get(model)
                if mine is not None and mine.by == self._peer_id:
                    await self._drop(mine, "it was not carried through")
            self._working.discard(model)
        placement = self._consensus.state.placements.get(model)
        if placement is None:
            raise _changed()
        return placement

    def check_idle(self, model: Digest) -> None:
        """Raise :class:`Conflict` (``change_in_progress``) while a change is under way."""
        if model in self._working or model in self._consensus.state.prepared:
            raise _in_progress()

    async def _prepare(self, command: SetPlacement) -> Prepared:
        await self._consensus.propose(
            PreparePlacement(
                model=command.model,
                ranks=command.ranks,
                n_ctx=command.n_ctx,
                n_seq=command.n_seq,
                after_epoch=command.after_epoch,
                by=self._peer_id,
                backends=command.backends,
            )
        )
        prepared = self._consensus.state.prepared.get(command.model)
        if prepared is None or prepared.by != self._peer_id:
            raise _changed()
        logger.info(
            "model %s: the ranks after epoch %d are prepared as number %d",
            command.model[:12],
            prepared.after_epoch,
            prepared.number,
        )
        return prepared

    async def _drop(self, prepared: Prepared, why: str) -> None:
        try:
            await self._consensus.propose(DropPrepared(prepared.model, prepared.number))
            logger.info("preparation %d was dropped: %s", prepared.number, why)
        except (Conflict, NotFound):
            logger.debug("preparation %d is gone already", prepared.number)
        except PyAgentError as error:
            logger.warning("preparation %d was not dropped: %s", prepared.number, error)

    def _check(self, prepared: Prepared) -> None:
        """Raise :class:`Conflict` (``not_prepared``) if it was given up meanwhile."""
        if self._consensus.state.prepared.get(prepared.model) != prepared:
            raise _changed()

    async def _wait_loaded(self, prepared: Prepared, report: Report) -> None:
        peers = {rank.peer_id for rank in prepared.ranks}
        started = trio.current_time()
        heard = dict.fromkeys(peers, started)
        moved, last = started, None
        while True:
            self._check(prepared)
            told = await self._board.reports(peers)
            self._check(prepared)
            now = trio.current_time()
            heard.update(dict.fromkeys(told, now))
            parts = []
            for rank in prepared.ranks:
                if now - heard[rank.peer_id] > LOST_SECONDS:
                    raise not_hosted(f"rank {rank.rank}", rank.peer_id, rank=rank.rank)
                found = _report_of(prepared, rank.rank, told.get(rank.peer_id))
                if found is not None:
                    raise_if_final(found, f"The next rank {rank.rank} on {rank.peer_id}", rank)
                parts.append(found)
            ready = sum(found is not None and found.state == "ready" for found in parts)
            report(
                Progress(
                    step="prepare",
                    text=f"loading beside what serves: {ready} of {len(parts)} ranks",
                    done=ready,
                    total=len(parts),
                    unit="ranks",
                )
            )
            if ready == len(parts):
                return
            picture = [(r.state, r.done, r.failures) if r else None for r in parts]
            if picture != last:
                moved, last = now, picture
            if now - moved > STALL_SECONDS:
                raise DeadlineExceeded(
                    f"{ready} of {len(parts)} of the next ranks are loaded, and nothing has moved"
                    f" for {STALL_SECONDS:.0f} s.",
                    code="load_stalled",
                    remedy="See the logs of the nodes whose ranks are not ready.",
                )
            await trio.sleep(POLL_SECONDS)

    async def _wait_blocks(self, prepared: Prepared, report: Report) -> None:
        """Give the blocks of running sessions a moment to get to the next ranks."""
        placement = self._consensus.state.placements[prepared.model]
        peers = {rank.peer_id for rank in placement.ranks}
        with trio.move_on_after(BLOCKS_SECONDS) as scope:
            while True:
                told = await self._board.reports(peers)
                self._check(prepared)
                behind = sum(each.behind.get(prepared.model, 0) for each in told.values())
                if not behind:
                    return
                text = f"{behind} KV blocks of running sessions are on their way"
                report(Progress(step="blocks", text=text))
                await trio.sleep(BLOCKS_POLL_SECONDS)
        if scope.cancelled_caught:
            logger.info("switching before all KV blocks have arrived: they are computed again")


def _report_of(
    prepared: Prepared, rank: int, told: PlacementReports | None
) -> PreparedReport | None:
    wanted = (prepared.model, prepared.number, rank)
    for found in told.prepared if told is not None else ():
        if (found.model, found.number, found.rank) == wanted:
            return found
    return None


def given_up(
    prepared: Prepared,
    *,
    health: Callable[[PeerId], Health],
    expelled: Iterable[PeerId] = (),
    silent: Mapping[PeerId, float] = {},
) -> str | None:
    """Return why the leader should drop a preparation, ``None`` while it may succeed.  Pure.

    ``silent`` says for how many seconds nodes have been; the one that sees to the change may be
    restarting and is given :data:`LOST_SECONDS`.
    """
    gone = frozenset(expelled)
    if prepared.by in gone or (
        health(prepared.by) == "dead" and silent.get(prepared.by, 0.0) > LOST_SECONDS / 2
    ):
        return "the node that saw to it is gone"
    for rank in prepared.ranks:
        if rank.peer_id in gone or health(rank.peer_id) == "dead":
            return f"the node of its rank {rank.rank} is gone"
    return None


def _in_progress() -> Conflict:
    return Conflict(
        "The placement of the model is being changed already.",
        code="change_in_progress",
        remedy="Wait until it is done; 'pyagent-node status' shows it.",
    )


def _changed() -> Conflict:
    return Conflict(
        "The change was given up: the model was placed anew, or a node of the change has left.",
        code="not_prepared",
        remedy="Look at 'pyagent-node placement show' and plan again.",
    )
