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
from pyagent_node.base.types import Placement
from pyagent_node.inference.generation import ChatMessage, FetchWhen, SpeculationUsage
from pyagent_node.node.api.citations import Citation
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
from pyagent_node.node.client_transport import (
    ApiFailure,
    Report,
    Transport,
    broken_off,
    decode,
    failure_of,
    not_running,
)
from pyagent_node.node.context_api import ContextApiClient
from pyagent_node.node.kv_api import KvApiClient
from pyagent_node.node.mesh_client import MeshClient
from pyagent_node.node.session_client import SessionClient

if TYPE_CHECKING:
    from pyagent_node.node.home import DaemonState, Home


class ContextChoice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From which context to answer, by how many chunks; ``exact``: nothing of them is joined."""

    name: str
    count: int | None = None
    exact: bool | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generation.  Exactly one of ``messages`` and ``prompt``; ``None`` is the API's default.

    The meanings are those of the OpenAI fields of the same names, and of
    :class:`~pyagent_node.inference.sampling.SamplingParams` for the rest.
    """

    model: str
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    ignore_eos: bool | None = None
    speculation: str | None = None
    draft_length: int | None = None
    draft_depth: int | None = None
    draft_tree: bool | None = None
    cache_salt: str | None = None
    prompt_cache: bool | None = None
    cache_fetch: FetchWhen | None = None
    kv_budget: str | None = None
    context: ContextChoice | None = None


class Piece(msgspec.Struct, frozen=True):
    """Some more of an answer; ``text`` is empty while a token's text is held back.

    ``step_seconds`` and ``compute_seconds`` are the times of each token (see ``Generated``).
    """

    text: str
    token_ids: tuple[int, ...]
    step_seconds: tuple[float, ...] = ()
    compute_seconds: tuple[float, ...] = ()


class PrunedKv(msgspec.Struct, frozen=True):
    """What ranks hold of an answer's KV and what they gave up; a cell counts on every rank."""

    held_cells: int
    evicted_cells: int
    evicted_bytes: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, the last item of a stream; ``text`` is all of it.

    ``finish_reason`` is ``"stop"`` or ``"length"``; ``tokens_per_second`` counts the tokens after
    the first over the time after the first, measured in the daemon.  ``failovers`` counts how often
    the answer went on after it lost a rank or its head, ``recomputed_tokens`` what that cost, and
    ``stall_seconds`` is the longest pause between two tokens.  ``speculation`` says what guessing
    came to, if anybody guessed.  ``cached_tokens`` of the prompt did not have to be computed,
    the KV of ``joined_tokens`` was that of chunks of a context, which ``citations`` lists; of
    ``joined_landmarks`` of them some rank had landmarks only.  ``kv``
    is there where a ``kv_budget`` was asked for that ranks could keep.
    ``served_by`` are the exactness classes that computed the answer (``docs/backends.md``).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    ttft_seconds: float
    seconds: float
    tokens_per_second: float
    placement: Placement
    failovers: int = 0
    recomputed_tokens: int = 0
    stall_seconds: float = 0.0
    speculation: SpeculationUsage | None = None
    cached_tokens: int = 0
    joined_tokens: int = 0
    joined_landmarks: int = 0
    kv: PrunedKv | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()


class LoadedCard(msgspec.Struct, frozen=True):
    """A model that can be asked now, as ``/v1/models`` lists it."""

    id: str
    created: int
    context_window: int
    digest: str
    epoch: int


class _Models(msgspec.Struct, frozen=True):
    data: tuple[LoadedCard, ...]


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: tuple[int, ...] = ()
    step_seconds: tuple[float, ...] = ()
    compute_seconds: tuple[float, ...] = ()


class _Details(msgspec.Struct, frozen=True):
    placement: Placement
    seed: int
    ttft_seconds: float
    seconds: float
    tokens_per_second: float
    failovers: int = 0
    recomputed_tokens: int = 0
    stall_seconds: float = 0.0
    speculation: SpeculationUsage | None = None


class _PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0
    joined_tokens: int = 0
    joined_landmarks: int = 0


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails = _PromptDetails()
    kv: PrunedKv | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    pyagent: _Details | None = None
    error: ApiFailure | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()


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
        yield from _read_answer(self._api.stream("POST", path, msgspec.json.encode(body)))

    def resume(self, session: str, after: int = 0) -> Generator[Piece | Answer, None, None]:
        """Read a session from the token with index ``after`` on, wherever its head is or was.

        There is an :class:`Answer` at the end, of what came, if its request asked for the usage.
        Raises :class:`NotFound` (``session_not_found``) and what :meth:`generate` raises.
        """
        path = f"/v1/sessions/{quote(session, safe='')}/stream?from={after}"
        yield from _read_answer(self._api.stream("GET", path, None), whole=False)


def _read_answer(lines: Iterator[str], *, whole: bool = True) -> Iterator[Piece | Answer]:
    texts: list[str] = []
    tokens: list[int] = []
    reason = ""
    details: _Details | None = None
    usage: _Usage | None = None
    citations: tuple[Citation, ...] = ()
    served_by: tuple[str, ...] = ()
    done = False
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            done = True
            break
        chunk = decode(data, _Chunk)
        if chunk.error is not None:
            raise failure_of(chunk.error, 500)
        for choice in chunk.choices:
            text = (choice.delta.content if choice.delta else choice.text) or ""
            reason = choice.finish_reason or reason
            texts.append(text)
            tokens += choice.token_ids
            if text or choice.token_ids:
                yield Piece(text, choice.token_ids, choice.step_seconds, choice.compute_seconds)
        citations = chunk.citations or citations
        served_by = chunk.served_by or served_by
        usage = chunk.usage or usage
        details = chunk.pyagent or details
    if details is None or usage is None:
        if done and not whole:
            return
        raise broken_off()
    yield Answer(
        text="".join(texts),
        token_ids=tuple(tokens),
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        seed=details.seed,
        ttft_seconds=details.ttft_seconds,
        seconds=details.seconds,
        tokens_per_second=details.tokens_per_second,
        placement=details.placement,
        failovers=details.failovers,
        recomputed_tokens=details.recomputed_tokens,
        stall_seconds=details.stall_seconds,
        speculation=details.speculation,
        cached_tokens=usage.prompt_tokens_details.cached_tokens,
        joined_tokens=usage.prompt_tokens_details.joined_tokens,
        joined_landmarks=usage.prompt_tokens_details.joined_landmarks,
        kv=usage.kv,
        citations=citations,
        served_by=served_by,
    )


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
