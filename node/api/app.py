"""Puts the API together: routes, errors, the guard around them."""

from __future__ import annotations

import logging
from functools import partial

import msgspec
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Scope

from pyagent_node.base.errors import InvalidRequest, NotFound, PyAgentError, Unavailable
from pyagent_node.node.api.admin import admin_router
from pyagent_node.node.api.context_routes import context_router
from pyagent_node.node.api.errors import as_pyagent_error, encode_error, error_headers, status_of
from pyagent_node.node.api.exchange import Drain
from pyagent_node.node.api.guard import Guard, GuardOptions
from pyagent_node.node.api.openai import GenerationOptions, openai_router
from pyagent_node.node.api.services import ApiServices
from pyagent_node.node.api.vector_stores import vector_store_router
from pyagent_node.node.telemetry import CONTENT_TYPE, Telemetry

access = logging.getLogger("pyagent_node.api.access")


class ApiOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the API behaves."""

    guard: GuardOptions
    generation: GenerationOptions = GenerationOptions()


def create_app(services: ApiServices, options: ApiOptions, drain: Drain | None = None) -> ASGIApp:
    """Return the whole API as an ASGI application.

    ``drain`` lets the caller refuse new requests and end running ones.
    """
    drain = drain or Drain()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(openai_router(services, drain, options.generation))
    app.include_router(context_router(lambda: services.contexts, drain))
    app.include_router(vector_store_router(lambda: services.contexts, drain))
    app.include_router(admin_router(services, drain))
    _add_health(app, services, drain)
    app.add_exception_handler(PyAgentError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return Guard(app, options.guard, drain, partial(_observe, services.telemetry))


def _add_health(app: FastAPI, services: ApiServices, drain: Drain) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return Response(b'{"alive":true}', media_type="application/json")

    @app.get("/readyz")
    async def readyz() -> Response:
        readiness = services.readiness()
        headers = {} if readiness.ready else error_headers(Unavailable(""))
        return Response(
            msgspec.json.encode(readiness),
            200 if readiness.ready else 503,
            headers,
            "application/json",
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(services.telemetry.render(), media_type=CONTENT_TYPE)


def _observe(telemetry: Telemetry, scope: Scope, status: int, seconds: float) -> None:
    route = getattr(scope.get("route"), "path", "other")
    method = scope["method"] if scope["method"] in _METHODS else "other"
    telemetry.http.requests.labels(route, method, str(status)).inc()
    telemetry.http.seconds.labels(route).observe(seconds)
    access.debug("%s %s %d %.1f ms", method, route, status, seconds * 1000)


_METHODS = frozenset({"GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH"})


def _error_response(error: PyAgentError) -> Response:
    return Response(encode_error(error), status_of(error), error_headers(error), "application/json")


async def _on_error(_request: Request, error: Exception) -> Response:
    return _error_response(as_pyagent_error(error))


_ROUTES = (
    "There are /v1/models, /v1/chat/completions, /v1/completions, /v1/contexts and"
    " /v1/vector_stores/{name}/search."
)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        return _error_response(
            NotFound(
                f"There is no {path!r} here.",
                code="route_not_found",
                remedy=_ROUTES if path.startswith("/v1/") else None,
            )
        )
    if error.status_code == 405:
        allowed = (error.headers or {}).get("allow", (error.headers or {}).get("Allow", ""))
        return _error_response(
            InvalidRequest(
                f"{request.method} is not possible on {path!r}; use {allowed}.",
                code="method_not_allowed",
                allowed=allowed,
            )
        )
    return _error_response(InvalidRequest(str(error.detail)[:500]))


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    return _error_response(InvalidRequest(f"The request does not fit: {str(error)[:500]}"))
