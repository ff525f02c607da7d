"""The sessions of a node, as ``status`` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.generation import SessionView
from pyagent_node.inference.pipeline.driver import Session
from pyagent_node.inference.pipeline.offers import Offers
from pyagent_node.inference.pipeline.stage_types import StageSession


def session_views(
    headed: Mapping[SessionId, Session],
    served: Iterable[StageSession],
    offers: Offers,
    *,
    head: PeerId,
    now: float,
) -> list[SessionView]:
    """Return the sessions that this node (``head``) heads, and those it serves for other heads."""
    views: dict[SessionId, SessionView] = {}
    for session, entry in headed.items():
        core = entry.core
        views[session] = SessionView(
            session,
            entry.model.name,
            core.epoch,
            head,
            len(core.prompt),
            core.generated,
            _rate(core.generated, core.first_token, now),
            core.failovers,
            core.attempt is None,
            core.guesses,
        )
    for part in served:
        if part.session not in views:
            model = offers.get(part.model)
            views[part.session] = SessionView(
                part.session,
                model.name if model else part.model,
                part.epoch,
                part.head,
                part.prompt_tokens,
                part.generated,
                _rate(part.generated, part.first_sample, part.last_seen),
            )
    return list(views.values())


def _rate(generated: int, since: float | None, now: float) -> float:
    seconds = 0.0 if since is None else now - since
    return (generated - 1) / seconds if generated > 1 and seconds > 0 else 0.0
