"""The checkpoint stream: finished blocks of running sessions go to whoever may need them next.

One lane for each target, one block at a time, within a bandwidth budget that all lanes share.  A
lane asks its target first what it has of a session, so that nothing is sent twice: not after a
reconnection, and not the prompt that another session had too.  What a target refuses for now is
tried again after a pause; a session that ends takes its unsent blocks with it.

Heads are told who holds what of their sessions, seldom and in the background.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

import trio

from pyagent_node.base.errors import LimitExceeded, PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.base.mesh import Mesh
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.consensus.port import Consensus
from pyagent_node.inference.kv.port import SettledBlock
from pyagent_node.node.kv_book import BlockBook, Job, Part
from pyagent_node.node.kv_client import KvClient
from pyagent_node.node.kv_messages import (
    MAX_CHAIN,
    MAX_HOLDERS,
    Have,
    Put,
    Report,
    SessionHolders,
    frames_of,
)
from pyagent_node.node.kv_rights import epoch_of, targets
from pyagent_node.node.kv_server import ByteBudget, Vault
from pyagent_node.sharding.kv_keys import BlockKey

log = logging.getLogger("pyagent_node.kv")

PUT_BYTES: Final = 1 * MIB
"""Bytes of blocks in one frame of a lane: small, so that a token's frame is soon past it."""
FIRST_PAUSE: Final = 0.5
"""Pause after a target refused or failed, in seconds; each one after is twice as long."""
LONGEST_PAUSE: Final = 30.0
REPORT_SECONDS: Final = 1.0
"""How often heads are told who holds their sessions' blocks, if that has changed."""
REPORT_STEP: Final = 8
"""Blocks that must have been added for a report, where the holders are the same."""
KNOWN_SECONDS: Final = 60.0
"""For how long a target is taken to have what it had."""
MAX_KNOWN: Final = 65_536
BURST_SECONDS: Final = 0.25
"""So much of a second's budget may be used at once."""


