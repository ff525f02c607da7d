"""In which form the sketches of contexts lie: all on every node, or spread over nodes.  Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.inference.gguf_embedder import GgufIdentity


class Size(NamedTuple):
    """How many bytes the sketches of a context have together, and whether they lie spread.

    ``fixed``: they must lie on every node (:func:`may_spread`).
    """

    name: str
    bytes: int
    spread: bool
    fixed: bool = False


def may_spread(info: ContextInfo) -> bool:
    """Whether all nodes would make the same sketches of a context's vectors.

    Not of a context with a GGUF encoder that was made before contexts kept their centre.
    """
    return bool(info.centre) or GgufIdentity.parse(info.encoder) is None


def plan_spread(sizes: Collection[Size], limit: int, *, owners: int, copies: int) -> Size | None:
    """Return the context whose sketches should lie otherwise, ``None`` if all is well.

    While a node would hold more than ``limit`` bytes the largest is spread; the smallest comes back
    when three quarters of the limit are enough for it too, so that none goes to and fro.  Where
    every node owns every bucket, nothing is gained by spreading.
    """
    wrong = next((size for size in sizes if size.spread and size.fixed), None)
    if wrong is not None:
        return wrong
    held = sum(size.bytes for size in sizes if not size.spread)
    free = [size for size in sizes if not size.spread and not size.fixed]
    if held > limit and owners > copies and free:
        return max(free, key=lambda s: (s.bytes, s.name))
    back = min((s for s in sizes if s.spread), key=lambda s: (s.bytes, s.name), default=None)
    if back is not None and (held + back.bytes <= limit * 3 // 4 or owners <= copies):
        return back
    return None
