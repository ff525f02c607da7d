"""Which documents of a context are fresh enough to answer from.  Pure.

The answer is a function of the records, the policy, the times of last use and the clock, and of
nothing else: two nodes that know the same say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from pyagent_node.base.types import ContextPolicy
from pyagent_node.sharding.context.records import DocumentRecord

MAX_AHEAD: Final = 86_400
"""Times of last use that are further ahead of the clock than these seconds are not believed."""


def fresh(
    records: Iterable[DocumentRecord],
    policy: ContextPolicy,
    *,
    now: float,
    uses: Mapping[str, int] | None = None,
) -> list[DocumentRecord]:
    """Return the documents that may be answered from, by source.

    ``records`` are newest versions, one a source; those that say ``removed`` are not returned.
    ``uses`` gives the time of last use of a source (Unix seconds, as ``now``).  The window of
    ``max_tokens`` holds the newest documents up to the first that does not fit.
    """
    # a clock that is ahead, or a lie, does not keep a document for ever
    used = {source: at for source, at in (uses or {}).items() if at < now + MAX_AHEAD}
    kept = [
        record
        for record in records
        if not record.removed
        and not _over(policy.max_age_seconds, record.added, now)
        and not _over(policy.unused_seconds, max(record.added, used.get(record.source, 0)), now)
    ]
    if policy.max_tokens:
        kept = _within(kept, policy.max_tokens)
    return sorted(kept, key=lambda record: record.source)


def _over(limit: int, since: int, now: float) -> bool:
    return bool(limit) and now - since >= limit


def _within(records: list[DocumentRecord], tokens: int) -> list[DocumentRecord]:
    newest = sorted(records, key=lambda r: (r.added, r.version, r.source), reverse=True)
    left = tokens
    for place, record in enumerate(newest):
        left -= record.tokens
        if left < 0:
            return newest[:place]
    return newest
