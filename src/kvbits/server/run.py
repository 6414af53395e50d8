"""The server process: sockets, signals, the line that it starts with."""

from __future__ import annotations

import asyncio
import gc
import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kvbits.engine.engine import Engine
from kvbits.errors import ConfigError
from kvbits.server.app import create_app
from kvbits.server.connection import connection_class
from kvbits.server.options import ServerOptions
from kvbits.server.service import Service

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Drains on the first SIGTERM or SIGINT: no new requests, running ones end or are ended.

    The second signal stops it at once.
    """

    def __init__(self, app: FastAPI, host: str, port: int, options: ServerOptions) -> None:
        service = app.state.service
        assert isinstance(service, Service)
        self._service = service
        self._drain = options.drain_timeout
        super().__init__(http_config(app, host, port, options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.worker.draining:
            self._service.worker.draining = True
            log.info("shutting down", extra={"facts": {"open_requests": self._service.worker.open_requests}})
        # Not uvicorn's own, which kills the process with the same signal at the end: a drained server ends with 0.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: object = None) -> None:
        self._service.worker.draining = True
        timer = asyncio.get_running_loop().call_later(
            self._drain, self._service.worker.abort_all, "the server is shutting down"
        )
        try:
            await super().shutdown(sockets)  # type: ignore[arg-type]
        finally:
            timer.cancel()


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
        # Ended requests still need a moment to say so.
        timeout_graceful_shutdown=int(options.drain_timeout) + 5,
    )


def start_line(engine: Engine, options: ServerOptions, host: str, port: int) -> str:
    """Model, policy, bits, pool, how many sessions it holds, and whose kernels decode."""
    pool = engine.pool
    contexts = sorted({min(n, engine.max_model_len) for n in (4096, 8192, engine.max_model_len)})
    sessions = ", ".join(f"{pool.sessions_capacity(n):,} of {n:,} tokens" for n in contexts)
    size = pool.layout.bytes_of(pool.num_frames)
    return (
        f"kvbits serves {options.served_model_name} at http://{host}:{port}: KV cache {pool.policy.name}, "
        f"{pool.bits_per_element():.2f} bits per element, {size / 2**20:,.0f} MiB in {pool.num_frames:,} frames; "
        f"holds {sessions} (full context {engine.max_model_len:,}); kernels: {engine.kernels}"
    )


def serve(engine: Engine, options: ServerOptions, host: str, port: int) -> None:
    """Serve until a signal ends it. Raises ``ConfigError`` when the port cannot be had."""
    server = Server(create_app(engine, options), host, port, options)
    log.info(start_line(engine, options, host, port))
    # What is there now stays. Without this the collector looks at all of it, for a second, when a request makes many
    # objects, and nobody is answered meanwhile.
    gc.collect()
    gc.freeze()
    try:
        server.run()
    except SystemExit as error:
        raise ConfigError(f"cannot listen on {host}:{port}; the log says why") from error
    finally:
        gc.unfreeze()
