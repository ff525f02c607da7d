"""What a head is to generate, and what it has to know of the tokens.  Plain values."""

from __future__ import annotations

import msgspec

from pyagent_node.base.types import Digest, PeerId, SessionId
from pyagent_node.inference.generation import FetchWhen
from pyagent_node.inference.kv.budgets import Pruning
from pyagent_node.inference.kv.pieces import JoinPlan
from pyagent_node.inference.sampling import SamplingParams


class Vocabulary(msgspec.Struct, frozen=True):
    """What a head needs to know of every token: its bytes, and which tokens end an answer."""

    pieces: tuple[bytes, ...]
    end_tokens: frozenset[int]


class HeadPlan(msgspec.Struct, frozen=True):
    """A checked request: what to generate.

    ``session`` is the stable id.  ``budget`` is the greatest number of tokens to generate.
    ``root`` is what the names of its KV blocks begin with, empty where none are read or written;
    ``fetch`` says when they may come from other nodes.
    ``join`` are the pieces of the prompt to be joined, ``join_root`` what their names begin with.
    ``pruning`` says how many cells ranks may hold, ``None`` for all; such a session has no root,
    and may have as many positions as the model was ``trained`` for.
    """

    session: SessionId
    head: PeerId
    model: Digest
    budget: int
    stop: tuple[str, ...]
    ignore_eos: bool
    sampling: SamplingParams
    root: bytes = b""
    fetch: FetchWhen = "auto"
    join: JoinPlan | None = None
    join_root: bytes = b""
    pruning: Pruning | None = None
    trained: int = 0
