"""Settings that hold for a whole mesh: their names, bounds and defaults.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from pyagent_node.base.errors import InvalidRequest


class MeshSetting(msgspec.Struct, frozen=True):
    """One setting: its value lies in ``[low, high]`` and is ``default`` until somebody says so."""

    default: int
    low: int
    high: int
    meaning: str


MESH_SETTINGS: Final[Mapping[str, MeshSetting]] = {
    "standbys": MeshSetting(1, 0, 4, "nodes that keep each rank's slice loaded, to take over"),
    "spares": MeshSetting(1, 0, 4, "nodes that keep each rank's slice on disk"),
    "rebalance": MeshSetting(
        25, 0, 90, "percent of a token's time that moving layers by itself must save; 0: never"
    ),
    "voters_max": MeshSetting(7, 1, 7, "most nodes that vote on changes"),
    "journal_copies": MeshSetting(2, 0, 4, "nodes that keep a copy of each session's journal"),
    "session_ttl": MeshSetting(600, 10, 86_400, "seconds in which a lost session can be resumed"),
    "context_copies": MeshSetting(2, 1, 3, "nodes that hold each chunk of a context"),
    "context_patience": MeshSetting(
        60, 1, 86_400, "seconds that a node may be away before others get its chunks of contexts"
    ),
    "context_grace": MeshSetting(
        86_400, 1, 10 * 366 * 86_400, "seconds before the record of a removed document may go"
    ),
    "context_index_bytes": MeshSetting(
        1 << 28, 0, 1 << 50, "bytes of sketches of contexts on every node; larger ones are spread"
    ),
}


def check_setting(name: str, value: int | None) -> None:
    """Raise :class:`InvalidRequest` (``unknown_setting``, ``bad_setting``) saying what would do."""
    setting = MESH_SETTINGS.get(name)
    if setting is None:
        raise InvalidRequest(
            f"A mesh has no setting {name[:40]!r}.",
            code="unknown_setting",
            remedy=f"There are: {', '.join(MESH_SETTINGS)}.",
        )
    if value is not None and not setting.low <= value <= setting.high:
        raise InvalidRequest(
            f"{name} cannot be {value}.",
            code="bad_setting",
            remedy=f"Choose {setting.low} to {setting.high}: {setting.meaning}.",
            low=setting.low,
            high=setting.high,
        )


def effective_settings(changed: Mapping[str, int]) -> dict[str, int]:
    """Return every setting with its value: the ``changed`` ones, and defaults for the rest."""
    return {name: changed.get(name, each.default) for name, each in MESH_SETTINGS.items()}
