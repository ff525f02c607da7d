"""Fetches chunks of one model from several peers at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio

from pyagent_node.base.errors import (
    CorruptData,
    LimitExceeded,
    PyAgentError,
    Unavailable,
)
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId
from pyagent_node.inference.models.blob_client import BlobClient, Tail, open_blob_client
from pyagent_node.inference.models.blob_messages import WINDOW
from pyagent_node.inference.models.chunk_scheduler import ChunkScheduler
from pyagent_node.inference.models.partial import PartialModel

PEERS_AT_ONCE: Final = 8
"""Peers that are fetched from at the same time."""
ATTEMPTS: Final = 4
"""Tries in a row with a peer that gives nothing before it is left alone."""
RETRY_SECONDS: Final = 0.25
"""Wait before the second try with a peer; doubled for each further one."""
REFRESH_SECONDS: Final = 2.0
"""How often an idle peer is asked again what it holds (it may be fetching too)."""
STALL_SECONDS: Final = 90.0
"""A transfer without one new chunk for so long has failed."""

Progress = Callable[[int, int | None], None]

_log = logging.getLogger("pyagent_node.models.transfer")


class TransferStats:
    """What transfers cost; counts only grow.

    ``wasted`` bytes came twice (from a slow peer and the one that stole its work);
    ``dropped`` names the last error of each peer that was given up.
    """

    def __init__(self) -> None:
        self.bytes_fetched = 0
        self.bytes_wasted = 0
        self.chunks_fetched = 0
        self.chunks_corrupt = 0
        self.by_peer: dict[PeerId, int] = {}
        self.dropped: dict[PeerId, str] = {}


class ChunkFetch:
    """One transfer of some chunks of one model."""

    def __init__(
        self,
        mesh: Mesh,
        partial: PartialModel,
        wanted: Iterable[int],
        *,
        stats: TransferStats,
        banned: set[PeerId],
        progress: Callable[[int], None],
        epoch: int = 0,
    ) -> None:
        self._mesh = mesh
        self._epoch = epoch
        self._partial = partial
        self._model = partial.manifest.digest
        self._stats = stats
        self._banned = banned
        self._progress = progress
        self._plan = ChunkScheduler(partial.have.missing(wanted))
        self._last_error: PyAgentError | None = None
        self._stale: PyAgentError | None = None
        self._fault: PyAgentError | None = None
        """Why this node cannot keep chunks, which is no peer's fault."""
        self._waiting: deque[PeerId] = deque()
        self._working = 0
        self._changed = trio.Event()

    async def run(self, peers: Sequence[PeerId]) -> None:
        """Fetch every missing chunk or raise why that cannot be done.

        Peers that send wrong bytes join the banned ones and are left out from then on.
        :class:`CorruptData` (``chunk_corrupt``) when the only peers left sent wrong bytes,
        :class:`Unavailable` (``no_source``) when nobody holds what is missing, :class:`Conflict`
        (``stale_epoch``) when that is because peers know a later placement, and the errors of
        the disk.  What came is kept.
        """
        left_out = {self._mesh.peer_id, *self._banned}
        self._waiting.extend(dict.fromkeys(peer for peer in peers if peer not in left_out))
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(min(PEERS_AT_ONCE, len(self._waiting))):
                    self._working += 1
                    nursery.start_soon(self._worker)
                await self._watch()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._partial.sync)
        if self._plan.missing:
            raise self._fault or self._stale or self._failure()

    async def _watch(self) -> None:
        """Return when all is there, when nobody is left to ask, or when nothing moves."""
        before = 0
        while self._plan.missing not in (0, before):
            before = self._plan.missing
            with trio.move_on_after(STALL_SECONDS):
                while self._plan.missing == before and self._working and not self._fault:
                    await self._changed.wait()

    def _touch(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _worker(self) -> None:
        try:
            while self._waiting and self._plan.missing:
                await self._use(self._waiting.popleft())
        finally:
            self._working -= 1
            self._touch()

    async def _use(self, peer: PeerId) -> None:
        """Fetch from one peer until it is of no more use."""
        attempt = 0
        while self._plan.missing:
            before = self._stats.by_peer.get(peer, 0)
            try:
                async with open_blob_client(self._mesh, peer, self._epoch) as client:
                    await self._converse(peer, client)
                return
            except (Unavailable, LimitExceeded) as error:
                self._give_up(peer, error)
                attempt = 1 if self._stats.by_peer.get(peer, 0) > before else attempt + 1
                if attempt >= ATTEMPTS:
                    return
            except PyAgentError as error:
                self._give_up(peer, error)
                return
            finally:
                self._plan.drop(peer)
                self._touch()
            await trio.sleep(RETRY_SECONDS * 2 ** (attempt - 1))

    def _give_up(self, peer: PeerId, error: PyAgentError) -> None:
        _log.info("transfer from %s: %s", peer, error)
        self._last_error = error
        if error.code == "stale_epoch":
            self._stale = error  # one peer's word alone ends nothing: others are asked on
        self._stats.dropped[peer] = error.code
        if isinstance(error, CorruptData):
            self._banned.add(peer)
            self._stats.chunks_corrupt += error.code == "chunk_corrupt"
            _log.warning("peer %s sent wrong bytes and is not asked again: %s", peer, error)

    async def _converse(self, peer: PeerId, client: BlobClient) -> None:
        """Keep the window full and take what comes; returns when others should have the turn."""
        useful = self._plan.peer_has(peer, await client.have(self._model, self._count))
        self._touch()
        while self._plan.missing:
            while client.unanswered < WINDOW and (index := self._plan.next(peer)) is not None:
                await client.ask_chunk(self._model, index)
            if client.unanswered:
                index, data = await client.next_chunk(self._model)
                if data is None:
                    self._plan.refused(peer, index)
                else:
                    await self._keep(peer, index, data)
                continue
            with trio.move_on_after(REFRESH_SECONDS) as idle:
                await self._changed.wait()
            if not idle.cancelled_caught:
                continue
            if self._waiting and not useful:
                self._waiting.append(peer)
                return
            have = await client.have(self._model, self._count)
            useful = self._plan.peer_has(peer, have)

    async def _keep(self, peer: PeerId, index: int, data: Tail) -> None:
        try:
            fresh = await trio.to_thread.run_sync(self._partial.write_chunk, index, data)
        except CorruptData:
            raise
        except PyAgentError as error:
            self._fault = error
            self._touch()
            await trio.sleep_forever()  # until the transfer is cancelled
        self._plan.arrived(index)
        stats = self._stats
        if fresh:
            stats.bytes_fetched += len(data)
            stats.chunks_fetched += 1
            stats.by_peer[peer] = stats.by_peer.get(peer, 0) + len(data)
            self._progress(len(data))
        else:
            stats.bytes_wasted += len(data)
        self._touch()

    @property
    def _count(self) -> int:
        return self._partial.manifest.count

    def _failure(self) -> PyAgentError:
        missing = self._plan.missing
        error = self._last_error
        if isinstance(error, CorruptData):
            return CorruptData(
                f"{missing} chunks are missing and the peers that were left sent wrong bytes:"
                f" {error.message}",
                code=error.code,
                remedy="Connect to another node that holds the model.",
                chunks=missing,
            )
        return Unavailable(
            f"No connected peer gave the {missing} missing chunks of model {self._model[:16]}"
            + (f" (last error: {error.message})" if error else "")
            + ".",
            code="no_source",
            remedy="Connect to a node that holds the model, then try again.",
            chunks=missing,
        )
