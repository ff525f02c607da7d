"""The messages of ``/pyagent/pipe/1`` and their raw tails.

Ordering contract.  A node talks to another over two long-lived streams that it opened itself: the
*data* lane carries :class:`OpenSession`, :class:`Restore`, :class:`Join`, :class:`Keep` and
:class:`Step`, the *control* lane
everything else, so that a :class:`CloseSession` or :class:`CancelSteps` overtakes megabytes of
prefill.  Each lane is first in, first out, and sessions travel from rank to rank over data lanes
only; hence every rank sees the sessions of a pipeline in the order in which rank 0 saw them.
Between lanes there is no order: a stage may see a session closed before it is opened.

Every message names its stage by (model, epoch, rank).  A :class:`Step`'s tail is ``n`` token ids
(int32) followed by ``n`` rows of activations, both little-endian; the rows are missing when one
rank holds the whole model.  Their numbers are float32, or what the placement says (see
``activations``), which both sides know by the epoch.

Guesses.  The last ``drafts`` tokens of a step are guesses; the last rank keeps those that it would
have sampled.  A step with a ``parent`` was sent before the parent's result: it holds only if all
guesses of the parent are right and the token that the parent samples last is its own first token.
If not it is void, and so is every step that has it for a parent; the last rank drops void steps
without an answer, the others those that the head cancels.  Whatever follows begins at the first
position that is not settled, and every rank drops the cells from there on first.

Blocks (see ``kv_keys``).  A session with a ``root`` may begin from KV that was computed before: a
:class:`Restore` right behind its opening, in the same lane, asks every rank for the leading blocks
of some tokens.  Each rank imports what it can get and says how far it came, in :class:`Restored`;
the first step then begins at any position up to the least of these, and every rank drops the
cells from there on first.  A first step that comes before the answer ends the restoring.

Pieces (see ``kv.chunks``).  A session *without* a root may take over the KV of pieces of its
prompt: a :class:`Join` right behind its opening, in the same lane, asks every rank to get that of
its own layers ready, and each says in :class:`Joined` what it has.  A step of the prompt then may
begin where a piece ends, if the one before it ended behind the skipped tokens of that piece: the
cells between are the piece's.  To compute the KV of a piece its head opens a session with the
piece for a prompt, sends its steps, asks for no token, and says :class:`Keep`: every rank answers
with :class:`Restored` when the shelf has been shown all blocks.

The guesses of a step may form a tree, by ``parents`` (see ``trees``).  The last rank keeps the path
that it would have sampled; the others keep the principal one, which is what a step with that one
for its ``parent`` follows.  Where the path that came true leaves the principal one, only the last
rank has its cells: the next step begins there and carries its tokens again, none of them a guess.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from pyagent_node.base.errors import CorruptData, ErrorInfo
from pyagent_node.base.types import EXACT_ACTIVATIONS, Digest, PeerId, SessionId
from pyagent_node.base.wire import Codec
from pyagent_node.inference.backend import PREFILL_CHUNK, Activations, Tokens
from pyagent_node.inference.generation import FetchWhen
from pyagent_node.inference.kv.budgets import Evicted, Pruning
from pyagent_node.inference.kv.pieces import Marks, Piece
from pyagent_node.inference.pipeline.activations import number_bytes, pack_rows, unpack_rows
from pyagent_node.inference.pipeline.origins import Origin
from pyagent_node.inference.sampling import Sampled, SamplingParams
from pyagent_node.inference.trees import principal
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

PIPE_PROTOCOL: Final = "/pyagent/pipe/1"
MAX_SOURCES: Final = 16
"""Peers that a head may name as sources of blocks."""


class OpenSession(msgspec.Struct, frozen=True, tag="open_session", gc=False):
    """Admit a session to a rank; each rank passes it on to the next.

    ``positions`` is the greatest number of tokens that it will hold, the prompt's
    ``prompt_tokens`` included.  ``head`` takes its results and errors, and alone may close it.
    ``root`` is what the names of its KV blocks begin with, empty where none are read or written;
    ``cut`` is the greatest ``prefill_cut`` of the ranks so far, and ``classes`` are their exactness
    classes (``BackendInfo``): these names depend on both, too.  ``trail`` are the ranks so far, and
    ``former`` those that computed the session before, whose KV may be gone on from (``origins``).
    ``pruning`` has every rank give up cells, where it can (``kv.pruning``); such a session has no
    root.  ``landmarks`` has every rank that can choose landmarks of its prompt, which is a piece
    (``kv.landmarks``), by the attention of the steps behind it, and keep them with its blocks.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    head: PeerId
    positions: int
    prompt_tokens: int
    sampling: SamplingParams
    root: bytes = b""
    cut: int = BLOCK_TOKENS
    classes: tuple[str, ...] = ()
    trail: tuple[Origin, ...] = ()
    former: tuple[Origin, ...] = ()
    pruning: Pruning | None = None
    landmarks: Marks | None = None


