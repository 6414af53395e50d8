"""What a connection may do to the server: clients that are slow, that do not read, that are gone without a word."""

from __future__ import annotations

import asyncio
import json
import logging
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvbits.server.errors import ApiError
from kvbits.server.options import ServerOptions

log = logging.getLogger(__name__)

_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A peer that is gone without closing (power, cable) is noticed after two minutes, where the system can be told so."""


class Connection(H11Protocol):
    """One HTTP connection with limits of time, which uvicorn has for idle connections only.

    A request line with its headers must be there ``header_timeout`` seconds after the connection, or after the answer
    before it; and a client must not leave written bytes unread for ``send_timeout`` seconds.
    """

    header_timeout = 15.0
    send_timeout = 60.0
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        _probe(transport.get_extra_info("socket"))
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._reading)
        self._reading = None
        _stop(self._writing)
        self._writing = None
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.IDLE:
            self._expect_request()
        else:
            _stop(self._reading)
            self._reading = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.send_timeout, self._unread)

    def resume_writing(self) -> None:
        _stop(self._writing)
        self._writing = None
        super().resume_writing()

    def _expect_request(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(self.header_timeout, self._late)

    def _late(self) -> None:
        self._reading = None
        if self.transport.is_closing():
            return
        log.info("a request did not come in time", extra={"facts": {"seconds": self.header_timeout}})
        error = ApiError(408, f"the request's headers did not come within {self.header_timeout:g} seconds")
        body = json.dumps(error.body()).encode()
        head = "HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def _unread(self) -> None:
        self._writing = None
        log.info("a client does not read its answer", extra={"facts": {"seconds": self.send_timeout}})
        # close() would wait for the bytes to be read.
        self.transport.abort()


def connection_class(options: ServerOptions) -> type[Connection]:
    """``Connection`` with the times of ``options``."""

    class Timed(Connection):
        header_timeout = options.header_timeout
        send_timeout = options.send_timeout

    return Timed


def _probe(link: socket.socket | None) -> None:
    if link is None or link.family not in (socket.AF_INET, socket.AF_INET6):
        return
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    """Cancel ``timer``."""
    if timer is not None:
        timer.cancel()
