"""A drafter rank, or its head, that lies, and links that lose; tokens stay equal."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.inference.drafting.remote import REST_SECONDS
from pyagent_node.inference.drafting.remote_messages import (
    DRAFT_PROTOCOL,
    FROM_DRAFTER,
    TO_DRAFTER,
    Ask,
    Drafted,
    DraftRefused,
    NotNow,
    OpenDraft,
)
from pyagent_node.simulations.pipeline import peer

from .drafter_kit import DRAFTER, ask, drafted


class Meddling:
    """Loses or forges what passes between a head and its drafter."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.count = 0

    def __call__(self, one: PeerId, other: PeerId, protocol: str, frame: Frame) -> Sequence[Frame]:
        """Return what arrives instead of ``frame``."""
        if protocol != DRAFT_PROTOCOL:
            return (frame,)
        self.count += 1
        if self.how == "forgets":
            return self._forgetting(frame, from_head=other == peer(DRAFTER))
        if self.how == "loses":
            return () if self.count % 5 == 4 else (frame,)
        if self.how == "doubles":
            return (frame, frame) if other == peer(0) else (frame,)
        if other == peer(DRAFTER):
            return self._to_drafter(frame)
        return (self._lie(frame),)

    def _forgetting(self, frame: Frame, *, from_head: bool) -> Sequence[Frame]:
        """Let the head believe once that the drafter holds what it does not."""
        if not from_head or self.count != 6:
            return (frame,)
        message = TO_DRAFTER.decode(frame.header)
        assert isinstance(message, Ask)
        ahead = msgspec.structs.replace(message, start=message.start + 3)
        return (Frame(TO_DRAFTER.encode(ahead), frame.tail),)

    def _to_drafter(self, frame: Frame) -> Sequence[Frame]:
        match self.how:
            case "garbles":
                return (Frame(b"\xff" + frame.header, frame.tail),)
            case "bloats":
                return (Frame(frame.header, bytes(1 << 20)),)
            case "strange":
                return (Frame(TO_DRAFTER.encode(Ask(1, 1, 0, 0, 4)), b""),)
            case "old":
                message = TO_DRAFTER.decode(frame.header)
                if isinstance(message, OpenDraft):
                    message = msgspec.structs.replace(message, epoch=7)
                return (Frame(TO_DRAFTER.encode(message), frame.tail),)
            case _:
                return (frame,)

    def _lie(self, frame: Frame) -> Frame:
        reply = FROM_DRAFTER.decode(frame.header)
        if isinstance(reply, DraftRefused):
            return frame
        n = self.count
        match self.how:
            case "lies":
                tokens = tuple((n * 31 + i) % 128 for i in range(4))
                reply = Drafted(reply.request, reply.held, tokens, (1.0,) * 4)
            case "nonsense":
                reply = Drafted(reply.request, reply.held, (1 << 40, -1), (float("nan"), 9.0))
            case "floods":
                reply = Drafted(reply.request, reply.held, (1,) * 5000, (1.0,) * 5000)
            case "stale":
                reply = NotNow(reply.request, reply.held, 99)
            case "amnesia":
                reply = NotNow(reply.request, 0, 1)
            case "boasts":
                reply = msgspec.structs.replace(reply, held=1 << 40)
            case "tangled":
                reply = Drafted(
                    reply.request, reply.held, (5, 5, 6, 7), (1.0,) * 4, (2, -7, 1 << 40, 3)
                )
            case "future":
                reply = msgspec.structs.replace(reply, request=1 << 50)
            case _:
                return frame
        return Frame(FROM_DRAFTER.encode(reply), frame.tail)


REFUSED = {
    "garbles": "malformed_message",
    "bloats": "too_many_tokens",
    "strange": "bad_draft_request",
    "old": "stale_epoch",
}


@pytest.mark.parametrize(
    "how",
    [
        *REFUSED,
        *("forgets", "loses", "doubles", "lies", "nonsense", "floods", "stale", "amnesia"),
        *("boasts", "future"),
    ],
)
async def test_whatever_happens_on_the_way(autojump_clock: MockClock, how: str) -> None:
    async with drafted() as world:
        world.network.meddler = Meddling(how)
        usage = await ask(world)
        assert usage is not None
        refused = world.nodes[DRAFTER].pipeline.drafts.refused
        if how in REFUSED:
            assert refused[REFUSED[how]]
            assert usage.failed
        if how in ("forgets", "doubles"):
            assert not usage.failed
            assert usage.acceptance > 0.9
        world.network.meddler = None
        await trio.sleep(REST_SECONDS)
        again = await ask(world)
        assert again is not None
        assert again.acceptance > 0.95


async def test_a_tree_that_is_none(autojump_clock: MockClock) -> None:
    async with drafted() as world:
        world.network.meddler = Meddling("tangled")
        await ask(world, tree=True, draft_length=4, draft_depth=2)
