"""What a head and a drafter rank say to each other, and what the rank makes of it.  Pure.

One stream is one session: the head opens it with :class:`OpenDraft`, asks with :class:`Ask`, and
closing the stream ends the session.  Accepted tokens travel once, each :class:`Ask` carrying those
that are new with the position of the first, so that what was lost on the way is noticed: the rank
says how many it holds (:class:`NotNow`) and gets the rest again.  Every question names the epoch of
the placement that makes the rank draft; under another one it is not answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from pyagent_node.base.errors import (
    CorruptData,
    ErrorInfo,
    InvalidRequest,
    LimitExceeded,
    PyAgentError,
    error_from_info,
)
from pyagent_node.base.limits import KIB
from pyagent_node.base.types import Digest
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.inference.drafting.port import MAX_DRAFT, Draft
from pyagent_node.inference.sampling import SamplingParams

DRAFT_PROTOCOL: Final = "/pyagent/draft/1"
"""Head to drafter rank: :class:`OpenDraft`, then :class:`Ask`; back: the rest."""

MAX_TOLD: Final = 4096
"""Accepted tokens in one question; a longer history takes several."""
MAX_AHEAD: Final = 8 * (MAX_DRAFT + 1)
"""Tokens in flight that a question may name."""
MAX_DRAFT_HEADER: Final = 32 * KIB
"""Bytes of any header of this protocol; that is far below what a frame may have."""


class OpenDraft(msgspec.Struct, frozen=True, tag="open_draft"):
    """Begin a session of the placed ``model``, for which ``drafter`` is to guess.

    ``sampling`` are the session's own parameters, so that the guesses are made with its noise.
    ``trees`` says that guesses may be asked for that form a tree.
    """

    model: Digest
    epoch: int
    drafter: Digest
    sampling: SamplingParams
    trees: bool = False


class Ask(msgspec.Struct, frozen=True, tag="ask_draft"):
    """Ask for up to ``limit`` guesses; 0 only tells what the session's tokens are.

    The tail holds accepted tokens from position ``start`` on (see :func:`pack_tokens`) and then
    ``ahead`` tokens in flight.  ``request`` counts the questions; the answer names it.  ``tree``
    asks for guesses that form a tree.
    """

    request: int
    epoch: int
    start: int
    ahead: int
    limit: int
    floor: float = 0.0
    tree: bool = False


class Drafted(msgspec.Struct, frozen=True, tag="drafted"):
    """The guesses; ``held`` accepted tokens are known to the rank.  See ``port.Draft``."""

    request: int
    held: int
    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    parents: tuple[int, ...] = ()


class NotNow(msgspec.Struct, frozen=True, tag="not_now"):
    """The question was not answered: ``held`` tokens are known, and it drafts under ``epoch``."""

    request: int
    held: int
    epoch: int


class DraftRefused(msgspec.Struct, frozen=True, tag="draft_refused"):
    """The session is over; the rank closes the stream."""

    error: ErrorInfo


ToDrafter = OpenDraft | Ask
FromDrafter = Drafted | NotNow | DraftRefused

TO_DRAFTER: Final[Codec[ToDrafter]] = Codec("draft", OpenDraft, Ask)
FROM_DRAFTER: Final[Codec[FromDrafter]] = Codec("draft", Drafted, NotNow, DraftRefused)


class DraftView(msgspec.Struct, frozen=True):
    """The load of a drafter rank; ``guesses`` counts since it was first offered."""

    sessions: int = 0
    questions: int = 0
    guesses: int = 0


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Return tokens as bytes: 32 bits each, little-endian."""
    return np.asarray(tokens, "<i4").tobytes()


def unpack_tokens(tail: bytes | bytearray | memoryview, *, most: int) -> list[int]:
    """Return the tokens of a tail.

    Raises :class:`LimitExceeded` (``too_many_tokens``) and :class:`CorruptData`
    (``malformed_message``).
    """
    size = memoryview(tail).nbytes
    if size > 4 * most:
        raise LimitExceeded(
            f"A question to a drafter has {size // 4} tokens; {most} are allowed.",
            code="too_many_tokens",
            limit=most,
        )
    if size % 4:
        raise CorruptData("A question to a drafter has half a token.", code="malformed_message")
    tokens: list[int] = np.frombuffer(tail, "<i4").tolist()
    if tokens and min(tokens) < 0:
        raise CorruptData("A question to a drafter has no token.", code="malformed_message")
    return tokens


def read_frame(frame: Frame) -> ToDrafter:
    """Return a head's message.

    Raises :class:`LimitExceeded` (``frame_too_large``) and what a codec raises.
    """
    if len(frame.header) > MAX_DRAFT_HEADER:
        raise LimitExceeded(
            f"A message to a drafter of {len(frame.header)} bytes is over the limit of"
            f" {MAX_DRAFT_HEADER}.",
            code="frame_too_large",
            size=len(frame.header),
            limit=MAX_DRAFT_HEADER,
        )
    return TO_DRAFTER.decode(frame.header)


