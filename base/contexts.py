"""Names and policies of contexts: what the replicated log says of each.  Pure.

A *context* is a set of documents that questions are asked about.  The log holds its name, a random
id that is never used again, how long its documents are fresh, and which encoder makes its vectors.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.limits import MIB
from pyagent_node.base.types import ContextId, ContextPolicy

CONTEXT_ID_BYTES: Final = 16
MAX_DOCUMENT: Final = 64 * MIB
"""The most bytes of one file."""
MAX_TEXT: Final = 1 << 25
"""The most characters of a file's text."""
MAX_IDENTITY: Final = 256
"""The most characters of an encoder's identity."""
MAX_CENTRE: Final = 2 * 4096
"""The most bytes of an encoder's centre: a float16 for each number of the longest vectors."""
MAX_SECONDS: Final = 10 * 366 * 86_400
"""The longest time in a policy: ten years."""
MAX_TOKENS: Final = 1 << 48
"""The most tokens in a policy."""
MAX_HORIZON: Final = 1 << 40
"""The highest horizon: a version far above others must not leave no room for new ones."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ContextInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """A context as everybody knows it.

    ``encoder`` is the identity of the encoder of all its vectors; ``created`` in Unix seconds.
    ``spread``: its sketches are not on every node, but lie spread over the nodes by bucket.
    ``centre`` is the mean of the encoder's vectors of some fixed texts (float16, little-endian), as
    the node that made the context measured it: machines round differently, and all are to make the
    same sketches.  Empty for encoders that need none.
    New versions have counters above ``horizon``, which was said at ``raised`` (Unix seconds) by the
    entry ``raised_index`` of the log; removals up to ``floor`` are forgotten.
    """

    name: str
    id: ContextId
    policy: ContextPolicy
    encoder: str
    created: int
    spread: bool = False
    centre: bytes = b""
    horizon: int = 0
    raised: int = 0
    raised_index: int = 0
    floor: int = 0


def check_context_name(name: str) -> str:
    """Return ``name`` if it is one: a letter or digit, then letters, digits, ``.``, ``_``, ``-``.

    Raises :class:`InvalidRequest` (``bad_context_name``).
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:80]!r} cannot be the name of a context.",
            code="bad_context_name",
            remedy="Take 1 to 64 letters, digits, dots, underscores or hyphens; the first one is a"
            " letter or digit.",
        )
    return name


def check_policy(policy: ContextPolicy) -> ContextPolicy:
    """Return ``policy`` if its bounds make sense.

    Raises :class:`InvalidRequest` (``bad_context_policy``).
    """
    bounds = (
        ("max_age_seconds", policy.max_age_seconds, MAX_SECONDS),
        ("max_tokens", policy.max_tokens, MAX_TOKENS),
        ("unused_seconds", policy.unused_seconds, MAX_SECONDS),
    )
    for name, value, most in bounds:
        if not 0 <= value <= most:
            raise InvalidRequest(
                f"{name} is {value}; it must be 0 (no limit) to {most}.",
                code="bad_context_policy",
                parameter=name,
            )
    return policy
