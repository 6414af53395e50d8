"""What a connection may do to the server: clients that are slow, that do not read, that are gone without a word."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvbits.server.errors import ApiError
from kvbits.server.options import ServerOptions

log = logging.getLogger(__name__)

_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""A peer that is gone without closing (power, cable) is noticed after two minutes, where the system can be told so."""


_MOST_HEADERS = 64 * 1024
"""Bytes of a request line with its headers; the parser itself has no limit."""


class Connection(HttpToolsProtocol):
    """One HTTP connection with limits of time, which uvicorn has for idle connections only.

    A request line with its headers must be there ``header_timeout`` seconds after the connection, or after the answer
    before it; and a client must not leave written bytes unread for ``send_timeout`` seconds.
    """

    header_timeout = 15.0
    send_timeout = 60.0
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None
    _in_headers = False
    _header_bytes = 0

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

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADERS:
                self._in_headers = False
                self._refuse(431, f"the request's headers are larger than {_MOST_HEADERS} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._in_headers = False
        _stop(self._reading)
        self._reading = None
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:
            # Otherwise the next request has come already.
            self._expect_request()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.send_timeout, self._unread)

    def resume_writing(self) -> None:
        _stop(self._writing)
        self._writing = None
        super().resume_writing()

    def _expect_request(self) -> None:
        if self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(self.header_timeout, self._late)

    def _late(self) -> None:
        self._reading = None
        if not self.transport.is_closing():
            log.info("a request did not come in time", extra={"facts": {"seconds": self.header_timeout}})
            self._refuse(408, f"the request's headers did not come within {self.header_timeout:g} seconds")

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, and close. An answer that is under way is not written into."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()
            return
        body = json.dumps(ApiError(status, message).body()).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
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
