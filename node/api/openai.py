"""The OpenAI-compatible routes."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import msgspec
import trio
from fastapi import APIRouter, Request, Response

from pyagent_node.base.errors import InvalidRequest, NotFound, PyAgentError, Unavailable
from pyagent_node.base.types import SessionId
from pyagent_node.inference.generation import (
    Engine,
    Finished,
    GenerationEvent,
    GenerationRequest,
    LoadedModel,
)
from pyagent_node.node.api.choices import run_choices
from pyagent_node.node.api.citations import Citation
from pyagent_node.node.api.context_chat import ground
from pyagent_node.node.api.errors import as_pyagent_error, too_busy
from pyagent_node.node.api.exchange import Drain, Reply, Sender, Work
from pyagent_node.node.api.labels import make_labels, read_label
from pyagent_node.node.api.openai_replies import Writer, fingerprint
from pyagent_node.node.api.openai_requests import Plan, plan_chat, plan_completion
from pyagent_node.node.api.services import ApiServices
from pyagent_node.node.telemetry import GenerationMetrics

SESSION_HEADER: Final = "x-session-id"
"""Names the sessions of a reply, one for each choice, with commas between."""

RESUMED: Final = "resumed"
"""The ``model`` of metrics about what was gone on with, whoever began it."""

_SESSION_ID: Final = re.compile(r"[0-9a-f]{32}")
_TOKEN_INDEX: Final = re.compile(r"[0-9]{1,9}", re.ASCII)

RandomBits = Callable[[int], int]
"""Returns that many random bits as a non-negative integer."""


class ModelCard(msgspec.Struct, frozen=True):
    """A model in ``/v1/models``; ``context_window`` and ``digest`` are ours."""

    id: str
    created: int
    owned_by: str
    context_window: int
    digest: str
    epoch: int
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    """The reply of ``/v1/models``."""

    data: tuple[ModelCard, ...]
    object: str = "list"


class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """``concurrent`` bounds the generation requests in progress, ``seconds`` each of them."""

    concurrent: int = 64
    seconds: float = 3600.0
    random_bits: RandomBits = secrets.randbits
    now: Callable[[], float] = time.time


def find_model(engine: Engine, name: str) -> LoadedModel:
    """Return the loaded model with this name or digest.

    Raises :class:`NotFound` (``model_not_found``) naming those that are loaded.
    """
    models = engine.models()
    for model in models:
        if name in (model.name, model.digest):
            return model
    names = ", ".join(sorted(model.name for model in models))
    raise NotFound(
        f"The model {name[:200]!r} is not loaded.",
        code="model_not_found",
        remedy=f"Loaded: {names}." if names else "Load one: pyagent-node model load <model>.",
        parameter="model",
    )


def openai_router(services: ApiServices, drain: Drain, options: GenerationOptions) -> APIRouter:
    """Return the routes below ``/v1``."""
    router = APIRouter(prefix="/v1")
    generations = _Generations(services, drain, options)

    @router.get("/models")
    async def models() -> Response:
        cards = tuple(_card(model) for model in services.engine.models())
        return Reply(partial(_json, ModelList(cards)))

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        return Reply(partial(_json, _card(find_model(services.engine, name))))

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        return generations.reply(plan_chat(await request.body(), options.random_bits(64)))

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return generations.reply(plan_completion(await request.body(), options.random_bits(64)))

    @router.get("/sessions/{session}/stream")
    async def resume(session: str, request: Request) -> Response:
        return generations.resumed(
            _session_id(session), _token_index(request.query_params.getlist("from"))
        )

    return router


def _session_id(text: str) -> SessionId:
    if not _SESSION_ID.fullmatch(text):
        raise InvalidRequest(
            "A session's id has 32 hexadecimal digits in lower case.",
            code="bad_parameter",
            remedy=f"Take it from the header {SESSION_HEADER} of the reply, or from"
            " 'pyagent-node session list'.",
            parameter="session",
        )
    return SessionId(text)


def _token_index(given: list[str]) -> int:
    text = given[0] if len(given) == 1 else "" if given else "0"
    if not _TOKEN_INDEX.fullmatch(text):
        raise InvalidRequest(
            "from must be one whole number: how many tokens of the answer were received.",
            code="bad_parameter",
            remedy="Take it from the token_count of the last chunk.",
            parameter="from",
        )
    return int(text)


async def _json(body: object, sender: Sender) -> None:
    await sender.json(body)


def _card(model: LoadedModel) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        owned_by="pyagent-node",
        context_window=model.n_ctx,
        digest=model.digest,
        epoch=model.placement.epoch,
    )


class _Generations:
    """Answers planned requests, a bounded number of them at a time."""

    def __init__(self, services: ApiServices, drain: Drain, options: GenerationOptions) -> None:
        self._services = services
        self._drain = drain
        self._options = options
        self._running = 0

    def reply(self, plan: Plan) -> Reply:
        """Return the response that carries out ``plan``."""
        return self._reply(partial(self._answer, plan))

    def resumed(self, session: SessionId, after: int) -> Reply:
        """Return the response that goes on with a session."""
        return self._reply(partial(self._resume, session, after))

    def _reply(self, work: Work) -> Reply:
        return Reply(work, drain=self._drain, seconds=self._options.seconds)

    async def _answer(self, plan: Plan, sender: Sender) -> None:
        self._check_room()
        engine = self._services.engine
        model = self._find(engine, plan)
        ttl = self._services.session_ttl()
        if plan.resume_seconds > ttl:
            raise InvalidRequest(
                f"resume_seconds is {plan.resume_seconds:g}; it must be at most {ttl}.",
                code="bad_parameter",
                remedy="That is the mesh's setting session_ttl.",
                parameter="resume_seconds",
            )
        options, shape = self._options, plan.shape()
        identity, created = options.random_bits(128), int(options.now())
        labels = make_labels(shape, fingerprint(model), identity, created)
        sessions = [self._services.live.new_id() for _ in labels]
        requests: Sequence[GenerationRequest] = [
            msgspec.structs.replace(request, session=session, label=label)
            for request, session, label in zip(plan.requests, sessions, labels, strict=True)
        ]
        with self._counting(model.name, plan):
            citations: tuple[Citation, ...] | None = None
            if plan.context is not None:
                requests, citations = await ground(
                    requests,
                    plan.context,
                    engine=engine,
                    model=model,
                    contexts=self._services.contexts,
                )
            writer = Writer(shape, fingerprint(model), identity, created, citations)
            answer = _Answer(sender, writer, sessions)
            await self._generate(plan, requests, answer, model.name)

    def _check_room(self) -> None:
        if self._running >= self._options.concurrent:
            raise too_busy(self._options.concurrent)

    @contextmanager
    def _counting(self, model: str, plan: Plan | None) -> Iterator[None]:
        """Count a generation, and turn what ends it into an error for the client."""
        metrics = self._services.telemetry.generation
        self._running += 1
        outcome = "cancelled"
        try:
            with metrics.running.track_inprogress():
                yield
            outcome = "ok"
        except trio.Cancelled:
            raise
        except Exception as error:
            failure = _for_client(as_pyagent_error(error), plan)
            outcome = failure.code
            raise failure from None
        finally:
            self._running -= 1
            if outcome != "ok":
                metrics.ended.labels(model, outcome).inc()

    def _find(self, engine: Engine, plan: Plan) -> LoadedModel:
        try:
            return find_model(engine, plan.model)
        except NotFound:
            readiness = self._services.readiness()
            if not readiness.ready and not engine.models():
                raise Unavailable(
                    "The node is not ready: " + "; ".join(readiness.reasons),
                    code="not_ready",
                    remedy="See /readyz.",
                ) from None
            raise

    async def _generate(
        self, plan: Plan, requests: Sequence[GenerationRequest], answer: _Answer, model: str
    ) -> None:
        metrics = self._services.telemetry.generation
        start = partial(self._services.live.generate, resume_seconds=plan.resume_seconds)
        async with run_choices(start, requests) as events:
            async for index, event in events:
                if isinstance(event, Finished):
                    _count(metrics, model, event)
                if plan.stream:
                    await answer.show(index, event)
                else:
                    answer.writer.add(index, event)
            if plan.stream:
                await answer.finish(usage=plan.include_usage)
            else:
                await answer.sender.json(answer.writer.whole(), headers=answer.headers)

    async def _resume(self, session: SessionId, after: int, sender: Sender) -> None:
        self._check_room()
        services = self._services
        metrics = services.telemetry.generation
        with self._counting(RESUMED, None):
            async with services.live.attach(session, after) as reader:
                label = read_label(reader.live.label)
                writer = Writer(
                    label.shape, label.fingerprint, int(label.identity, 16), label.created
                )
                answer = _Answer(sender, writer, [session], only=label.choice, opening=not after)
                async for event in reader:
                    if not sender.started:  # now those before it are known
                        for seen in reader.skipped:
                            writer.skip(label.choice, seen)
                    if isinstance(event, Finished):
                        _count(metrics, RESUMED, event)
                    await answer.show(label.choice, event)
                await answer.finish(usage=label.shape.include_usage)


class _Answer:
    """One reply on its way to the client.

    ``only`` restricts a stream to one choice; without ``opening`` it begins in the middle.
    """

    def __init__(
        self,
        sender: Sender,
        writer: Writer,
        sessions: Sequence[SessionId],
        *,
        only: int | None = None,
        opening: bool = True,
    ) -> None:
        self.sender = sender
        self.writer = writer
        self.headers = {SESSION_HEADER: ",".join(sessions)}
        self._only = only
        self._opening = opening

    async def show(self, index: int, event: GenerationEvent) -> None:
        """Send an event."""
        chunk = self.writer.add(index, event)
        if not self.sender.started:
            # Only now: until the first token an error still gets its own status.
            await self.sender.start("text/event-stream; charset=utf-8", self.headers)
            if self._opening:
                for opening in self.writer.opening(self._only):
                    await self.sender.write(opening)
        if chunk is not None:
            await self.sender.write(chunk)

    async def finish(self, *, usage: bool) -> None:
        """End the stream."""
        if usage:
            await self.sender.write(self.writer.usage_chunk())
        await self.sender.write(b"data: [DONE]\n\n")
        await self.sender.end()


def _count(metrics: GenerationMetrics, model: str, event: Finished) -> None:
    usage = event.usage
    metrics.ended.labels(model, event.reason).inc()
    metrics.prompt_tokens.labels(model).inc(usage.prompt_tokens)
    metrics.completion_tokens.labels(model).inc(usage.completion_tokens)
    metrics.cached_tokens.labels(model).inc(usage.cached_tokens)
    metrics.recomputed_tokens.labels(model).inc(usage.recomputed_tokens)
    metrics.ttft.labels(model).observe(usage.ttft_seconds)
    if usage.tokens_per_second > 0:
        metrics.token.labels(model).observe(1 / usage.tokens_per_second)
    guesses = usage.speculation
    if guesses is not None:
        accepted, drafter = guesses.accepted, guesses.drafter
        metrics.guesses.labels(model, drafter, "accepted").inc(accepted)
        metrics.guesses.labels(model, drafter, "rejected").inc(guesses.drafted - accepted)
        metrics.passes.labels(model, drafter).inc(guesses.passes)
        metrics.cancelled.labels(model, drafter).inc(guesses.cancelled)


def _for_client(error: PyAgentError, plan: Plan | None) -> PyAgentError:
    """Name the parameter where OpenAI's clients expect it."""
    if plan is None:
        return error
    if error.code == "prompt_too_long":
        error.facts.setdefault("parameter", "messages" if plan.kind == "chat" else "prompt")
    elif error.code == "model_not_found":
        error.facts.setdefault("parameter", "model")
    return error