class Step(msgspec.Struct, frozen=True, tag="step", gc=False, omit_defaults=True):
    """``n`` consecutive tokens of a session from ``position`` on, in the tail.

    ``step`` counts up from 0 in a session; ranks see gaps where steps were dropped.  ``sample``
    asks the last rank for the next token.  ``spent`` is the time in seconds that ranks have
    computed on this step so far.  For ``drafts``, ``parent`` and ``parents`` see the module.
    ``settled`` is for a step with a parent: the tokens before that position are no guesses any
    more.  (Of any other step that is so for all before its own guesses.)  ``evicted`` is what the
    ranks so far have given up of the session.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    step: int
    position: int
    n: int
    sample: bool
    spent: float = 0.0
    drafts: int = 0
    parent: int | None = None
    parents: tuple[int, ...] = ()
    settled: int = 0
    evicted: Evicted | None = None

    @property
    def known(self) -> int:
        """How many of its tokens are no guesses."""
        return self.n - self.drafts

    @property
    def stop(self) -> int:
        """The position after its principal path."""
        return self.position + self.known + principal(self.parents, self.known, self.drafts)


MAX_HELD: Final = 16
"""Ranks that one :class:`Restore` may name as those of before."""


class Held(msgspec.Struct, frozen=True, gc=False):
    """The cells of the layers ``[first_layer, last_layer)`` were on ``peer_id`` a moment ago."""

    peer_id: PeerId
    first_layer: int
    last_layer: int


class Restore(msgspec.Struct, frozen=True, tag="restore", gc=False):
    """Get the leading blocks of the ``n`` tokens in the tail (int32); each rank passes it on.

    ``n`` is a multiple of the tokens in a block.  ``sources`` are peers that may have the blocks.
    ``rest`` tokens more, less than a block, follow in the tail: the ranks of before, ``held``, hand
    their cells over.  ``seconds`` is what a token of a prompt takes all ranks together, 0 where
    the head has not measured that; ``fetch`` says when blocks may come from other nodes.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    n: int
    sources: tuple[PeerId, ...] = ()
    rest: int = 0
    held: tuple[Held, ...] = ()
    seconds: float = 0.0
    fetch: FetchWhen = "auto"


class Restored(msgspec.Struct, frozen=True, tag="restored", gc=False):
    """From a rank to the head: it has ``blocks`` leading blocks of what was asked for.

    ``cut`` is the greatest ``prefill_cut`` of the ranks up to this one.  ``rest`` tokens after the
    last of the blocks are there too.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    blocks: int
    cut: int
    rest: int = 0


class Join(msgspec.Struct, frozen=True, tag="join", gc=False):
    """Get the KV of ``pieces`` of the prompt ready, each but its first ``skip`` tokens.

    The tail are the tokens of each as it was computed alone, in whole blocks (int32); ``root`` is
    what the names of these blocks begin with.  Each rank passes it on.  With ``landmarks`` a rank
    may take a piece in its smaller, lossy form (``kv.landmarks``), if the session may be pruned.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    root: bytes
    skip: int
    pieces: tuple[Piece, ...]
    sources: tuple[PeerId, ...] = ()
    landmarks: bool = False


class Joined(msgspec.Struct, frozen=True, tag="joined", gc=False):
    """From a rank to the head: it has the KV of these ``pieces``, by their numbers in order.

    Of those in ``landmarks`` it has the smaller form.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    pieces: tuple[int, ...]
    landmarks: tuple[int, ...] = ()


class Keep(msgspec.Struct, frozen=True, tag="keep", gc=False):
    """Answer with :class:`Restored` when the blocks of the steps so far are kept."""

    session: SessionId
    model: Digest
    epoch: int
    rank: int


class CloseSession(msgspec.Struct, frozen=True, tag="close_session", gc=False):
    """From the head to every rank: drop the session, its queued steps and its slot.  Idempotent.

    ``parts`` says that the epoch ends and the session goes on under the next one: the cells are
    kept until the rank hands them over at its end.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    parts: bool = False


