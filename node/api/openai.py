"""The OpenAI-compatible routes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from functools import partial

import msgspec
import trio
from fastapi import APIRouter, Request, Response

from pyagent_node.base.errors import NotFound, PyAgentError, Unavailable
from pyagent_node.inference.generation import Engine, Finished, LoadedModel
from pyagent_node.node.api.choices import run_choices
from pyagent_node.node.api.errors import as_pyagent_error, too_busy
from pyagent_node.node.api.exchange import Drain, Reply, Sender
from pyagent_node.node.api.openai_replies import Writer
from pyagent_node.node.api.openai_requests import Plan, plan_chat, plan_completion
from pyagent_node.node.api.services import ApiServices
from pyagent_node.node.telemetry import GenerationMetrics

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

    return router


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
        return Reply(partial(self._answer, plan), drain=self._drain, seconds=self._options.seconds)

    async def _answer(self, plan: Plan, sender: Sender) -> None:
        if self._running >= self._options.concurrent:
            raise too_busy(self._options.concurrent)
        engine = self._services.engine
        model = self._find(engine, plan)
        options = self._options
        writer = Writer(plan, model, options.random_bits(128), int(options.now()))
        self._running += 1
        metrics = self._services.telemetry.generation
        outcome = "cancelled"
        try:
            with metrics.running.track_inprogress():
                await self._generate(engine, plan, writer, model.name, sender)
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
                metrics.ended.labels(model.name, outcome).inc()

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
        self, engine: Engine, plan: Plan, writer: Writer, model: str, sender: Sender
    ) -> None:
        metrics = self._services.telemetry.generation
        async with run_choices(engine, plan.requests) as events:
            async for index, event in events:
                chunk = writer.add(index, event)
                if isinstance(event, Finished):
                    _count(metrics, model, event)
                if not plan.stream:
                    continue
                if not sender.started:
                    # Only now: until the first token an error still gets its own status.
                    await sender.start("text/event-stream; charset=utf-8")
                    for opening in writer.opening():
                        await sender.write(opening)
                if chunk is not None:
                    await sender.write(chunk)
        if not plan.stream:
            await sender.json(writer.whole())
            return
        if plan.include_usage:
            await sender.write(writer.usage_chunk())
        await sender.write(b"data: [DONE]\n\n")
        await sender.end()


def _count(metrics: GenerationMetrics, model: str, event: Finished) -> None:
    usage = event.usage
    metrics.ended.labels(model, event.reason).inc()
    metrics.prompt_tokens.labels(model).inc(usage.prompt_tokens)
    metrics.completion_tokens.labels(model).inc(usage.completion_tokens)
    metrics.ttft.labels(model).observe(usage.ttft_seconds)
    if usage.tokens_per_second > 0:
        metrics.token.labels(model).observe(1 / usage.tokens_per_second)


def _for_client(error: PyAgentError, plan: Plan) -> PyAgentError:
    """Name the parameter where OpenAI's clients expect it."""
    if error.code == "prompt_too_long":
        error.facts.setdefault("parameter", "messages" if plan.kind == "chat" else "prompt")
    elif error.code == "model_not_found":
        error.facts.setdefault("parameter", "model")
    return error