class CheckpointStream:
    """Sends the blocks in ``book``; ``rate`` is in bytes a second, 0 sends nothing.

    ``on_report`` takes the reports about sessions that this node heads itself.
    """

    def __init__(
        self,
        mesh: Mesh,
        consensus: Consensus,
        client: KvClient,
        vault: Vault,
        *,
        rate: int,
        on_report: Callable[[PeerId, Report], None],
    ) -> None:
        self.book = BlockBook()
        self.bytes_sent = 0
        self.blocks_sent = 0
        self.failed: Counter[str] = Counter()
        """Blocks that a target did not take, by the error's code; tried again later."""
        self._mesh = mesh
        self._consensus = consensus
        self._client = client
        self._vault = vault
        self._on_report = on_report
        self.rate = rate
        self._budget = ByteBudget(rate * BURST_SECONDS, max(1, rate), 0.0)
        self._lanes: dict[PeerId, trio.CancelScope] = {}
        self._wakes: dict[PeerId, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self._known: dict[tuple[PeerId, bytes, tuple[int, ...]], float] = {}
        """Blocks that targets have, and until when that is relied upon."""

    async def run(self) -> None:
        """Serve the stream, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._follow_log)
            nursery.start_soon(self._follow_peers)
            nursery.start_soon(self._tell_heads)

    # ---- what happens to sessions --------------------------------------------------------------

    def settled(self, block: SettledBlock, codec: str) -> None:
        """A session has a new block."""
        self.book.settled(block, codec)

    def ready(self, block: SettledBlock, seconds: float) -> None:
        """A session's block lies in the store."""
        if self.book.ready(block, seconds):
            part = self.book.part_of(block)
            if part is not None and (block.index == 0 or not part.marks):
                self._retarget(part)
            self._wake()

    def ended(self, session: SessionId) -> None:
        """A session is over."""
        self.book.ended(session)

    # ---- targets -------------------------------------------------------------------------------

    def _retarget(self, part: Part) -> None:
        if not self.rate:
            return
        key = part.key
        wanted = targets(self._consensus.state, key.model, self._mesh.peer_id, key.layers)
        self.book.retarget(part, wanted)

    def _wake(self) -> None:
        """Let every target's lane look for work, and begin those that are missing."""
        wanted = self.book.targets()
        for peer in self._lanes.keys() - wanted:
            self._lanes[peer].cancel()
        for peer in wanted - self._lanes.keys():
            if self._nursery is not None:
                self._lanes[peer] = trio.CancelScope()
                self._nursery.start_soon(self._run_lane, peer, self._lanes[peer])
        for wake in self._wakes.values():
            wake.set()

    async def _follow_log(self) -> None:
        """Choose the targets of running sessions anew with every entry that may change them."""
        while True:
            try:
                async with self._consensus.applied(self._consensus.state.index) as entries:
                    self._retarget_all()
                    async for _entry in entries:
                        self._retarget_all()
            except LimitExceeded as error:
                log.info("reading the state anew: %s", error)

    def _retarget_all(self) -> None:
        for part in self.book:
            self._retarget(part)
        self._wake()

    async def _follow_peers(self) -> None:
        async with self._mesh.events() as events:
            async for event in events:
                self._client.forget(event.peer_id)
                if event.change == "down":
                    self.book.lost(event.peer_id)
                    for place in [each for each in self._known if each[0] == event.peer_id]:
                        del self._known[place]
                self._wake()

    # ---- lanes ---------------------------------------------------------------------------------

    async def _run_lane(self, peer: PeerId, scope: trio.CancelScope) -> None:
        pause = FIRST_PAUSE
        try:
            with scope:
                while True:
                    wake = self._wakes[peer] = trio.Event()
                    job = self.book.next_for(peer) if self._connected(peer) else None
                    if job is None:
                        await wake.wait()
                        continue
                    try:
                        await self._work(peer, job)
                        pause = FIRST_PAUSE
                    except PyAgentError as error:
                        log.debug("no blocks to %s for %.1f s: %s", peer, pause, error)
                        self.failed[error.code] += 1
                        await trio.sleep(pause)
                        pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            if self._lanes.get(peer) is scope:
                del self._lanes[peer]
                self._wakes.pop(peer, None)

    def _connected(self, peer: PeerId) -> bool:
        return any(info.peer_id == peer for info in self._mesh.peers())

    async def _work(self, peer: PeerId, job: Job) -> None:
        """Send one block, or ask first what is there already."""
        part, key = job.part, job.part.key
        mark = part.marks[peer]
        epoch = epoch_of(self._consensus.state, key.model)
        place = (peer, part.chain[job.number], job.layers)
        now = trio.current_time()
        if self._known.get(place, 0.0) > now:
            self.book.sent(peer, job)
            return
        if not mark.asked:
            chain = tuple(part.chain[mark.held : mark.held + MAX_CHAIN])
            first, last = job.layers[0], job.layers[-1] + 1
            have = Have(key.model, part.codec, chain, first, last, epoch)
            counts = await self._client.have(peer, have)
            held = min(counts[layer - first] for layer in job.layers)
            for link in chain[:held]:
                self._learn(peer, link, job.layers)
            self.book.has(peer, job, job.number + held)
            return
        keys = [
            BlockKey(key.model, layer, part.chain[job.number], part.codec) for layer in job.layers
        ]
        blocks = await self._vault.read(keys)
        if None in blocks:
            self.book.dropped(job)
            return
        held_layers = dict(zip(job.layers, blocks, strict=True))
        span = range(job.layers[0], job.layers[-1] + 1)
        link, seconds = part.chain[job.number], part.seconds[job.number]
        parent = part.chain[job.number - 1] if job.number else b""
        for first, run in frames_of(
            span.start, [held_layers.get(layer) for layer in span], PUT_BYTES
        ):
            tail = b"".join(run)
            await trio.sleep(self._budget.reserve(len(tail), trio.current_time()))
            sizes = tuple(len(block) for block in run)
            put = Put(key.model, part.codec, link, parent, job.number, first, sizes, seconds, epoch)
            await self._client.tell(peer, put, tail)
            self.bytes_sent += len(tail)
        self.blocks_sent += 1
        self._learn(peer, link, job.layers)
        self.book.sent(peer, job)

    def _learn(self, peer: PeerId, link: bytes, layers: tuple[int, ...]) -> None:
        """Remember for a while that a target has a block: other sessions may have it too."""
        if len(self._known) >= MAX_KNOWN:
            for place in list(self._known)[: MAX_KNOWN // 2]:
                del self._known[place]
        self._known[peer, link, layers] = trio.current_time() + KNOWN_SECONDS

    # ---- heads ---------------------------------------------------------------------------------

    async def _tell_heads(self) -> None:
        while True:
            await trio.sleep(REPORT_SECONDS)
            news: dict[PeerId, list[SessionHolders]] = {}
            for part in self.book:
                holders = dict(list(part.holders(self._mesh.peer_id).items())[:MAX_HOLDERS])
                if _is_news(part.told, holders):
                    part.told = holders
                    news.setdefault(part.head, []).append(_report(part, holders))
            for head, sessions in news.items():
                await self._tell(head, Report(tuple(sessions)))

    async def _tell(self, head: PeerId, report: Report) -> None:
        if head == self._mesh.peer_id:
            self._on_report(head, report)
            return
        try:
            with trio.move_on_after(REPORT_SECONDS):
                await self._client.tell(head, report)
        except PyAgentError as error:
            log.debug("%s was not told who holds its sessions' blocks: %s", head, error)


def _is_news(told: dict[PeerId, int], holders: dict[PeerId, int]) -> bool:
    if told.keys() != holders.keys():
        return True
    return any(count >= told[peer] + REPORT_STEP for peer, count in holders.items())


def _report(part: Part, holders: dict[PeerId, int]) -> SessionHolders:
    key = part.key
    return SessionHolders(
        key.session, key.model, key.first_layer, key.last_layer, tuple(holders.items())
    )
