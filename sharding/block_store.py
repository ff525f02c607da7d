"""The block store of a node: a tier in memory, one on disk, and what is known of both.

Two sorts of methods, and every docstring says which:

* **immediate**: answered from memory, under a lock that is only ever held for microseconds and
  never during I/O.  Call them from the event loop.
* **blocking**: they read or write the disk.  Call them in a worker thread
  (``trio.to_thread.run_sync``); the immediate ones go on meanwhile.

All methods may be called from any thread at any time.  A new block is in memory at once and reaches
the disk by :meth:`BlockStore.write_back`, which somebody has to call now and then; a block that had
to leave memory before that is gone.  Nothing here is the only copy of anything.

A disk that cannot be used (full, read-only, taken by another process, broken) is no error: the
store goes on in memory, says so once in the log and in :meth:`BlockStore.stats`, and tries again
every :data:`~pyagent_node.sharding.block_trouble.RETRY_SECONDS`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

import msgspec

from pyagent_node.base.errors import LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import Digest
from pyagent_node.sharding.block_disk import BlockDisk
from pyagent_node.sharding.block_ledger import BlockLedger, NewBlock
from pyagent_node.sharding.block_records import check_block
from pyagent_node.sharding.block_stats import Held, StoreStats
from pyagent_node.sharding.block_tree import DISK, MEMORY, Place, UnitId
from pyagent_node.sharding.block_trouble import DiskTrouble
from pyagent_node.sharding.kv_keys import BlockKey

T = TypeVar("T")

_SLICE: Final = 256
"""Blocks that are looked at without letting go of the lock."""
WRITE_BYTES: Final = 4 * MIB
"""About how much one :meth:`BlockStore.write_back` writes."""


class BlockStore:
    """Blocks by name, within limits; see the module.

    ``memory_bytes`` bounds payloads and :data:`~pyagent_node.sharding.block_ledger.OVERHEAD` each;
    0 keeps nothing at all.  ``clock`` gives seconds, for trying a failed disk again.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk: BlockDisk | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk = disk
        self._mutex = threading.Lock()
        self._turn = threading.Lock()  # one change of the disk at a time
        self._ledger = BlockLedger(memory_bytes)
        self._opened = False
        self._trouble = DiskTrouble(clock)

    # Immediate ------------------------------------------------------------------------------------

    def put(
        self,
        key: BlockKey,
        payload: bytes,
        cost_seconds: float,
        *,
        parent: bytes = b"",
        number: int = 0,
    ) -> bool:
        """Keep a block; returns whether there was room.  Immediate.

        ``parent`` is the link before in the chain (empty when it is not known, or for the first),
        ``number`` counts the blocks of the chain from 0: without the two, blocks in the middle of
        a chain may be given up before its end.  ``cost_seconds`` is what it took to compute.
        A block that is held already stays as it is.

        Raises :class:`InvalidRequest` (``bad_block_key``, ``bad_block``).
        """
        check_block(key, parent, number, payload, cost_seconds)
        block = NewBlock(Place(key, parent, number), cost_seconds, bytes(payload))
        with self._mutex:
            return self._ledger.put(block, write=self._disk is not None)

    def get(self, key: BlockKey) -> bytes | None:
        """Return a payload from memory, ``None`` if it is not there.  Immediate.

        What is on disk alone counts neither as a hit nor as a miss: :meth:`read` will.
        """
        with self._mutex:
            payload = self._ledger.get(key)
            if payload is None and not self._ledger.tree.holds(key):
                self._ledger.counts.misses += 1
            return payload

    def has(self, key: BlockKey) -> bool:
        """Say whether a block is held, in memory or on disk.  Immediate."""
        with self._mutex:
            return self._ledger.tree.holds(key)

    def leading(
        self,
        model: Digest,
        chain: Sequence[bytes],
        layers: range,
        codec: str,
        *,
        memory_only: bool = False,
    ) -> int:
        """Return how many leading blocks of ``chain`` are held in all ``layers``.  Immediate."""
        with self._mutex:
            tier = MEMORY if memory_only else None
            return self._ledger.tree.leading(model, chain, layers, codec, tier)

    def counts(self, model: Digest, chain: Sequence[bytes], layers: range, codec: str) -> list[int]:
        """Return how many leading blocks of ``chain`` are held, for each layer.  Immediate."""
        with self._mutex:
            return self._ledger.tree.counts(model, chain, layers, codec)

    def pin(self, session: str, model: Digest, codec: str, chain: Sequence[bytes]) -> None:
        """Keep what is or will be held of ``chain`` while a session runs.  Immediate.

        Replaces what was pinned for that session before.
        """
        with self._mutex:
            self._ledger.pin(session, model, codec, chain)

    def unpin(self, session: str) -> None:
        """End the :meth:`pin` of a session; idempotent.  Immediate."""
        with self._mutex:
            self._ledger.unpin(session)

    def held(self) -> list[Held]:
        """Return every link of which something is held, for a summary.  Immediate."""
        with self._mutex:
            return self._ledger.held()

    def stats(self) -> StoreStats:
        """Return counts and sizes.  Immediate."""
        with self._mutex:
            disk = self._disk
            state = "off" if disk is None else "on" if self._opened else "closed"
            if self._trouble.error is not None:
                state = self._trouble.error.code
            return StoreStats(
                memory_bytes=self._ledger.tree.nbytes[MEMORY],
                memory_limit=self._ledger.limit,
                memory_blocks=self._ledger.tree.blocks[MEMORY],
                disk_bytes=disk.file_bytes if disk else 0,
                disk_limit=disk.limit if disk else 0,
                disk_blocks=self._ledger.tree.blocks[DISK],
                pending=self._ledger.pending,
                disk=state,
                **msgspec.structs.asdict(self._ledger.counts),
            )

    # Blocking -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the disk tier into use, with what it holds.  Blocking; call it once, first.

        Never raises for the disk's sake: see the module.
        """
        with self._turn:
            self._open()

    def read(self, keys: Iterable[BlockKey]) -> list[bytes | None]:
        """Return payloads, ``None`` for those not held (or damaged, then forgotten).  Blocking.

        What comes from the disk is kept in memory again, as far as there is room.
        """
        found: list[bytes | None] = []
        for key in keys:
            with self._mutex:
                payload = self._ledger.get(key)
                on_disk = payload is None and self._ledger.tree.holds(key, DISK)
            if on_disk:
                payload = self._read_disk(key)
            if payload is None:
                with self._mutex:
                    self._ledger.counts.misses += 1
            found.append(payload)
        return found

    def write_back(self, max_bytes: int = WRITE_BYTES) -> int:
        """Write some of the blocks that are not on disk yet; returns how many.  Blocking.

        Call it again at once while it returns more than 0, later otherwise.
        """
        disk = self._disk
        if disk is None:
            return 0
        with self._turn:
            if not self._ready():
                return 0
            with self._mutex:
                batch = self._ledger.to_write(min(max_bytes, disk.segment_bytes))
                gone = self._ledger.make_room(sum(block.size for block in batch), disk.room)
                used = self._ledger.take_uses()
            return self._write(disk, batch, gone, used)

    def drop_model(self, model: Digest) -> int:
        """Remove every block of a model, everywhere here; returns how many.  Blocking.

        Raises :class:`Unavailable` or :class:`Refused` when its files could not be removed.
        """
        with self._turn:
            try:
                if self._disk is not None and self._opened:
                    self._disk.drop_model(model)
            finally:
                with self._mutex:
                    keys = self._ledger.tree.names(model)
                for some in _slices(keys):
                    with self._mutex:
                        self._ledger.forget(some)
            return len(keys)

    def clear(self) -> int:
        """Remove every block; returns how many.  Blocking; raises as :meth:`drop_model` does."""
        with self._mutex:
            models = self._ledger.models()
        return sum(self.drop_model(model) for model in models)

    def close(self) -> None:
        """Write the index and give the files back; idempotent.  Blocking.

        What waits to be written is dropped: call :meth:`write_back` before.
        """
        with self._turn:
            if self._disk is None or not self._opened:
                return
            self._opened = False
            with self._mutex:
                used = self._ledger.take_uses()
            self._disk.note_hits(used)
            self._disk.close()

    # Parts ----------------------------------------------------------------------------------------

    def _read_disk(self, key: BlockKey) -> bytes | None:
        assert self._disk is not None
        try:
            payload = self._disk.read(key)
        except PyAgentError as error:
            self._trouble.note(error)
            return None
        self._settle_lost()
        if payload is None:
            return None
        with self._mutex:
            self._ledger.was_read(key, payload)
        return payload

    def _settle_lost(self) -> None:
        """Take note of what the disk has found damaged."""
        assert self._disk is not None
        lost = self._disk.take_lost()
        if lost:
            with self._mutex:
                self._ledger.were_lost(lost)

    def _write(
        self,
        disk: BlockDisk,
        batch: list[NewBlock],
        gone: list[BlockKey],
        used: dict[UnitId, int],
    ) -> int:
        error: PyAgentError | None = None
        try:
            disk.forget(gone)
            disk.note_hits(used)
            disk.append(batch)
        except PyAgentError as failed:
            error = failed
        self._settle_lost()
        beside = disk.take_trouble()
        error = error or beside
        full = isinstance(error, LimitExceeded)
        with self._mutex:
            written = self._ledger.were_written(batch, disk.has, full=full)
        if error is not None and not full:
            self._trouble.note(error)
        elif batch:
            self._trouble.over(disk.label())
        return written

    def _ready(self) -> bool:
        """Say whether the disk may be written now, after trying a failed one again in time."""
        if not self._trouble.due:
            return False
        if self._opened and isinstance(self._trouble.error, NotFound):
            self._leave()  # somebody has removed the directory under us: begin a new one
        return self._opened or self._open()

    def _leave(self) -> None:
        """Close the disk tier and forget what it held; what is in memory is to be written anew."""
        assert self._disk is not None
        self._opened = False
        self._disk.close()
        self._disk.take_trouble()
        with self._mutex:
            self._ledger.disk_is_gone()

    def _open(self) -> bool:
        if self._disk is None or self._opened:
            return self._opened
        try:
            rows = self._disk.open()
            self._opened = True
        except PyAgentError as error:
            self._trouble.note(error)
            return False
        for some in _slices(rows):
            with self._mutex:
                for row in some:
                    place = Place(row.key, row.parent, row.number)
                    self._ledger.found_on_disk(place, row.size, row.cost, row.hits)
        with self._mutex:
            gone = self._ledger.make_room(0, self._disk.room)
        self._trouble.over(self._disk.label())
        with contextlib.suppress(LimitExceeded):
            try:
                self._disk.forget(gone)
                self._disk.shrink()
            except LimitExceeded:
                raise
            except PyAgentError as error:
                self._trouble.note(error)
        self._settle_lost()
        return True


def _slices(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _SLICE):
        yield items[start : start + _SLICE]
