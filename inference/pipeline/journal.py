"""The token journal of a generation: all that is needed to go on with it elsewhere.

The text of a generation is a function of its journal alone, so whoever holds the journal can
compute the rest of the answer, on other nodes and from another head.  An engine reports every
session to its :class:`JournalSink`; the sink decides where copies are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from pyagent_node.base.types import Digest, SessionId
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.sampling import Sampled, SamplingParams

Outcome = Literal["finished", "failed", "left"]
"""How a session ended at this head.

``finished``: its reader took the last event; ``failed``: an error ended it;
``left``: the caller went away first (a client that hung up, or this node is stopping).
"""


class SessionJournal(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation: its request in tokens, and the tokens generated so far.

    ``session`` is the stable id: it outlives placements and heads.  ``budget`` is the greatest
    number of tokens to generate, ``tokens`` among them.  ``tokens`` never hold an end token that
    ended the answer, and carry the log-probabilities that the request asked for.  ``created`` are
    Unix seconds of the request.  ``label`` belongs to the caller of the engine, who gets it back
    unread (in what shape the answer is shown, say).  ``speculation``, ``draft_length``,
    ``draft_depth`` and ``draft_tree`` are the request's; a head that has no such drafter goes on
    without.  ``root`` is what the names of its KV blocks begin with, empty where none are used.
    ``pruning`` says how many cells ranks may hold, ``None`` for all.
    """

    session: SessionId
    model: Digest
    sampling: SamplingParams
    stop: tuple[str, ...]
    budget: int
    ignore_eos: bool
    prompt: tuple[int, ...]
    created: float
    label: str = ""
    tokens: tuple[Sampled, ...] = ()
    speculation: str = NO_SPECULATION
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    root: bytes = b""
    pruning: Pruning | None = None


class JournalSink(Protocol):
    """Takes the journals of an engine's sessions.

    The engine calls it from its own task, between two tokens: every method returns at once, does
    no I/O and never raises.  For one session the calls are ``begin``, any number of ``append``,
    ``end``; sessions interleave.
    """

    def begin(self, journal: SessionJournal) -> None:
        """Note a session that this node heads from now on.

        ``journal.tokens`` is empty for a new session and what was resumed from for a resumed one.
        """
        ...

    def append(self, session: SessionId, start: int, tokens: Sequence[Sampled]) -> None:
        """Note that ``tokens`` were generated, the first of them at index ``start``.

        Indices of one session follow on each other without a gap.  A token is reported before the
        reader of the answer sees it.
        """
        ...

    def end(self, session: SessionId, outcome: Outcome) -> None:
        """Note that the session is over at this head; called once, last."""
        ...
