"""Bodies in flight: the bytes that are held are bounded, everybody has a share of them, and small ones always pass."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest
from helpers.serving import MODEL, engine_of, running
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.models import LoadedModel
from kvbits.server.bodies import Bodies
from kvbits.server.body import SMALL
from kvbits.server.errors import ApiError

MOST = 10 * SMALL
PARTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4 * SMALL)), max_size=30)


@settings(deadline=None)
@given(parts=PARTS)
def test_what_is_held_is_bounded_shared_and_given_back(parts: list[tuple[str, int]]) -> None:
    """The bodies that were taken, as a list, say what the bound allows; what was refused counts no more."""
    bodies, taken = Bodies(MOST), []
    with ExitStack() as stack:
        for client, size in parts:
            with ExitStack() as one:
                take = one.enter_context(bodies.holding(client))
                held = {c: sum(s for who, s in taken if who == c) for c in "abc"}
                held[client] += size
                share = MOST // sum(count > 0 for count in held.values())
                fits = size <= SMALL or sum(held.values()) <= MOST or held[client] <= share
                if fits:
                    take(size)
                    taken.append((client, size))
                    stack.push(one.pop_all())
                else:
                    with pytest.raises(ApiError) as refused:
                        take(size)
                    assert (refused.value.status, refused.value.code) == (503, "too_many_bodies")
            assert bodies.total == sum(s for _, s in taken)
    assert bodies.total == 0


def test_a_body_counts_piece_by_piece() -> None:
    bodies = Bodies(MOST)
    with bodies.holding("a") as take:
        for _ in range(10):
            take(SMALL)
        with pytest.raises(ApiError):
            take(1)
    assert bodies.total == 0


def test_slow_large_bodies_leave_room_for_small_ones(byte_loaded: LoadedModel) -> None:
    size = 100_000
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join([*lines, f"Content-Length: {size}", "", ""])
    with running(engine_of(byte_loaded), max_body=size) as server, ExitStack() as stack:
        address = urlsplit(server.url)
        bodies = server.service.bodies

        def hold() -> socket.socket:
            """All of a body but its last byte."""
            found = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=30))
            found.sendall(head.encode() + b"x" * (size - 1))
            return found

        def wait(total: int) -> None:
            end = time.monotonic() + 30
            while bodies.total != total:
                assert time.monotonic() < end, bodies.total
                time.sleep(0.01)

        # Eight of the largest have room.
        slow = [hold() for _ in range(8)]
        wait(8 * (size - 1))
        answer = hold().recv(4096).decode()
        assert answer.startswith("HTTP/1.1 503")
        assert "retry-after: 1" in answer.lower()
        assert "too_many_bodies" in answer
        large = {"model": MODEL, "prompt": "x" * 40_000}
        assert httpx.post(server.url + "/v1/completions", json=large).json()["error"]["code"] == "too_many_bodies"
        small = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
        assert httpx.post(server.url + "/v1/completions", json=small, timeout=60).status_code == 200
        for connection in slow:
            connection.close()
        wait(0)
        # Too long for the context, which is looked at only now.
        assert httpx.post(server.url + "/v1/completions", json=large, timeout=60).status_code == 400
        server.idle()
