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
    """One choice of one reply: its ``shape``, the reply's random number and time, its index.

    ``fingerprint`` is the reply's ``system_fingerprint``.
    """

    shape: Shape
    fingerprint: str
    identity: str
    created: int
    choice: int


_decoder: Final = msgspec.json.Decoder(ReplyLabel)


def make_labels(shape: Shape, fingerprint: str, identity: int, created: int) -> list[str]:
    """Return the labels of a reply's choices."""
    labels = (
        ReplyLabel(
            shape=shape,
            fingerprint=fingerprint,
            identity=f"{identity:032x}",
            created=created,
            choice=choice,
        )
        for choice in range(shape.choices)
    )
    return [msgspec.json.encode(label).decode() for label in labels]


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