class Question(msgspec.Struct, frozen=True):
    """A question that can be answered: ``new`` tokens were accepted, ``ahead`` are in flight."""

    request: int
    new: tuple[int, ...]
    ahead: tuple[int, ...]
    limit: int
    floor: float
    tree: bool = False


class DeskCore:
    """What a drafter rank knows of one session: the tokens told so far, and no more than fit.

    ``n_ctx`` is how many tokens the drafter can hold.
    """

    def __init__(self, n_ctx: int) -> None:
        self._n_ctx = n_ctx
        self._history: list[int] = []

    @property
    def held(self) -> int:
        """How many tokens of the session are known."""
        return len(self._history)

    def take(self, ask: Ask, tail: bytes | bytearray | memoryview, epoch: int) -> Question | NotNow:
        """Take in a question, asked while the rank drafts under ``epoch``.

        Raises :class:`InvalidRequest` (``bad_draft_request``) for numbers out of range,
        :class:`CorruptData` (``draft_contradicts``) for other tokens than were told before,
        :class:`LimitExceeded` (``kv_full``), and what :func:`unpack_tokens` raises.
        """
        tokens = unpack_tokens(tail, most=MAX_TOLD + MAX_AHEAD)
        new, ahead = self._split(ask, tokens)
        held = len(self._history)
        if ask.epoch != epoch or ask.start > held:
            return NotNow(ask.request, held, epoch)
        again = held - ask.start
        if new[:again] != self._history[ask.start : ask.start + len(new)]:
            raise CorruptData(
                "A question to a drafter contradicts what it was told before.",
                code="draft_contradicts",
            )
        fresh = new[again:]
        room = self._n_ctx - held - len(fresh) - len(ahead)
        if room < 0:
            raise LimitExceeded(
                f"The session has outgrown the {self._n_ctx} tokens of its drafter.",
                code="kv_full",
                n_ctx=self._n_ctx,
            )
        self._history += fresh
        return Question(
            ask.request, tuple(fresh), tuple(ahead), min(ask.limit, room), ask.floor, ask.tree
        )

    def _split(self, ask: Ask, tokens: list[int]) -> tuple[list[int], list[int]]:
        told = len(tokens) - ask.ahead
        good = (
            0 <= ask.request < 1 << 63
            and 0 <= ask.start < 1 << 31
            and 0 <= ask.ahead <= MAX_AHEAD
            and 0 <= told <= MAX_TOLD
            and 0 <= ask.limit <= MAX_DRAFT
            and 0.0 <= ask.floor <= 1.0
        )
        if not good:
            raise InvalidRequest(
                "A question to a drafter has numbers out of range.", code="bad_draft_request"
            )
        return tokens[:told], tokens[told:]


class AskerCore:
    """What a head knows of its session with a drafter rank: which tokens the rank holds."""

    def __init__(self) -> None:
        self._history: list[int] = []
        self._told = 0
        self._requests = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens."""
        self._history.extend(int(token) for token in tokens)

    def lags(self) -> bool:
        """Whether more is to be told than one question takes."""
        return len(self._history) - self._told > MAX_TOLD

    def ask(
        self, epoch: int, ahead: Sequence[int], limit: int, floor: float, *, tree: bool = False
    ) -> tuple[Ask, bytes]:
        """Return the next question and its tail; one that only tells, while there is much to tell.

        Raises :class:`LimitExceeded` (``too_many_tokens``) for more in flight than can be named.
        """
        if len(ahead) > MAX_AHEAD:
            raise LimitExceeded(
                f"{len(ahead)} tokens are in flight; a drafter takes {MAX_AHEAD}.",
                code="too_many_tokens",
                limit=MAX_AHEAD,
            )
        self._requests += 1
        new = self._history[self._told : self._told + MAX_TOLD]
        whole = not self.lags()
        flying = [int(token) for token in ahead] if whole and limit else []
        count = min(limit, MAX_DRAFT) if whole else 0
        ask = Ask(self._requests, epoch, self._told, len(flying), count, floor, tree)
        return ask, pack_tokens([*new, *flying])

    def answer(self, ask: Ask, reply: FromDrafter, name: str) -> Draft | NotNow | None:
        """Take in a reply to ``ask``; ``None`` for one to an earlier question, which is dropped.

        Raises the rank's own error, and :class:`CorruptData` (``malformed_message``) for an answer
        that cannot be one.
        """
        if isinstance(reply, DraftRefused):
            raise _refusal(reply.error, name)
        if reply.request < ask.request:
            return None
        good = reply.request == ask.request and 0 <= reply.held <= len(self._history)
        if isinstance(reply, Drafted):
            good = good and len(reply.tokens) == len(reply.confidence) <= ask.limit
            good = good and len(reply.parents) == (len(reply.tokens) if ask.tree else 0)
        if not good:
            raise CorruptData(
                f"The drafter {name} answered what was not asked.", code="malformed_message"
            )
        self._told = reply.held
        if isinstance(reply, NotNow):
            return reply
        return Draft(reply.tokens, reply.confidence, name, reply.parents)


def _refusal(info: ErrorInfo, name: str) -> PyAgentError:
    error = error_from_info(info)
    error.message = f"The drafter {name} refused: {error.message}"
    return error
