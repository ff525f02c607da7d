"""Drafts from a drafter rank: a model on another node of the mesh.

The head's end of ``remote_messages``.  A session has one stream, opened when it first needs one;
whatever goes wrong with it ends its guesses and nothing else.  After a failure no new session asks
for a few seconds, so that those which may choose take another drafter; then the rank is tried
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import trio

from pyagent_node.base.errors import CorruptData, DeadlineExceeded, PyAgentError, Unavailable
from pyagent_node.base.limits import DIAL_SECONDS
from pyagent_node.base.mesh import FrameStream, Mesh
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.drafting.port import Draft
from pyagent_node.inference.drafting.remote_messages import (
    DRAFT_PROTOCOL,
    FROM_DRAFTER,
    TO_DRAFTER,
    Ask,
    AskerCore,
    NotNow,
    OpenDraft,
)
from pyagent_node.inference.sampling import SamplingParams

logger = logging.getLogger("pyagent_node.drafter")

ANSWER_SECONDS: Final = 1.5
"""Longest wait for a draft; a head that waits longer would rather have gone on without."""
REST_SECONDS: Final = 5.0
"""After a failure no session is begun with the drafter for so long."""
CLOSE_SECONDS: Final = 1.0
MAX_GAPS: Final = 2
"""How often one question may have to be told again from an earlier token."""


class DraftPlace(NamedTuple):
    """Where a placement's drafter is: on ``peer_id``, for ``model`` under ``epoch``."""

    peer_id: PeerId
    model: Digest
    epoch: int
    drafter: Digest


Where = Callable[[], DraftPlace | None]
"""Says where the drafter is as of now; ``None`` while this node does not know."""


class RemoteDrafters:
    """Drafters of one placed model, on the node that ``where`` tells."""

    def __init__(self, name: str, mesh: Mesh, where: Where) -> None:
        self._name = name
        self._mesh = mesh
        self._where = where
        self._rest_until = 0.0

    @property
    def name(self) -> str:
        """The drafter's name, by which requests choose it."""
        return self._name

    def for_model(
        self, pieces: Sequence[bytes], sampling: SamplingParams, *, tenant: str = ""
    ) -> RemoteDrafter:
        """Return a drafter for a session.

        Whether its tokens are those of the model the rank has found out before it offered to
        draft.  Raises :class:`Unavailable` (``drafter_unavailable``) while its node is away, or
        has failed a moment ago.
        """
        place = self._where()
        if place is None or not self._connected(place.peer_id):
            raise self._unavailable("its node is not connected")
        if trio.current_time() < self._rest_until:
            raise self._unavailable("it has failed a moment ago")
        return RemoteDrafter(self, self._mesh, place, self._where, sampling)

    def rest(self) -> None:
        """Note a failure."""
        self._rest_until = trio.current_time() + REST_SECONDS

    def _connected(self, peer: PeerId) -> bool:
        mesh = self._mesh
        return peer == mesh.peer_id or any(info.peer_id == peer for info in mesh.peers())

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(
            f"The drafter {self._name} cannot be asked now: {why}.",
            code="drafter_unavailable",
            remedy="See 'pyagent-node status'; the answer is the same without it.",
            drafter=self._name,
        )


