"""A disk that keeps only what was synced, and the ``LogStore`` on it.

:class:`SimulatedDisk` implements the file-system port of the log
(:class:`~pyagent_node.consensus.directory.LogDirectory`), so a :class:`SimulatedLog` runs the very
code and the very bytes of the real ``FileLog``.  On command, or drawn from the generator it is
given, it

- loses power at the n-th operation from now (:attr:`SimulatedDisk.power_for`), or now
  (:meth:`SimulatedDisk.crash`): each unsynced write is then lost, kept, cut short, or kept with
  sectors of zeros; each unsynced rename or removal happened or did not;
- flips a bit (:meth:`SimulatedDisk.flip`), fills up (:attr:`SimulatedDisk.room`), is slow
  (:attr:`SimulatedDisk.delay`), fails a sync (:attr:`SimulatedDisk.failing_syncs`) and forgets what
  it could not write, as real systems do: later syncs of that file then succeed and keep nothing.
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable, Sequence

import trio

from pyagent_node.base.errors import LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.files import map_os_error
from pyagent_node.consensus.log import StoredLog
from pyagent_node.consensus.segmented import SEGMENT_BYTES, SegmentedLog
from pyagent_node.consensus.segments import SECTOR, LogEntry, Snapshot


class PowerLoss(BaseException):
    """The machine stopped in the middle of a disk operation; nothing after it happens."""


class _File:
    """A file: what programs see, and what would be left of it."""

    def __init__(self, content: bytes = b"") -> None:
        self.seen = bytearray(content)
        self.kept = b""
        self.forgetful = False
        """A sync failed: what was written since is never kept, whatever later syncs say."""


class SimulatedDisk:
    """One directory on a disk of its own; ``rng`` decides what a crash leaves."""

    def __init__(self, rng: random.Random, *, name: str = "disk") -> None:
        self.power_for: float = math.inf
        """Operations until the power is lost; the one that finds 0 does not happen."""
        self.room: float = math.inf
        """Bytes that can still be written; freed by removals and truncations."""
        self.delay = 0.0
        """Seconds that a log operation takes, of trio's clock."""
        self.failing_syncs = 0
        """How many of the next syncs fail."""
        self.lying = False
        """Syncs say that they worked and keep nothing."""
        self.operations = 0
        """Operations so far that change something."""
        self.syncs = 0
        self.erasures = 0
        """How often everything was lost."""
        self.damages = 0
        """How often something was changed that had been kept."""
        self._rng = rng
        self._name = name
        self._seen: dict[str, _File] = {}
        self._kept: dict[str, _File] = {}
        self._lives = 0

    # What a test does to it ----------------------------------------------------------------------

    def crash(self) -> None:
        """Lose the power and come back: what was not synced is at the mercy of the generator."""
        names = {}
        for name in sorted({*self._seen, *self._kept}):
            before, after = self._kept.get(name), self._seen.get(name)
            file = self._rng.choice((before, after)) if before is not after else after
            if file is not None:
                names[name] = file
        for file in names.values():
            left = bytearray(file.kept if file.forgetful else self._leave(file))
            file.seen, file.kept, file.forgetful = left, bytes(left), False
        self._seen, self._kept = names, dict(names)
        self._lives += 1
        self.power_for = math.inf

    def survive(self) -> None:
        """The program ended but not the machine: what it wrote is there, synced or not."""
        self._lives += 1
        self.power_for = math.inf

    def _leave(self, file: _File) -> bytes:
        """Return what a crash leaves of a file."""
        seen, kept = bytes(file.seen), file.kept
        if seen == kept:
            return kept
        if not seen.startswith(kept):
            return self._rng.choice((seen, kept))
        tail = bytearray(seen[len(kept) :])
        match self._rng.randrange(4):
            case 0:
                return kept
            case 1:
                return seen
            case 2:
                return kept + bytes(tail[: self._rng.randrange(len(tail))])
            case _:
                whole = bytearray(seen)
                first = len(kept) // SECTOR
                for sector in range(first, len(seen) // SECTOR + 1):
                    start, stop = max(len(kept), sector * SECTOR), (sector + 1) * SECTOR
                    if self._rng.random() < 0.5:
                        whole[start:stop] = bytes(len(whole[start:stop]))
                return bytes(whole)

    def flip(self, name: str, offset: int, bit: int) -> None:
        """Flip a bit of what is stored, as a failing disk does."""
        file = self._seen[name]
        file.seen[offset] ^= 1 << bit
        file.kept = bytes(file.seen)
        self.damages += 1

    def erase(self) -> None:
        """Lose everything: the node comes back with an empty disk."""
        self._seen, self._kept = {}, {}
        self._lives += 1
        self.erasures += 1

    def image(self) -> SimulatedDisk:
        """Return a copy of the disk as programs see it now, to look at."""
        other = SimulatedDisk(random.Random(0), name=f"image of {self._name}")  # noqa: S311
        for name, file in self._seen.items():
            other._seen[name] = other._kept[name] = _File(bytes(file.seen))
            other._seen[name].kept = bytes(file.seen)
        return other

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return len(self._seen[name].seen)

    # The file-system port -------------------------------------------------------------------------

    def names(self) -> list[str]:
        """See :meth:`LogDirectory.names`."""
        for name in [name for name in self._seen if name.endswith(".tmp")]:
            self._drop(name)
        return sorted(self._seen)

    def label(self, name: str = "") -> str:
        """See :meth:`LogDirectory.label`."""
        return f"{self._name}:/{name}"

    def exists(self, name: str) -> bool:
        """See :meth:`LogDirectory.exists`."""
        return name in self._seen

    def read(self, name: str, limit: int) -> bytes:
        """See :meth:`LogDirectory.read`."""
        if name not in self._seen:
            raise NotFound(f"{self.label(name)} does not exist.", code="file_not_found")
        content = bytes(self._seen[name].seen)
        if len(content) > limit:
            raise LimitExceeded(f"{self.label(name)} is too large.", code="file_too_large")
        return content

    def create(self, name: str, data: bytes) -> None:
        """See :meth:`LogDirectory.create`; four operations: write, sync, rename, sync."""
        temporary = f".{name}.tmp"
        file = _File()
        self._seen[temporary] = file
        try:
            self.put(temporary, file, data)
            self.keep(temporary, file)
        except PyAgentError:
            self._drop(temporary)
            raise
        self.operate()
        replaced = self._seen.get(name)
        if replaced is not None:
            self.room += len(replaced.seen)
        self._seen[name] = self._seen.pop(temporary)
        self.sync()

    def open_end(self, name: str) -> OpenFile:
        """See :meth:`LogDirectory.open_end`."""
        if name not in self._seen:
            raise NotFound(f"{self.label(name)} does not exist.", code="file_not_found")
        return OpenFile(self, name, self._seen[name], self._lives)

    def remove(self, name: str) -> None:
        """See :meth:`LogDirectory.remove`."""
        self.operate()
        self._drop(name)

    def sync(self) -> None:
        """See :meth:`LogDirectory.sync`."""
        self.operate()
        self._check_sync("")
        self._kept = dict(self._seen)

    # Its parts, for open files --------------------------------------------------------------------

    def alive(self, life: int) -> None:
        """End a program that still holds a file of before a crash."""
        if life != self._lives:
            raise PowerLoss

    def put(self, name: str, file: _File, data: bytes) -> None:
        """Append to a file as far as there is room."""
        self.operate()
        fits = data[: int(min(self.room, len(data)))]
        file.seen += fits
        self.room -= len(fits)
        if len(fits) < len(data):
            raise map_os_error(
                OSError(errno.ENOSPC, "No space left on device"), self.label(name), "writing"
            )

    def cut(self, file: _File, size: int) -> None:
        """Cut a file off."""
        self.operate()
        self.room += len(file.seen) - size
        del file.seen[size:]

    def keep(self, name: str, file: _File) -> None:
        """Make a file's content durable, or fail to."""
        self.operate()
        try:
            self._check_sync(name)
        except PyAgentError:
            file.forgetful = True
            raise
        if not file.forgetful and not self.lying:
            file.kept = bytes(file.seen)

    def _check_sync(self, name: str) -> None:
        self.syncs += 1
        if self.failing_syncs > 0:
            self.failing_syncs -= 1
            raise map_os_error(
                OSError(errno.EIO, "Input/output error"), self.label(name), "syncing"
            )

    def operate(self) -> None:
        """Count an operation; the power may be lost at it."""
        if self.power_for <= 0:
            raise PowerLoss
        self.power_for -= 1
        self.operations += 1

    def _drop(self, name: str) -> None:
        file = self._seen.pop(name, None)
        if file is not None:
            self.room += len(file.seen)


class OpenFile:
    """An open file of a :class:`SimulatedDisk`; useless after a crash."""

    def __init__(self, disk: SimulatedDisk, name: str, file: _File, life: int) -> None:
        self._disk = disk
        self._name = name
        self._file = file
        self._life = life

    def write(self, data: bytes) -> None:
        """See :meth:`LogFile.write`."""
        self._disk.alive(self._life)
        self._disk.put(self._name, self._file, data)

    def truncate(self, size: int) -> None:
        """See :meth:`LogFile.truncate`."""
        self._disk.alive(self._life)
        self._disk.cut(self._file, size)

    def sync(self) -> None:
        """See :meth:`LogFile.sync`."""
        self._disk.alive(self._life)
        self._disk.keep(self._name, self._file)

    def close(self) -> None:
        """See :meth:`LogFile.close`."""


class SimulatedLog:
    """The real log on a simulated disk; implements ``LogStore``.

    When the power goes, ``on_power_loss`` is called (cancel the node there) and the call that was
    under way never returns: the node's program sees nothing of its own end.
    """

    def __init__(
        self,
        disk: SimulatedDisk,
        *,
        on_power_loss: Callable[[], None] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._disk = disk
        self._files = SegmentedLog(disk, segment_bytes=segment_bytes)
        self._on_power_loss = on_power_loss

    async def load(self) -> StoredLog:
        """See :meth:`LogStore.load`."""
        await self._delay()
        try:
            return self._files.load()
        except PowerLoss:
            return await self._stop()

    async def append(self, entries: Sequence[LogEntry], hard_state: bytes | None = None) -> None:
        """See :meth:`LogStore.append`."""
        await self._delay()
        try:
            self._files.append(entries, hard_state)
        except PowerLoss:
            await self._stop()

    async def compact(self, snapshot: Snapshot, entries: Sequence[LogEntry]) -> None:
        """See :meth:`LogStore.compact`."""
        await self._delay()
        try:
            self._files.compact(snapshot, entries)
        except PowerLoss:
            await self._stop()

    async def aclose(self) -> None:
        """See :meth:`LogStore.aclose`."""
        self._files.close()
        await trio.lowlevel.checkpoint()

    async def _delay(self) -> None:
        """Take time before the operation; like the real log's thread, it cannot be abandoned."""
        await trio.lowlevel.checkpoint()
        if self._disk.delay:
            await trio.sleep(self._disk.delay)

    async def _stop(self) -> StoredLog:
        if self._on_power_loss is None:
            raise PowerLoss
        self._on_power_loss()
        await trio.sleep_forever()
