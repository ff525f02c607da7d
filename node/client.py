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
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from pyagent_node.base.errors import (
    CorruptData,
    DeadlineExceeded,
    ErrorInfo,
    PyAgentError,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.types import Placement
from pyagent_node.inference.generation import ChatMessage
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
    Progress,
    PullRequest,
    Readiness,
    StatusView,
    UnloadRequest,
)

if TYPE_CHECKING:
    from pyagent_node.node.home import DaemonState, Home

CONNECT_SECONDS = 5.0
REPLY_SECONDS = 75.0
"""Longest silence of the daemon in a request that reports no progress."""
STREAM_SECONDS = 3700.0
"""Longest silence inside a stream; the daemon's own deadlines are shorter."""

T = TypeVar("T")
Report = Callable[[Progress], None]


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


class Piece(msgspec.Struct, frozen=True):
    """Some more of an answer; ``text`` is empty while a token's text is held back.

    ``step_seconds`` and ``compute_seconds`` are the times of each token (see ``Generated``).
    """

    text: str
    token_ids: tuple[int, ...]
    step_seconds: tuple[float, ...] = ()
    compute_seconds: tuple[float, ...] = ()


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, the last item of a stream; ``text`` is all of it.

    ``finish_reason`` is ``"stop"`` or ``"length"``; ``tokens_per_second`` counts the tokens after
    the first over the time after the first, measured in the daemon.
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


class LoadedCard(msgspec.Struct, frozen=True):
    """A model that can be asked now, as ``/v1/models`` lists it."""

    id: str
    created: int
    context_window: int
    digest: str
    epoch: int


class _Models(msgspec.Struct, frozen=True):
    data: tuple[LoadedCard, ...]


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    pyagent: ErrorInfo | None = None


class _Failure(msgspec.Struct, frozen=True):
    error: _Error


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


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    pyagent: _Details | None = None
    error: _Error | None = None


class Client:
    """Talks to one daemon; use it as a context manager, or call :meth:`close`."""

    def __init__(self, url: str, token: str) -> None:
        # Proxies of the environment are for the internet, not for a daemon of one's own.
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(REPLY_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )

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
        self._http.close()

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
        return self._get("/status", StatusView)

    def peers(self) -> PeersReply:
        """Return the connected peers."""
        return self._get("/peers", PeersReply)

    def events(self, interval: float = 1.0) -> Iterator[StatusView]:
        """Follow the node's state, anew every ``interval`` seconds (0.1 to 60), without end."""
        path = f"{ADMIN_PREFIX}/events?interval={interval:g}"
        for text in self._stream("GET", path, None):
            line = _decode(text, EventLine)
            if line.error is not None:
                raise error_from_info(line.error)
            if line.status is not None:
                yield line.status

    def doctor(self) -> DoctorReply:
        """Let the daemon examine itself."""
        return self._get("/doctor", DoctorReply)

    def ready(self) -> Readiness:
        """Return whether the daemon can answer requests, and what is missing when not."""
        with _mapped():
            return _decode(self._http.get("/readyz").content, Readiness)

    def shutdown(self) -> None:
        """Ask the daemon to end in good order; it may still run when this returns."""
        self._post("/shutdown", None, Done)

    # The mesh ----------------------------------------------------------------------------------

    def connect(self, address: str) -> ConnectReply:
        """Let the daemon dial ``address``."""
        return self._post("/peers/connect", ConnectRequest(address), ConnectReply)

    def invite(self, request: InviteRequest) -> InviteReply:
        """Make an invitation ticket."""
        return self._post("/invites", request, InviteReply)

    # Models ------------------------------------------------------------------------------------

    def models(self) -> ModelsReply:
        """List the models that the mesh knows or the node holds."""
        return self._get("/models", ModelsReply)

    def loaded(self) -> tuple[LoadedCard, ...]:
        """List the models that can be asked now."""
        return _decode(self._request("GET", "/v1/models", None), _Models).data

    def pull(self, request: PullRequest, report: Report | None = None) -> ModelView:
        """Fetch a model into the node's store; ``report`` gets the progress."""
        return self._follow("/models/pull", request, Line[ModelView], report)

    def load(self, request: LoadRequest, report: Report | None = None) -> PlacementView:
        """Place a model and wait until it can be asked; ``report`` gets the progress."""
        return self._follow("/models/load", request, Line[PlacementView], report)

    def placements(self) -> tuple[PlacementView, ...]:
        """Return every placement with its ranks, standbys and spares."""
        return self._get("/placements", PlacementsReply).placements

    def plan(self, request: LoadRequest, report: Report | None = None) -> PlanView:
        """Ask what placing a model anew would change."""
        return self._follow("/placements/plan", request, Line[PlanView], report)

    def apply(self, request: LoadRequest, report: Report | None = None) -> PlacementView:
        """Place a model anew as planned, and wait until it can be asked."""
        return self._follow("/placements/apply", request, Line[PlacementView], report)

    def drain(self, request: DrainRequest, report: Report | None = None) -> DrainReply:
        """Take a node's work away and wait until it has none, or let it work again."""
        return self._follow("/placements/drain", request, Line[DrainReply], report)

    def unload(self, model: str) -> None:
        """Remove the placement of a model."""
        self._post("/models/unload", UnloadRequest(model), Done)

    def remove(self, digest: str) -> None:
        """Delete a model from the node."""
        self._request("DELETE", f"{ADMIN_PREFIX}/models/{quote(digest, safe='')}", None)

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
        yield from _read_answer(self._stream("POST", path, msgspec.json.encode(body)))

    # Inside ------------------------------------------------------------------------------------

    def _get(self, path: str, kind: type[T]) -> T:
        return _decode(self._request("GET", ADMIN_PREFIX + path, None), kind)

    def _post(self, path: str, body: object, kind: type[T]) -> T:
        content = None if body is None else msgspec.json.encode(body)
        return _decode(self._request("POST", ADMIN_PREFIX + path, content), kind)

    def _request(self, method: str, path: str, content: bytes | None) -> bytes:
        with _mapped():
            reply = self._http.request(method, path, content=content)
            _check(reply)
            return reply.content

    def _stream(self, method: str, path: str, content: bytes | None) -> Iterator[str]:
        timeout = httpx.Timeout(STREAM_SECONDS, connect=CONNECT_SECONDS)
        with (
            _mapped(),
            self._http.stream(method, path, content=content, timeout=timeout) as reply,
        ):
            if reply.status_code != httpx.codes.OK:
                reply.read()
                _check(reply)
            for line in reply.iter_lines():
                if line:
                    yield line

    def _follow(self, path: str, body: object, kind: type[Line[T]], report: Report | None) -> T:
        content = msgspec.json.encode(body)
        for text in self._stream("POST", ADMIN_PREFIX + path, content):
            line = _decode(text, kind)
            if line.error is not None:
                raise error_from_info(line.error)
            if line.done is not None:
                return line.done
            if line.progress is not None and report is not None:
                report(line.progress)
        raise _broken_off()


