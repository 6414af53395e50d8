"""The application: routes, errors, and what starts and stops with it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import kvbits
from kvbits.auto.loss import Loss
from kvbits.engine.engine import Engine
from kvbits.errors import KVBitsError
from kvbits.server.errors import ApiError
from kvbits.server.gate import Gate
from kvbits.server.hosts import Hosts
from kvbits.server.http import Gone
from kvbits.server.metrics import EngineCollector
from kvbits.server.observe import Observer
from kvbits.server.openapi import describe
from kvbits.server.options import ServerOptions
from kvbits.server.prepare import Preparer
from kvbits.server.routes import chat, completions, operations, tokens
from kvbits.server.service import Service
from kvbits.server.worker import EngineWorker

log = logging.getLogger(__name__)


def create_app(engine: Engine, options: ServerOptions, loss: Loss | None = None) -> FastAPI:
    """An ASGI application that serves ``engine``, which belongs to it from now on.

    ``loss``: what its KV cache dtype was measured to lose on this model.
    """
    registry = CollectorRegistry()
    observer = Observer(registry, options.served_model_name)
    service = Service(EngineWorker(engine, observer), Preparer(engine.loaded, engine.limits), observer, options)
    service.loss = loss
    registry.register(EngineCollector(service.worker, options.served_model_name, loss))

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()
        service.preparer.close()

    app = FastAPI(title="kvbits", version=kvbits.__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    app.state.registry = registry
    for module in (chat, completions, tokens, operations):
        app.include_router(module.router)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, _known)
    app.add_exception_handler(KVBitsError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(Exception, _unknown)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Hosts, allowed=options.allowed_hosts)
    app.add_middleware(Gate, keys=options.keyring)
    return app


def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _refused(request: Request, error: Exception) -> Response:
    return ApiError(400, str(error), code="invalid_value").response()


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message).response()


def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; 499 is what logs call a client that closed its connection."""
    return Response(status_code=499)


def _unknown(request: Request, error: Exception) -> Response:
    log.error("an unexpected error", exc_info=error)
    return ApiError(500, "an internal error; the log has more", code="internal_error").response()
