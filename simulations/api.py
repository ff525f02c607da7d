"""A node without a network or a model, behind the real HTTP API.

:class:`WordEngine` implements the ``Engine`` port deterministically, so that what the API makes of
its events can be checked exactly; :class:`SimulatedServices` is the node around it, and
:func:`simulated_api` serves both on a free port of the loopback interface.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import httpx
import trio

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, NotFound, PyAgentError
from pyagent_node.base.types import Digest, PeerId, Placement, Rank, SessionId, Slice
from pyagent_node.inference.generation import (
    NO_SPECULATION,
    Finished,
    Generated,
    GenerationEvent,
    GenerationRequest,
    LoadedModel,
    SessionView,
    SpeculationUsage,
    TopLogprob,
    Usage,
)
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.node.api.app import ApiOptions, create_app
from pyagent_node.node.api.exchange import Drain
from pyagent_node.node.api.guard import GuardOptions
from pyagent_node.node.api.openai import GenerationOptions
from pyagent_node.node.api.placement_schema import DrainReply, DrainRequest, PlanView
from pyagent_node.node.api.schema import (
    Check,
    ConnectReply,
    DoctorReply,
    InviteReply,
    InviteRequest,
    LoadRequest,
    ModelsReply,
    ModelView,
    NodeView,
    PlacementView,
    Progress,
    PullRequest,
    Readiness,
    StatusView,
)
from pyagent_node.node.api.server import ApiServer, ServerOptions, open_api
from pyagent_node.node.api.services import Report
from pyagent_node.node.api.session_schema import (
    ImportReply,
    MoveReply,
    MoveRequest,
    SessionRow,
    SessionsReply,
)
from pyagent_node.node.live_sessions import LiveSessions, Recovered, open_live_sessions
from pyagent_node.node.session_recovery import session_not_found
from pyagent_node.node.telemetry import Telemetry
from pyagent_node.simulations.api_kv import SimulatedKvServices
from pyagent_node.simulations.api_mesh import SimulatedMeshServices

TOKEN = "test-token-of-32-characters-0000"  # noqa: S105 (of simulated nodes only)
DIGEST = Digest("ab" * 32)
PEER = PeerId("12D3KooWTest")
N_CTX = 64


def _guesses(request: GenerationRequest) -> SpeculationUsage | None:
    """Return made-up counts for a request with a drafter."""
    if request.speculation in (None, NO_SPECULATION):
        return None
    return SpeculationUsage(request.speculation, 4, 10, 6, 1, False, 3, 2, 20.0, 10.0)


class WordEngine:
    """Generates one word a token, chosen by a hash of prompt, seed and position.

    A token is the index of its word.  ``gate`` (when set) is waited for before each token, so a
    test can hold a generation; ``cancelled`` counts generations left before their end.
    """

    words = (*(f"w{i} " for i in range(100)), "é ", "🦀 ")

    def __init__(self) -> None:
        self.caches = False
        """Whether prompts that were asked before count as cached, all but a token."""
        self._known: set[tuple[str, object]] = set()
        self.running = 0
        self.started = 0
        self.cancelled = 0
        self.idle = trio.Event()
        self.gate: Callable[[int], trio.Event | None] | None = None
        self.fail_at: dict[int, PyAgentError | Exception] = {}
        self.loaded = True
        self.limit = 100
        self.requests: list[GenerationRequest] = []

    def placement(self) -> Placement:
        """Return the one placement: a single rank."""
        return Placement(
            DIGEST, 7, (Rank(0, Slice(0, 30, True), PEER),), n_ctx=N_CTX, n_seq=self.limit
        )

    def _cached(self, request: GenerationRequest, prompt: int) -> int:
        """Return how much of a prompt was asked for before, and note it."""
        name = (request.cache_salt, request.prompt or request.tokens or request.messages)
        if not request.prompt_cache or not self.caches:
            return 0
        cached = prompt - 1 if name in self._known else 0
        self._known.add(name)
        return cached

    def models(self) -> list[LoadedModel]:
        """Return the model ``words``, unless ``loaded`` is off."""
        if not self.loaded:
            return []
        return [LoadedModel("words", DIGEST, N_CTX, 1700000000, self.placement())]

    def sessions(self) -> list[SessionView]:
        """Return one view for each running generation."""
        return [
            SessionView(SessionId("0" * 32), "words", 7, PEER, 1, 1, 1.0)
            for _ in range(self.running)
        ]

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Return one number a word."""
        return [len(word) for word in text.split()]

    def prompt_length(self, request: GenerationRequest) -> int:
        """Return the words (or tokens) of the prompt."""
        if request.tokens is not None:
            return len(request.tokens)
        if request.prompt is not None:
            return len(request.prompt.split())
        return sum(len(m.content.split()) for m in request.messages or ())

    def generate(
        self, request: GenerationRequest
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Generate words; see the class."""
        return self._generate(request)

    @asynccontextmanager
    async def _generate(
        self, request: GenerationRequest
    ) -> AsyncIterator[AsyncIterator[GenerationEvent]]:
        self.requests.append(request)
        if request.model not in ("words", DIGEST):
            raise NotFound("no such model", code="model_not_found")
        request.sampling.check(len(self.words))
        prompt = self.prompt_length(request)
        if prompt >= N_CTX:
            raise InvalidRequest(
                f"The prompt has {prompt} tokens; the context holds {N_CTX}.",
                code="prompt_too_long",
                prompt_tokens=prompt,
                n_ctx=N_CTX,
            )
        if self.running >= self.limit:
            raise LimitExceeded("full", code="too_many_sessions")
        self.running += 1
        self.started += 1
        self.idle = trio.Event()
        ended = False

        async def events() -> AsyncGenerator[GenerationEvent, None]:
            nonlocal ended
            began = trio.current_time()
            limit = min(request.max_tokens or N_CTX, N_CTX - prompt)
            text = ""
            count = 0
            reason = "length"
            for position in range(limit):
                if self.gate is not None:
                    event = self.gate(position)
                    if event is not None:
                        await event.wait()
                await trio.lowlevel.checkpoint()
                if position in self.fail_at:
                    raise self.fail_at[position]
                token = self.choose(request, position)
                word = self.words[token]
                count += 1
                text += word
                hit = next((s for s in request.stop if s in text), None)
                top = tuple(
                    TopLogprob(t, self.words[t].encode(), -float(i + 1))
                    for i, t in enumerate(
                        (token + k) % len(self.words) for k in range(request.sampling.top_logprobs)
                    )
                )
                yield Generated(
                    token,
                    "" if hit else word,
                    word.encode(),
                    -1.0 if request.sampling.logprobs else None,
                    top,
                )
                if hit:
                    reason = "stop"
                    break
            now = trio.current_time() - began
            ended = True
            yield Finished(
                "stop" if reason == "stop" else "length",
                "",
                Usage(
                    prompt,
                    count,
                    now,
                    now,
                    speculation=_guesses(request),
                    cached_tokens=self._cached(request, prompt),
                ),
                self.placement(),
            )

        stream = events()
        try:
            yield stream
        finally:
            await stream.aclose()
            self.running -= 1
            if not ended:
                self.cancelled += 1
            if not self.running:
                self.idle.set()

    def resume(
        self, journal: SessionJournal, after: int
    ) -> AbstractAsyncContextManager[AsyncIterator[GenerationEvent]]:
        """Refuse: nothing is ever taken over from another node."""
        raise session_not_found(journal.session)

    def fail(self, session: SessionId, error: PyAgentError) -> bool:
        """Know no session of others."""
        return False

    def choose(self, request: GenerationRequest, position: int) -> int:
        """Return the token at ``position``; the seed counts when the temperature does."""
        if request.sampling.logit_bias:
            return max(request.sampling.logit_bias.items(), key=lambda item: item[1])[0]
        source = f"{request.messages}{request.prompt}{request.tokens}"
        if request.sampling.temperature > 0:
            source += str(request.sampling.seed)
        digest = hashlib.sha256(f"{source}{position}".encode()).digest()
        return int.from_bytes(digest[:4], "big") % len(self.words)


class Forgetful:
    """Keeps no journals."""

    def retain(self, session: SessionId, claim: int = 1) -> None:
        """Do nothing."""

    def release(self, session: SessionId) -> None:
        """Do nothing."""


async def no_session(session: SessionId) -> Recovered:
    """Know no session of others."""
    raise session_not_found(session)


class SimulatedSessionServices:
    """One session, which can be moved, written out and read in."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    async def list(self) -> SessionsReply:
        """Return one session."""
        row = SessionRow(
            session=SessionId("0" * 32),
            public=SessionId("1" * 32),
            part="head",
            model="words",
            head=PEER,
            head_name="n",
            completion_tokens=3,
        )
        return SessionsReply((row,))

    async def move(self, request: MoveRequest) -> MoveReply:
        """Note the wish."""
        self.calls.append(request)
        return MoveReply(session=request.session, peer_id=PEER, name=request.to, tokens=3)

    async def write_out(self, session: SessionId) -> dict[str, str]:
        """Return its id."""
        self.calls.append(session)
        return {"session": session}

    async def read_in(self, data: bytes) -> ImportReply:
        """Note the bytes."""
        self.calls.append(data)
        return ImportReply(
            session=SessionId("2" * 32),
            model=DIGEST,
            name="words",
            prompt_tokens=1,
            completion_tokens=3,
            seconds=600.0,
        )


class SimulatedServices:
    """A node whose operations succeed at once and are noted in ``calls``."""

    live: LiveSessions

    def __init__(self) -> None:
        self.engine = WordEngine()
        self.mesh = SimulatedMeshServices()
        self.sessions = SimulatedSessionServices()
        self.kv = SimulatedKvServices()
        self.telemetry = Telemetry()
        self.reasons: tuple[str, ...] = ()
        self.stopped = False
        self.load_error: Exception | None = None
        self.calls: list[object] = []

    def session_ttl(self) -> int:
        """Return ten minutes."""
        return 600

    def readiness(self) -> Readiness:
        """Return ready, unless ``reasons`` were set."""
        return Readiness(not self.reasons, self.reasons)

    async def status(self) -> StatusView:
        """Return a node without a mesh."""
        node = NodeView(peer_id=PEER, name="n", version="0", pid=1, started=0.0, api="http://x")
        return StatusView(
            time=1.0,
            node=node,
            mesh=None,
            consensus=None,
            sessions=tuple(self.engine.sessions()),
        )

    async def connect(self, address: str) -> ConnectReply:
        """Note the address."""
        self.calls.append(address)
        return ConnectReply(PEER)

    async def invite(self, request: InviteRequest) -> InviteReply:
        """Return a made-up ticket."""
        self.calls.append(request)
        return InviteReply("pyagent1secret", 2.0)

    async def models(self) -> ModelsReply:
        """Return the model ``words``."""
        return ModelsReply((ModelView(digest=DIGEST, name="words", size=1),))

    async def pull(self, request: PullRequest, report: Report) -> ModelView:
        """Report three steps and succeed."""
        self.calls.append(request)
        for done in range(3):
            report(Progress(step="download", done=done, total=2))
            await trio.lowlevel.checkpoint()
        return ModelView(digest=DIGEST, name=request.source, size=2, local_bytes=2)

    async def load(self, request: LoadRequest, report: Report) -> PlacementView:
        """Report once; fail with ``load_error`` when there is one."""
        self.calls.append(request)
        report(Progress(step="plan", text="planning"))
        if self.load_error is not None:
            raise self.load_error
        return PlacementView(
            model=DIGEST, name="words", epoch=7, n_ctx=64, n_seq=8, ready=True, ranks=()
        )

    async def plan(self, request: LoadRequest, report: Report) -> PlanView:
        """Plan nothing."""
        self.calls.append(request)
        report(Progress(step="plan", text="planning"))
        if self.load_error is not None:
            raise self.load_error
        return PlanView(
            model=DIGEST,
            name="words",
            epoch=7,
            n_ctx=64,
            n_seq=8,
            token_seconds=0.01,
            token_seconds_now=None,
            ranks=(),
            changes=(),
            explanation=("nothing is better",),
        )

    async def apply(self, request: LoadRequest, report: Report) -> PlacementView:
        """Load."""
        return await self.load(request, report)

    async def drain_node(self, request: DrainRequest, report: Report) -> DrainReply:
        """Note the node."""
        self.calls.append(request)
        report(Progress(step="drain", done=1, total=1, unit="parts"))
        return DrainReply(peer_id=PEER, name=request.node, draining=not request.undo)

    async def unload(self, model: str) -> None:
        """Succeed for ``words`` only."""
        if model != "words":
            raise NotFound(f"{model} is not placed.", code="model_not_found")

    async def remove(self, digest: Digest) -> None:
        """Note the digest."""
        self.calls.append(digest)

    async def doctor(self) -> DoctorReply:
        """Return one good finding."""
        return DoctorReply((Check(name="clock", result="ok", detail="fine"),))

    def shutdown(self) -> None:
        """Note the wish in ``stopped``."""
        self.stopped = True


class SimulatedApi:
    """A served API with its parts; ``http`` is a client of it, ``auth`` its admin header."""

    def __init__(self, services: SimulatedServices, server: ApiServer, drain: Drain) -> None:
        self.services = services
        self.engine = services.engine
        self.server = server
        self.drain = drain
        self.url = server.urls[0]
        self.http = httpx.AsyncClient(base_url=self.url, timeout=20)
        self.auth = {"authorization": f"Bearer {TOKEN}"}


@asynccontextmanager
async def simulated_api(
    *,
    guard_options: GuardOptions | None = None,
    generation: GenerationOptions | None = None,
    server: ServerOptions | None = None,
) -> AsyncIterator[SimulatedApi]:
    """Serve a simulated node on 127.0.0.1 at a free port; the random source gives 42."""
    services = SimulatedServices()
    drain = Drain()
    options = ApiOptions(
        guard=guard_options or GuardOptions(token=TOKEN),
        generation=generation or GenerationOptions(random_bits=lambda bits: 42, now=lambda: 17.0),
    )
    app = create_app(services, options, drain)
    async with (
        open_live_sessions(services.engine, Forgetful(), no_session) as live,
        open_api(app, server or ServerOptions(), drain) as running,
    ):
        services.live = live
        api = SimulatedApi(services, running, drain)
        async with api.http:
            yield api
