"""Clients that mean harm or are broken: what they send, how they send it, and what a server may answer."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from helpers.large import JUST, LARGE, large_body

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PATHS = (CHAT, TEXT, "/tokenize", "/detokenize")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ALLOWED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 429, 431, 503}
TO = "Host: localhost\r\nContent-Type: application/json\r\n"
LONGEST = 60.0
"""Seconds after which a request that has no answer counts as a hang."""

_FIELDS = (
    "model", "messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "max_tokens",
    "max_completion_tokens", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "logit_bias", "tools",
    "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "repetition_penalty", "user",
    "cache_salt", "priority", "best_of", "suffix", "tokens", "parallel_tool_calls", "chat_template_kwargs", "strange",
)  # fmt: skip


@dataclass
class Tally:
    """What came of a run: statuses by kind of attack, and everything that must not be."""

    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Hostile:
    """Random attacks on the server at ``host``, ``port``; ``max_body`` is its limit. One object a thread."""

    def __init__(self, host: str, port: int, max_body: int, seed: int) -> None:
        self._address = (host, port)
        self._max_body = max_body
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], bytes | None], ...] = (
            self.wrong_fields, self.wrong_fields, self.wrong_fields, self.broken_json, self.deep, self.bad_text,
            self.huge, self.schemas, self.extremes, self.no_http, self.odd_heads, self.odd_targets, self.vanish,
            self.half_open, self.unread, self.dribble, self.large, self.odd_hosts,
        )  # fmt: skip

    def attack(self, tally: Tally) -> None:
        """Make one attack and judge the answer."""
        kind = self._random.choice(self._kinds)
        begin = time.monotonic()
        try:
            answer = kind()
        except OSError as error:
            # A server may close on such a client; it may not let it wait.
            answer = None if not isinstance(error, TimeoutError) else b"no answer"
        seconds = time.monotonic() - begin
        status = judge(answer)
        tally.seen[f"{kind.__name__}: {status if answer else 'closed'}"] += 1
        if seconds > LONGEST or not isinstance(status, int):
            tally.faults.append(f"{kind.__name__} after {seconds:.1f} s: {status} {(answer or b'')[:600]!r}")

    # What is sent

    def wrong_fields(self) -> bytes | None:
        body = self._valid(path := self._random.choice(PATHS))
        for _ in range(self._random.randint(1, 4)):
            body[self._random.choice(_FIELDS)] = self._value(3)
        if self._random.random() < 0.3:
            body.pop(self._random.choice(list(body)))
        return self._post(path, json.dumps(_bounded(body)).encode("utf-8", "surrogatepass"))

    def broken_json(self) -> bytes | None:
        text = bytearray(json.dumps(self._valid(path := self._random.choice(PATHS))).encode())
        for _ in range(self._random.randint(1, 6)):
            place = self._random.randrange(len(text))
            if self._random.random() < 0.5:
                text[place] = self._random.randrange(256)
            else:
                del text[place : place + self._random.randint(1, 5)]
        return self._post(path, bytes(text))

    def deep(self) -> bytes | None:
        depth = self._random.choice((50, 200, 1000, 5000, 20_000))
        start, end = self._random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"type":', b"}]")))
        depth = min(depth, self._max_body // (len(start) + len(end)) - 40)
        nested = start * depth + b"1" + end * depth
        name = self._random.choice(_FIELDS).encode()
        body = self._random.choice((nested, b'{"%s":%s}' % (name, nested), nested[: len(nested) // 2]))
        return self._post(self._random.choice(PATHS), body)

    def bad_text(self) -> bytes | None:
        odd = self._random.choice((
            b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x00", b"\\ud800", b"\\u0000",
            b"<|im_end|>", b"</s>",
            "\u202e\ufeff\U0010ffff".encode(),
        ))  # fmt: skip
        odd *= self._random.choice((1, 3, 500))
        body = json.dumps(self._valid(path := self._random.choice(PATHS[:3]))).encode()
        return self._post(path, body.replace(b"hello", odd))

    def huge(self) -> bytes | None:
        path, size = self._random.choice(PATHS), self._max_body
        if self._random.random() < 0.3:
            return self._send(_head(path, 10 ** self._random.randint(9, 30)) + b"{")
        filler = self._random.choice((b" ", b"x", b"[", b"9"))
        if path == "/tokenize":
            # A text that a long answer is right for, which takes its seconds.
            size = min(size, 200_000)
        body = b'{"prompt": "' + filler * (size + self._random.randint(-100, 5000)) + b'"}'
        if self._random.random() < 0.5:
            return self._post(path, body)
        chunks = b"".join(
            b"%x\r\n%s\r\n" % (len(c), c) for c in (body[i : i + 50_000] for i in range(0, len(body), 50_000))
        )
        return self._send(
            f"POST {path} HTTP/1.1\r\n{TO}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"
        )

    def large(self) -> bytes | None:
        """Wrong, and as long as it may be, or as a parser may take it."""
        path = self._random.choice(PATHS)
        if self._random.random() < 0.5:
            return self._post(path, self._random.choice(list(JUST.values())))
        return self._post(path, large_body(self._random.choice(LARGE), self._max_body))

    def odd_hosts(self) -> bytes | None:
        pick = self._random.choice
        host = pick(
            ("evil.example", "127.0.0.1.evil.example", "[::1", "a" * 5000, "\xff", "", "localhost:x", "[]:1", "..", ":")
        )
        kind = pick(("application/json", "text/plain", "application/json;charset=\xff", "/", "", "a" * 5000))
        body = json.dumps(self._valid(CHAT)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return self._send(head.encode("latin-1") + body)

    def schemas(self) -> bytes | None:
        pick = self._random.choice
        nested: dict[str, Any] = {"type": "string"}
        for _ in range(pick((3, 30, 200))):
            nested = pick(({"anyOf": [nested, nested]}, {"type": "array", "items": nested}, {"not": nested}))
            if len(str(nested)) > 20_000:
                break
        schema = pick((
            {"$ref": "#"}, {"$ref": "http://127.0.0.1:1/x"},
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            {"enum": list(range(pick((10, 3000))))}, {"type": "array", "minItems": 10**9}, {"pattern": "(a+)+$"},
            {"type": "string", "pattern": "((((a{1,99}){1,99}){1,99}){1,99})"}, {"type": "string", "maxLength": 10**12},
            {"type": "object", "properties": {f"p{i}": {} for i in range(pick((5, 800, 9000)))}}, {"type": []}, nested,
            self._value(4),
        ))  # fmt: skip
        body = self._valid(CHAT)
        if self._random.random() < 0.7:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        else:
            body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            body["tool_choice"] = pick(("required", "auto"))
        return self._post(CHAT, json.dumps(body).encode("utf-8", "surrogatepass"))

    def extremes(self) -> bytes | None:
        pick = self._random.choice
        body = self._valid(path := pick((CHAT, TEXT)))
        body |= pick((
            {"n": 10**9}, {"n": 128, "max_tokens": 1}, {"max_tokens": 2**63}, {"seed": 2**64}, {"temperature": 1e308},
            {"logit_bias": {str(i): -100 for i in range(259)}}, {"logit_bias": {str(i): 1 for i in range(49_152)}},
            {"stop": ["x" * 10_000]}, {"stop": [""]}, {"top_k": -(2**40)}, {"priority": 2**70}, {"user": "u" * 100_000},
            {"cache_salt": "\u0000" * 1000}, {"stream": True, "n": 20}, {"repetition_penalty": 1e-300},
            {"model": "../../etc/passwd"}, {"min_p": 1.0, "top_p": 1e-12}, {"stop_token_ids": list(range(259))},
        ))  # fmt: skip
        if path == TEXT and self._random.random() < 0.3:
            body["prompt"] = pick(([[70]] * 3000, ["a"] * 5000, [70] * 40_000, [[]], [2**70], list(range(259))))
        return self._post(path, json.dumps(body).encode())

    def no_http(self) -> bytes | None:
        pick = self._random.choice
        return self._send(pick((
            self._random.randbytes(self._random.randint(1, 3000)), b"\x16\x03\x01\x02\x00\x01",
            b"PRI * HTTP/2.0\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 500, b"GET\r\n\r\n",
            b"G" * 100_000, b"POST  HTTP/1.1\r\n\r\n",
        )))  # fmt: skip

    def odd_heads(self) -> bytes | None:
        pick = self._random.choice
        body = json.dumps(self._valid(CHAT)).encode()
        length = f"Content-Length: {len(body)}"
        heads = pick((
            ["Content-Length: -5"], ["Content-Length: 5", "Content-Length: 6"], ["Content-Length: 1e3"],
            [length, "Transfer-Encoding: chunked"], ["Transfer-Encoding: gzip"],
            [f"X-{i}: {'y' * 500}" for i in range(400)], ["X: " + "z" * 200_000], [length,
            f"X-Request-Id: {'a' * 5000}"],
            ["Expect: 100-continue", length], ["Authorization: \xff\xfe", length], ["Content-Encoding: gzip", length],
            ["Upgrade: websocket", "Connection: Upgrade", length], [" folded: x", ": empty"],
            ["X-Request-Id: a\nSet-Cookie: b", length],
        ))  # fmt: skip
        text = "\r\n".join([f"POST {CHAT} HTTP/1.1", TO.strip(), *heads, "", ""])
        return self._send(text.encode("latin-1") + body)

    def odd_targets(self) -> bytes | None:
        target = self._random.choice((
            "/%00", "/%ff%fe", "/../../etc/passwd", "//v1/models", "/v1/models/%2e%2e", "/v1/models/" + "a" * 5000,
            "*", "http://elsewhere/", "/" + "%41" * 3000, "/v1/chat/completions?" + "a=b&" * 2000, "/kvbits/state/x",
            "/metrics?format=%n%n", "/health#x", "/v1/models/\u00e9",
        ))  # fmt: skip
        method = self._random.choice(("GET", "POST", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW"))
        return self._send(
            f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
        )

    # How it is sent

    def vanish(self) -> bytes | None:
        """Close, or reset, at any moment."""
        body = self._long(stream=self._random.random() < 0.5)
        whole = _head(CHAT, len(body)) + body
        sent = whole if self._random.random() < 0.6 else whole[: self._random.randrange(len(whole))]
        with self._connect() as link:
            link.sendall(sent)
            time.sleep(self._random.choice((0, 0.01, 0.1)))
            if self._random.random() < 0.5:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return None

    def half_open(self) -> bytes | None:
        """Say that nothing more comes, before or after all has come."""
        body = json.dumps(self._valid(CHAT)).encode()
        whole = _head(CHAT, len(body)) + body
        with self._connect() as link:
            link.sendall(whole if self._random.random() < 0.5 else whole[:-3])
            link.shutdown(socket.SHUT_WR)
            return _receive(link)

    def unread(self) -> bytes | None:
        """Ask for a long stream and read nothing for a while."""
        body = self._long(stream=True)
        with self._connect() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            link.sendall(_head(CHAT, len(body)) + body)
            time.sleep(0.2)
        return None

    def dribble(self) -> bytes | None:
        """A few bytes at a time, then silence for a moment; sometimes the rest."""
        body = json.dumps(self._valid(CHAT)).encode()
        whole = _head(CHAT, len(body)) + body
        with self._connect() as link:
            for start in range(0, 60, 6):
                link.sendall(whole[start : start + 6])
                time.sleep(0.01)
            if self._random.random() < 0.5:
                return None
            link.sendall(whole[60:])
            return _receive(link)

    def _post(self, path: str, body: bytes) -> bytes | None:
        return self._send(_head(path, len(body)) + body)

    def _send(self, data: bytes) -> bytes | None:
        with self._connect() as link:
            # The server may answer, and close, before all is sent.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(data)
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_WR) if self._random.random() < 0.05 else None
            return _receive(link)

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=LONGEST)

    # What it is made of

    def _valid(self, path: str) -> dict[str, Any]:
        if path == CHAT:
            return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        return {
            TEXT: {"model": "tiny", "prompt": "hello", "max_tokens": 4},
            "/tokenize": {"prompt": "hello"},
            "/detokenize": {"tokens": [70, 71]},
        }[path]

    def _long(self, stream: bool) -> bytes:
        return json.dumps(self._valid(CHAT) | {"max_tokens": 300, "ignore_eos": True, "stream": stream}).encode()

    def _value(self, depth: int) -> Any:
        pick = self._random.choice
        if depth and self._random.random() < 0.4:
            if self._random.random() < 0.5:
                return [self._value(depth - 1) for _ in range(self._random.randint(0, 3))]
            keys = ("role", "content", "type", "text", "name", "function", "schema", "properties", "0", "70", "x", "id")
            return {pick(keys): self._value(depth - 1) for _ in range(self._random.randint(0, 3))}
        return pick((
            None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, float("nan"),
            float("inf"), "", [],
            "hello", "x" * 300, "\ud800", "\u0000", "user", "assistant", "tool", "system", "function",
            "auto", "required",
            "none", "json_object", "json_schema", "text", {},
        ))  # fmt: skip


def judge(answer: bytes | None) -> int | str:
    """The status of an answer (0: closed without one), or what is wrong with it."""
    if not answer:
        return 0
    if b"Traceback" in answer or b'File "' in answer:
        return "a traceback"
    answer = answer.removeprefix(CONTINUE)
    if not answer:
        # It may send the rest, but has said that it sends nothing more: gone.
        return 0
    head, _, rest = answer.partition(b"\r\n\r\n")
    parts = head.split(b"\r\n")[0].split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.1") or not parts[1].isdigit():
        return "no HTTP"
    status = int(parts[1])
    if status not in ALLOWED:
        return f"status {status}"
    if b"\r\nset-cookie" in head.lower():
        return "an injected header"
    if status >= 400 and b"application/json" in head.lower() and b"transfer-encoding" not in head.lower() and rest:
        try:
            error = json.loads(rest)["error"]
        except (ValueError, KeyError, TypeError):
            return "an error of another shape"
        if set(error) != {"message", "type", "param", "code"} or not error["message"]:
            return "an error of another shape"
    return status


def storm(url: str, count: int, max_body: int, seed: int = 0, threads: int = 8) -> Tally:
    """``count`` attacks from several threads at once."""
    host, _, port = url.removeprefix("http://").partition(":")
    tally = Tally()

    def work(thread: int) -> None:
        hostile = Hostile(host, int(port), max_body, seed * 1000 + thread)
        for _ in range(thread, count, threads):
            hostile.attack(tally)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return tally


def _bounded(body: dict[str, Any]) -> dict[str, Any]:
    """The same, with answers short enough for thousands of them."""
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), (int, float)) and body[name] > 50:
            body[name] = 50
    if isinstance(body.get("n"), int) and 20 < body["n"] < 2**31:
        body["n"] = 20
    return body


def _head(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\n{TO}Content-Length: {length}\r\n\r\n".encode()


def _receive(link: socket.socket) -> bytes:
    """One answer: as much as its length says, or until the server closes."""
    data = bytearray()
    end = time.monotonic() + LONGEST
    with contextlib.suppress(ConnectionResetError):
        while not _complete(data):
            link.settimeout(max(0.01, end - time.monotonic()))
            part = link.recv(65536)
            if not part:
                break
            data += part
    return bytes(data)


def _complete(data: bytearray) -> bool:
    head, found, rest = bytes(data).removeprefix(CONTINUE).partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(rest) >= int(line.partition(b":")[2])
    return rest.endswith(b"0\r\n\r\n")
