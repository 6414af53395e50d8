"""What operators and dashboards read: models, health, version, metrics, state, the page."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import HTMLResponse, JSONResponse, Response

import kvbits
from kvbits.server.errors import ApiError
from kvbits.server.model_object import MODEL, MODELS, answers, model_object
from kvbits.server.service import client_of, service_of
from kvbits.server.state import state

router = APIRouter()


@router.get("/v1/models", responses=answers(MODELS))
async def models(request: Request) -> Response:
    """The one model, with its cache policy and what that was measured to lose."""
    return JSONResponse({"object": "list", "data": [model_object(service_of(request))]})


@router.get("/v1/models/{name:path}", responses=answers(MODEL))
async def model(request: Request, name: str) -> Response:
    """The model by its name."""
    service = service_of(request)
    service.check_model(name)
    return JSONResponse(model_object(service))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken."""
    service_of(request).worker.check_ready()
    return JSONResponse({"status": "ok"})


@router.get("/version")
async def version() -> Response:
    """The version of kvbits."""
    return JSONResponse({"version": kvbits.__version__})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    registry = request.app.state.registry
    assert isinstance(registry, CollectorRegistry)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/kvbits/state")
async def live_state(request: Request) -> Response:
    """The pool frame by frame, sessions, counters and recent latencies: what the page and ``kvbits top`` show."""
    service = service_of(request)
    if service.worker.broken:
        raise ApiError(503, "the engine has stopped")
    return JSONResponse(await state(service, client_of(request)))


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The live page."""
    return HTMLResponse(files("kvbits.server").joinpath("page.html").read_text("utf-8"))