def _read_answer(lines: Iterator[str]) -> Iterator[Piece | Answer]:
    texts: list[str] = []
    tokens: list[int] = []
    reason = ""
    details: _Details | None = None
    usage: _Usage | None = None
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            break
        chunk = _decode(data, _Chunk)
        if chunk.error is not None:
            raise _error(chunk.error, 500)
        for choice in chunk.choices:
            text = (choice.delta.content if choice.delta else choice.text) or ""
            reason = choice.finish_reason or reason
            texts.append(text)
            tokens += choice.token_ids
            if text or choice.token_ids:
                yield Piece(text, choice.token_ids, choice.step_seconds, choice.compute_seconds)
        usage = chunk.usage or usage
        details = chunk.pyagent or details
    if details is None or usage is None:
        raise _broken_off()
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


def not_running() -> Unavailable:
    """Return the error for a daemon that is not there."""
    return Unavailable(
        "No daemon runs on this home.",
        code="daemon_not_running",
        remedy="Start it with `pyagent-node up`.",
    )


def _broken_off() -> Unavailable:
    return Unavailable(
        "The daemon broke off in the middle of its answer.",
        code="daemon_connection_lost",
        remedy="Its log may say why.",
    )


@contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise not_running() from None
    except httpx.TimeoutException:
        raise DeadlineExceeded(
            "The daemon did not answer in time.", code="daemon_not_answering"
        ) from None
    except httpx.HTTPError:
        raise _broken_off() from None


def _check(reply: httpx.Response) -> None:
    if reply.is_success:
        return
    try:
        failure = msgspec.json.decode(reply.content, type=_Failure).error
    except msgspec.DecodeError:
        failure = _Error()
    raise _error(failure, reply.status_code)


def _error(failure: _Error, status: int) -> PyAgentError:
    if failure.pyagent is not None:
        return error_from_info(failure.pyagent)
    message = failure.message or "without saying why"
    return PyAgentError(f"The daemon answered with status {status}: {message}", code="api_error")


def _decode(data: str | bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise CorruptData(
            f"The daemon's answer was not understood: {error}",
            code="bad_answer",
            remedy="The daemon may run another version: restart it.",
        ) from None
