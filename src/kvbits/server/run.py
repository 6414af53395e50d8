"""The server process: sockets, signals, the line that it starts with."""

from __future__ import annotations

import gc
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvbits.auto.loss import Loss
from kvbits.engine.engine import Engine
from kvbits.errors import ConfigError
from kvbits.server.address import listen
from kvbits.server.app import create_app
from kvbits.server.connection import connection_class
from kvbits.server.options import ServerOptions
from kvbits.server.service import Service
from kvbits.server.worker import STOPPING

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: running requests end or are ended, new ones get 503, as ``/health`` does.

    It listens until the last request has ended. The second signal stops it at once.
    """

    def __init__(self, app: FastAPI, host: str, port: int, options: ServerOptions) -> None:
        service = app.state.service
        assert isinstance(service, Service)
        self._service = service
        self._drain = options.drain_timeout
        self._deadline = 0.0
        super().__init__(http_config(app, host, port, options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        worker = self._service.worker
        # Not uvicorn's own, which kills the process with the same signal at the end: a drained server ends with 0.
        self.force_exit = self.should_exit = worker.draining
        if not worker.draining:
            self._deadline = time.monotonic() + self._drain
            worker.draining = True
            log.info("shutting down", extra={"facts": {"open_requests": worker.open_requests}})

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        worker, left = self._service.worker, self._deadline - time.monotonic()
        if not worker.draining or (worker.open_requests and left > 0):
            return False
        worker.abort_all(STOPPING)
        # What is still being sent has the time that is left; ended requests still need a moment to say so.
        self.config.timeout_graceful_shutdown = int(max(left, 0)) + 5
        return True


def http_config(app: FastAPI, host: str, port: int, options: ServerOptions) -> uvicorn.Config:
    """How uvicorn listens and what it allows a connection."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=connection_class(options),
        # Whoever asks for a WebSocket gets a plain answer, with the limits of every other request.
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(options.drain_timeout) + 5,
    )


def start_line(engine: Engine, options: ServerOptions, host: str, port: int) -> str:
    """Model, policy, bits, pool, how many sessions it holds, whose kernels decode and whose layers run around them."""
    pool = engine.pool
    layers = "transformers'" if engine.loaded.fused is None else "fused"
    if engine.recurrent:
        layers += f"; {engine.recurrent}"
    contexts = sorted({min(n, engine.max_model_len) for n in (4096, 8192, engine.max_model_len)})
    sessions = ", ".join(f"{pool.sessions_capacity(n):,} of {n:,} tokens" for n in contexts)
    size = pool.layout.bytes_of(pool.num_frames)
    return (
        f"kvbits serves {options.served_model_name} at http://{host}:{port}: KV cache {pool.policy.name}, "
        f"{pool.bits_per_element():.2f} bits per element, {size / 2**20:,.0f} MiB in {pool.num_frames:,} frames; "
        f"holds {sessions} (full context {engine.max_model_len:,}); kernels: {engine.kernels}; layers: {layers}"
    )


def serve(
    engine: Engine,
    options: ServerOptions,
    sockets: list[socket.socket],
    host: str,
    port: int,
    loss: Loss | None = None,
) -> None:
    """Serve on ``sockets`` (:func:`kvbits.server.address.take_address`) until a signal ends it.

    ``loss`` is as for :func:`~kvbits.server.app.create_app`. Raises ``ConfigError`` when somebody else listens there by
    now.
    """
    server = Server(create_app(engine, options, loss), host, port, options)
    listen(sockets, host, port)
    log.info(start_line(engine, options, host, port))
    # What is there now stays. Without this the collector looks at all of it, for a second, when a request makes many
    # objects, and nobody is answered meanwhile.
    gc.collect()
    gc.freeze()
    try:
        server.run(sockets)
    except SystemExit as error:
        raise ConfigError("the server cannot start; the log says why") from error
    finally:
        gc.unfreeze()