class CancelSteps(msgspec.Struct, frozen=True, tag="cancel_steps", gc=False):
    """From the head: the steps ``[first, stop)`` that have parents are void.

    They are dropped unread, those still to come too.  Only to save work: nothing relies on it.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    first: int
    stop: int


class Result(msgspec.Struct, frozen=True, tag="result", gc=False):
    """From the last rank to the head: a step is done.

    ``sampled`` when it asked for tokens: its guesses that were right, and one token more.
    ``classes``, with the first token, are the exactness classes of the ranks that computed it;
    ``trail``, with the first result of all, are those ranks.  ``evicted`` is what all ranks
    have given up of the session.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    step: int
    spent: float
    sampled: tuple[Sampled, ...] = ()
    classes: tuple[str, ...] = ()
    trail: tuple[Origin, ...] = ()
    evicted: Evicted | None = None


class StageError(msgspec.Struct, frozen=True, tag="stage_error"):
    """A rank gave the session up, and why.

    ``rank`` and ``peer_id`` name the rank at fault.  Sent to the head, or, by a rank that does not
    know the session, to whoever sent the step, who passes it on to the head.
    """

    session: SessionId
    model: Digest
    epoch: int
    rank: int
    peer_id: PeerId
    error: ErrorInfo


PipeMessage = (
    OpenSession
    | Step
    | CloseSession
    | CancelSteps
    | Result
    | StageError
    | Restore
    | Restored
    | Join
    | Joined
    | Keep
)

PIPE_CODEC: Codec[PipeMessage] = Codec(
    "pipe",
    OpenSession,
    Step,
    CloseSession,
    CancelSteps,
    Result,
    StageError,
    Restore,
    Restored,
    Join,
    Joined,
    Keep,
)

Tail = bytes | bytearray | memoryview

_INT32 = np.dtype("<i4")


def pack_tail(
    tokens: Tokens, activations: Activations | None, kind: str = EXACT_ACTIVATIONS
) -> bytes:
    """Return the tail of a step: token ids, then the rows of ``activations`` if there are any.

    ``kind`` is how their numbers cross; raises :class:`Unsupported` (``unsupported_activations``).
    """
    ids = np.ascontiguousarray(tokens, dtype=_INT32)
    if activations is None:
        return ids.tobytes()
    return b"".join((ids.data, pack_rows(activations, kind)))


def unpack_tail(
    tail: Tail, n: int, n_embd: int, kind: str = EXACT_ACTIVATIONS
) -> tuple[Tokens, Activations | None]:
    """Return the ``n`` tokens of a tail and its (n, n_embd) activations, as views if it can be.

    ``kind`` is how their numbers cross.  Raises :class:`CorruptData` (``malformed_step``) when the
    size is neither that of tokens alone nor that of tokens and activations, and
    :class:`Unsupported` (``unsupported_activations``).
    """
    size = memoryview(tail).nbytes
    with_rows = n * (4 + number_bytes(kind) * n_embd)
    if n < 1 or size not in (4 * n, with_rows):
        raise CorruptData(
            f"A step of {n} tokens has a tail of {size} bytes;"
            f" it must be {4 * n} (tokens alone) or {with_rows} (activations in {kind}).",
            code="malformed_step",
            size=size,
            n=n,
        )
    tokens: Tokens = np.frombuffer(tail, dtype=_INT32, count=n)
    if size == 4 * n:
        return tokens, None
    return tokens, unpack_rows(tail, n, n_embd, kind, 4 * n)


def unpack_tokens(tail: Tail, n: int, rest: int = 0) -> Tokens:
    """Return the ``n + rest`` tokens of a :class:`Restore` or :class:`Join`, as a view of its tail.

    Raises :class:`CorruptData` (``malformed_restore``) for a tail of another size.
    """
    size, count = memoryview(tail).nbytes, n + rest
    if n < 0 or n % BLOCK_TOKENS or not 0 <= rest < BLOCK_TOKENS or not 0 < 4 * count == size:
        raise CorruptData(
            f"Blocks of {BLOCK_TOKENS} tokens are restored; {n} tokens and a rest of {rest} came in"
            f" {size} bytes.",
            code="malformed_restore",
            size=size,
            n=n,
        )
    return np.frombuffer(tail, dtype=_INT32, count=count)


def onward(step: Step, seconds: float, evicted: Evicted | None = None) -> Step:
    """Return a step as it goes on to the next rank, after ``seconds`` on this one."""
    return Step(
        step.session,
        step.model,
        step.epoch,
        step.rank + 1,
        step.step,
        step.position,
        step.n,
        step.sample,
        step.spent + seconds,
        step.drafts,
        step.parent,
        step.parents,
        step.settled,
        evicted,
    )


def chunk_end(position: int, stop: int) -> int:
    """Return where the prefill chunk that begins at ``position`` ends, at most at ``stop``."""
    return min(stop, (position // PREFILL_CHUNK + 1) * PREFILL_CHUNK)
