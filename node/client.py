"""The daemon's API from the other side: a small, typed, synchronous client.

It imports neither the daemon nor any of its libraries, so that a command line starts quickly.
Every error is one of ``pyagent_node.base.errors``: those that the daemon sent come back as what
they were, and a daemon that is not there is ``daemon_not_running``.

>>> with Client.from_home(Home.default()) as client:                       # doctest: +SKIP
...     for part in client.generate(Ask(model="smollm2-135m", prompt="Once")):
...         print(part.text, end="")
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from pyagent_node.base.errors import error_from_info
from pyagent_node.node.answers import Answer, Ask, Piece, read_answer
from pyagent_node.node.api.placement_schema import (
    DrainReply,
    DrainRequest,
    PlacementsReply,
    PlanView,
)
from pyagent_node.node.api.schema import (
    ADMIN_PREFIX,
    ConnectReply,
    ConnectRequest,
    DoctorReply,
    Done,
    EventLine,
    InviteReply,
    InviteRequest,
    Line,
    LoadRequest,
    ModelsReply,
    ModelView,
    PeersReply,
    PlacementView,
    PullRequest,
    Readiness,
    StatusView,
    UnloadRequest,
)
from pyagent_node.node.client_transport import Report, Transport, decode, not_running
from pyagent_node.node.context_api import ContextApiClient
from pyagent_node.node.kv_api import KvApiClient
from pyagent_node.node.mesh_client import MeshClient
from pyagent_node.node.session_client import SessionClient

if TYPE_CHECKING:
    from pyagent_node.node.home import DaemonState, Home


class LoadedCard(msgspec.Struct, frozen=True):
    """A model that can be asked now, as ``/v1/models`` lists it."""

    id: str
    created: int
    context_window: int
    digest: str
    epoch: int


class _Models(msgspec.Struct, frozen=True):
    data: tuple[LoadedCard, ...]


class Client:
    """Talks to one daemon; use it as a context manager, or call :meth:`close`."""

    def __init__(self, url: str, token: str) -> None:
        self._api = Transport(url, token)
        self.mesh = MeshClient(self._api)
        self.sessions = SessionClient(self._api)
        self.kv = KvApiClient(self._api)
        self.contexts = ContextApiClient(self._api)

    @classmethod
    def from_home(cls, home: Home) -> Client:
        """Return a client of the daemon that runs on ``home``.

        Raises :class:`Unavailable` (``daemon_not_running``).
        """
        state = running_daemon(home)
        if state is None:
            raise not_running()
        return cls(state.api_url, home.api_token())

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._api.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # The node ----------------------------------------------------------------------------------

    def status(self) -> StatusView:
        """Return the node's state."""
        return self._api.get("/status", StatusView)

    def peers(self) -> PeersReply:
        """Return the connected peers."""
        return self._api.get("/peers", PeersReply)

    def events(self, interval: float = 1.0) -> Iterator[StatusView]:
        """Follow the node's state, anew every ``interval`` seconds (0.1 to 60), without end."""
        path = f"{ADMIN_PREFIX}/events?interval={interval:g}"
        for text in self._api.stream("GET", path, None):
            line = decode(text, EventLine)
            if line.error is not None:
                raise error_from_info(line.error)
            if line.status is not None:
                yield line.status

    def metrics(self) -> str:
        """Return the node's metrics, in the text form of Prometheus."""
        return self._api.request("GET", "/metrics", None).decode()

    def doctor(self) -> DoctorReply:
        """Let the daemon examine itself."""
        return self._api.get("/doctor", DoctorReply)

    def ready(self) -> Readiness:
        """Return whether the daemon can answer requests, and what is missing when not."""
        return self._api.read("/readyz", Readiness)

    def shutdown(self) -> None:
        """Ask the daemon to end in good order; it may still run when this returns."""
        self._api.post("/shutdown", None, Done)

    # The mesh ----------------------------------------------------------------------------------

    def connect(self, address: str) -> ConnectReply:
        """Let the daemon dial ``address``."""
        return self._api.post("/peers/connect", ConnectRequest(address), ConnectReply)

    def invite(self, request: InviteRequest) -> InviteReply:
        """Make an invitation ticket."""
        return self._api.post("/invites", request, InviteReply)

    # Models ------------------------------------------------------------------------------------

    def models(self) -> ModelsReply:
        """List the models that the mesh knows or the node holds."""
        return self._api.get("/models", ModelsReply)

    def loaded(self) -> tuple[LoadedCard, ...]:
        """List the models that can be asked now."""
        return decode(self._api.request("GET", "/v1/models", None), _Models).data

    def pull(self, request: PullRequest, report: Report | None = None) -> ModelView:
        """Fetch a model into the node's store; ``report`` gets the progress."""
        return self._api.follow("/models/pull", request, Line[ModelView], report)

    def load(self, request: LoadRequest, report: Report | None = None) -> PlacementView:
        """Place a model and wait until it can be asked; ``report`` gets the progress."""
        return self._api.follow("/models/load", request, Line[PlacementView], report)

    def placements(self) -> tuple[PlacementView, ...]:
        """Return every placement with its ranks, standbys and spares."""
        return self._api.get("/placements", PlacementsReply).placements

    def plan(self, request: LoadRequest, report: Report | None = None) -> PlanView:
        """Ask what placing a model anew would change."""
        return self._api.follow("/placements/plan", request, Line[PlanView], report)

    def apply(self, request: LoadRequest, report: Report | None = None) -> PlacementView:
        """Place a model anew as planned, and wait until it can be asked."""
        return self._api.follow("/placements/apply", request, Line[PlacementView], report)

    def drain(self, request: DrainRequest, report: Report | None = None) -> DrainReply:
        """Take a node's work away and wait until it has none, or let it work again."""
        return self._api.follow("/placements/drain", request, Line[DrainReply], report)

    def unload(self, model: str) -> None:
        """Remove the placement of a model."""
        self._api.post("/models/unload", UnloadRequest(model), Done)

    def remove(self, digest: str) -> None:
        """Delete a model from the node."""
        self._api.request("DELETE", f"{ADMIN_PREFIX}/models/{quote(digest, safe='')}", None)

    # Generation --------------------------------------------------------------------------------

    def generate(self, ask: Ask) -> Generator[Piece | Answer, None, None]:
        """Generate: pieces as they come, then the whole answer.

        Closing the iterator early ends the generation on every rank.
        """
        body: dict[str, object] = msgspec.to_builtins(ask)
        body |= {
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        if ask.prompt is not None and ask.max_tokens is None:
            body["max_tokens"] = -1  # up to the context; the endpoint's own default is 16
        path = "/v1/completions" if ask.messages is None else "/v1/chat/completions"
        yield from read_answer(self._api.stream("POST", path, msgspec.json.encode(body)))

    def resume(self, session: str, after: int = 0) -> Generator[Piece | Answer, None, None]:
        """Read a session from the token with index ``after`` on, wherever its head is or was.

        There is an :class:`Answer` at the end, of what came, if its request asked for the usage.
        Raises :class:`NotFound` (``session_not_found``) and what :meth:`generate` raises.
        """
        path = f"/v1/sessions/{quote(session, safe='')}/stream?from={after}"
        yield from read_answer(self._api.stream("GET", path, None), whole=False)


def running_daemon(home: Home) -> DaemonState | None:
    """Return what the daemon of ``home`` says of itself; ``None`` when its process is gone."""
    state = home.read_state()
    return state if state is not None and process_exists(state.pid) else None


def process_exists(pid: int) -> bool:
    """Tell whether a process with this number exists (it may be another than once)."""
    if pid <= 0:
        return False
    if sys.platform == "win32":
        return True  # signal 0 would end it; connecting will tell
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
