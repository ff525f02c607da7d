"""What ``bench context --part memory`` measures, as it is stored."""

from __future__ import annotations

from typing import Final

import msgspec

OFF: Final = "off"
ONCE: Final = "once"
ROLLING: Final = "rolling"
RECENT: Final = "recent"
ARMS: Final = (OFF, ONCE, ROLLING, RECENT)


class MemoryJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: the model of a file, behind so many tokens of context each time.

    ``scored`` tokens that follow are predicted, ``asked`` facts are asked for.  ``cells`` is the
    budget, 0 for the automatic one.
    """

    path: str
    lengths: tuple[int, ...]
    scored: int = 64
    asked: int = 6
    cells: int = 0
    threads: int = 2


class MemoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """A context of ``tokens``, of which ``cells`` are held.

    ``arm`` says which: all of them ("off"); those that one pruning of the whole left, at the end
    ("once"); those of a session whose budget is rolling ("rolling"); or, for comparison, as many
    as "once" but simply the first and the last ones ("recent").  ``bytes`` are those of the cells;
    ``most`` cells, of ``most_bytes``, were held at once until then.  ``resident`` is what of the
    memory set aside for the cells is in the machine's memory, 0 where the system does not say.
    ``perplexity`` is that of the tokens that follow, ``divergence`` the mean KL divergence of
    their distributions from those with all cells, in nats.

    ``later`` is the share of facts that were told right when the question came after the cells
    were chosen, ``asked`` when it came before (only "off" and "once"; the same thing with "off").
    ``later_loss`` and ``asked_loss`` are the mean losses of the facts' words, in nats a token.
    """

    tokens: int
    arm: str
    cells: int
    bytes: int
    resident: int
    most: int
    most_bytes: int
    perplexity: float
    divergence: float
    facts: int
    later: float
    later_loss: float
    asked: float | None = None
    asked_loss: float | None = None


class MemoryResult(msgspec.Struct, frozen=True, kw_only=True):
    """All rows, and what measuring took: ``sampled`` rows, seconds of the whole."""

    rows: tuple[MemoryRow, ...]
    sampled: int
    seconds: float


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report as it is stored."""

    bench: str
    time: float
    machine: dict[str, str | int]
    model: str
    job: MemoryJob
    result: MemoryResult
