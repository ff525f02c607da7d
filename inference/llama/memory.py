"""How much memory a slice will take, and whether it is there, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from pyagent_node.base.errors import CorruptData, LimitExceeded
from pyagent_node.base.limits import MIB
from pyagent_node.inference.backend import PREFILL_CHUNK
from pyagent_node.inference.models.gguf_header import GgufHeader

HEADROOM: Final = 64 * MIB
"""Memory for the interpreter, the library and small buffers."""
F16: Final = 2
F32: Final = 4

_CGROUP: Final = Path("/sys/fs/cgroup")


class MemoryNeed(NamedTuple):
    """Bytes that a slice will take: its weights, its KV cells, its working memory."""

    weights: int
    kv: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.work


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Return the bytes of one KV cell over all layers of this file, keys and values in f16.

    Raises :class:`CorruptData` (``gguf_malformed``) when the numbers are missing or impossible.
    """
    arch = header.architecture
    layers = header.integer(f"{arch}.block_count")
    heads = header.fields.get(f"{arch}.attention.head_count_kv") or header.fields.get(
        f"{arch}.attention.head_count"
    )
    n_head = _first(header, f"{arch}.attention.head_count")
    width = header.integer(f"{arch}.embedding_length") // max(1, n_head)
    key = header.integer(f"{arch}.attention.key_length", width)
    value = header.integer(f"{arch}.attention.value_length", width)
    counts = heads.value if heads is not None else None
    if isinstance(counts, tuple):
        total = sum(int(n) for n in counts[:layers])
    else:
        total = layers * (int(counts) if isinstance(counts, int) else n_head)
    if not 0 <= total * (key + value) < 2**40:
        raise CorruptData(
            f"The GGUF file is malformed: {layers} layers with {total} key heads in all.",
            code="gguf_malformed",
        )
    return total * (key + value) * F16


def _first(header: GgufHeader, name: str) -> int:
    field = header.fields.get(name)
    value = field.value if field is not None else None
    if isinstance(value, tuple) and value:
        return int(value[0])
    return int(value) if isinstance(value, int) else 0


def memory_need(
    header: GgufHeader, *, cells: int, n_seq: int, n_vocab: int, max_outputs: int
) -> MemoryNeed:
    """Estimate what loading takes; ``cells`` are those of one sequence, after rounding.

    Working memory is dominated by the widest tensors of a full batch: the feed-forward layer, and
    the logits of the rows that are wanted.
    """
    arch = header.architecture
    n_embd = header.integer(f"{arch}.embedding_length")
    n_ff = _first(header, f"{arch}.feed_forward_length")
    row = 4 * n_ff + 8 * n_embd
    logits = 2 * min(max_outputs, PREFILL_CHUNK) * n_vocab
    mask = PREFILL_CHUNK * cells // 2
    work = F32 * (PREFILL_CHUNK * row + logits + mask) + HEADROOM
    return MemoryNeed(header.file_size, kv_bytes_per_token(header) * cells * n_seq, work)


def available_memory(
    system: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
    cgroup: Path = _CGROUP,
) -> int:
    """Return the bytes that can be taken now without swapping, within a container's limit too."""
    free = system()
    limit = _number(cgroup / "memory.max")
    if limit is not None:
        used = _number(cgroup / "memory.current") or 0
        free = min(free, max(0, limit - used + _inactive_file(cgroup / "memory.stat")))
    return free


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _inactive_file(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def check_memory(need: MemoryNeed, available: int) -> None:
    """Refuse what cannot fit.

    Raises :class:`LimitExceeded` (``not_enough_memory``) with every number.
    """
    if need.total <= available:
        return

    def mib(n: int) -> str:
        return f"{n / MIB:,.0f} MiB"

    raise LimitExceeded(
        f"Loading needs about {mib(need.total)} of memory ({mib(need.weights)} weights,"
        f" {mib(need.kv)} KV cache, {mib(need.work)} work) and {mib(available)} are free.",
        code="not_enough_memory",
        remedy="Load with a shorter context or fewer sequences, or spread the model over more"
        " nodes.",
        needed=need.total,
        available=available,
        weights=need.weights,
        kv=need.kv,
        work=need.work,
    )