class RemoteDrafter:
    """Guesses by asking a drafter rank; see the port.

    One task at a time may await it; ``extend`` may be called meanwhile.
    """

    def __init__(
        self,
        owner: RemoteDrafters,
        mesh: Mesh,
        place: DraftPlace,
        where: Where,
        sampling: SamplingParams,
    ) -> None:
        self._owner = owner
        self._mesh = mesh
        self._place = place
        self._where = where
        self._sampling = sampling
        self._core = AskerCore()
        self._stream: FrameStream | None = None
        self._over = False
        self._trees = False

    @property
    def name(self) -> str:
        """The drafter's name."""
        return self._owner.name

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in accepted tokens, the prompt first."""
        self._core.extend(tokens)

    async def prepare(self) -> None:
        """Let the rank read the session's tokens so far.  Raises as :meth:`propose` does."""
        with self._ending_on_failure():
            await self._exchange((), 0, 0.0)

    async def propose(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what the rank guesses; nothing while the two disagree about the epoch.

        Raises :class:`DeadlineExceeded` (``draft_deadline``), :class:`Unavailable`
        (``drafter_unavailable``, ``stream_closed``), :class:`CorruptData` for an answer that makes
        no sense, and what the rank refuses with.
        """
        return await self._propose(ahead, limit, floor, tree=False)

    def expect_trees(self) -> None:
        """Tell the rank, when it is first asked, that trees will be asked for."""
        self._trees = True

    async def propose_tree(self, ahead: Sequence[int], limit: int, *, floor: float = 0.0) -> Draft:
        """Return what the rank guesses as a tree; raises as :meth:`propose` does."""
        return await self._propose(ahead, limit, floor, tree=True)

    async def _propose(
        self, ahead: Sequence[int], limit: int, floor: float, *, tree: bool
    ) -> Draft:
        if limit <= 0:
            return Draft(source=self.name)
        with self._ending_on_failure():
            with trio.move_on_after(ANSWER_SECONDS):
                return await self._exchange(ahead, limit, floor, tree=tree)
            raise DeadlineExceeded(
                f"The drafter {self.name} gave no draft within {ANSWER_SECONDS} s.",
                code="draft_deadline",
                peer_id=self._place.peer_id,
            )

    async def aclose(self) -> None:
        """Let the rank forget the session; idempotent."""
        self._over = True
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await stream.aclose()

    def _ending_on_failure(self) -> _Ending:
        if self._over:
            raise Unavailable(f"The drafter {self.name} is closed.", code="drafter_unavailable")
        return _Ending(self)

    def end(self, error: BaseException) -> None:
        """Note that nothing more can be asked: a question may be half sent."""
        self._over = True
        if isinstance(error, PyAgentError):
            self._owner.rest()

    async def _exchange(
        self, ahead: Sequence[int], limit: int, floor: float, *, tree: bool = False
    ) -> Draft:
        """Tell what is new, and ask; a long history takes several turns."""
        stream = await self._opened()
        gaps = 0
        while True:
            place = self._where()
            if place is None:
                return Draft(source=self.name)
            if (place.peer_id, place.drafter) != (self._place.peer_id, self._place.drafter):
                raise Unavailable(f"The drafter {self.name} was moved.", code="drafter_unavailable")
            more = self._core.lags()
            ask, tail = self._core.ask(place.epoch, ahead, limit, floor, tree=tree)
            reply = await self._answer(stream, ask, tail)
            if isinstance(reply, NotNow):
                if reply.epoch != ask.epoch:
                    return Draft(source=self.name)
                gaps += 1
                if gaps > MAX_GAPS:
                    raise CorruptData(
                        f"The drafter {self.name} holds on to no token.", code="malformed_message"
                    )
            elif not more:
                return reply

    async def _opened(self) -> FrameStream:
        """Return the session's stream, opening it the first time."""
        if self._stream is not None:
            return self._stream
        place = self._where() or self._place
        with trio.move_on_after(DIAL_SECONDS):
            self._stream = await self._mesh.open(place.peer_id, DRAFT_PROTOCOL)
            opening = OpenDraft(
                place.model, place.epoch, place.drafter, self._sampling, self._trees
            )
            await self._stream.send(Frame(TO_DRAFTER.encode(opening)))
            return self._stream
        raise DeadlineExceeded(
            f"Node {place.peer_id} did not open a stream within {DIAL_SECONDS:.0f} s.",
            code="peer_unreachable",
            peer_id=place.peer_id,
        )

    async def _answer(self, stream: FrameStream, ask: Ask, tail: bytes) -> Draft | NotNow:
        await stream.send(Frame(TO_DRAFTER.encode(ask), tail))
        while True:
            frame = await stream.receive()
            if frame is None:
                raise Unavailable(
                    f"The drafter {self.name} closed the stream.",
                    code="stream_closed",
                    peer_id=self._place.peer_id,
                )
            reply = self._core.answer(ask, FROM_DRAFTER.decode(frame.header), self.name)
            if reply is not None:
                return reply


class _Ending:
    """Ends a drafter when what it was asked fails or is cancelled."""

    def __init__(self, drafter: RemoteDrafter) -> None:
        self._drafter = drafter

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is not None:
            self._drafter.end(error)
