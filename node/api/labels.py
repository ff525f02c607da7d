"""What an answer needs to be shown by another node as it would have been shown here.

It travels as the label of the session's journal.  Pure: a label comes from another node, so it is
checked like any message.
"""

from __future__ import annotations

from typing import Final

import msgspec

from pyagent_node.base.errors import CorruptData
from pyagent_node.inference.sampling import MAX_TOP_LOGPROBS
from pyagent_node.node.api.openai_requests import MAX_CHOICES, Shape


class ReplyLabel(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of one reply: its ``shape``, the reply's random number and time, its index."""

    shape: Shape
    identity: str
    created: int
    choice: int


_decoder: Final = msgspec.json.Decoder(ReplyLabel)


def make_label(shape: Shape, identity: int, created: int, choice: int) -> str:
    """Return the label of one choice."""
    label = ReplyLabel(shape=shape, identity=f"{identity:032x}", created=created, choice=choice)
    return msgspec.json.encode(label).decode()


def read_label(text: str) -> ReplyLabel:
    """Return the label in ``text``.

    Raises :class:`CorruptData` (``bad_journal``).
    """
    try:
        label = _decoder.decode(text)
        shape = label.shape
        int(label.identity, 16)
        good = (
            len(label.identity) == 32
            and 1 <= shape.prompts <= shape.choices <= MAX_CHOICES
            and shape.choices % shape.prompts == 0
            and 0 <= label.choice < shape.choices
            and 0 <= shape.top_logprobs <= MAX_TOP_LOGPROBS
        )
    except (msgspec.DecodeError, ValueError, RecursionError):
        good = False
    if not good:
        raise CorruptData(
            "The session's journal does not say how its answer is shown.", code="bad_journal"
        )
    return label
