"""Bodies as large as a server takes, of everything that is much work for whoever does not look at it first."""

from __future__ import annotations

SIZE = 8 << 20
_PARTS = {
    "numbers": (b'{"prompt":[', b"0,", b'"x"]}'), "lists": (b'{"prompt":[', b"[],", b"0]}"),
    "strings": (b'{"prompt":[', b'"",', b"0]}"), "objects": (b'{"tools":[', b"{},", b"0]}"),
    "names": (b'{"logit_bias":{', b'"":1,', b'"":"x"}}'), "escapes": (b'{"stop":["', b"\\\\", b'",0]}'),
    "quotes": (b'{"stop":["', b'\\"', b'",0]}'), "opened": (b"", b"[", b""), "opened objects": (b"", b'{"":', b""),
    "a number": (b'{"seed":', b"1", b"}"), "digits": (b'{"top_p":0.', b"1", b"}"), "blanks": (b'{"n":"x"', b" ", b"}"),
    "text": (b'{"stop":["', b"x", b'",0]}'), "not UTF-8": (b'{"stop":["', b"\xff", b'"]}'), "odd": (b"", b'\\"', b""),
    "surrogates": (b'{"stop":["', b"\\ud800", b'"]}'), "nothing": (b"", b"\x00", b""),
    "schemas": (b'{"response_format":{"type":"json_schema","json_schema":{"schema":{"enum":[', b"1,", b"1]}}}}"),
    "messages": (b'{"messages":[', b'{"role":"user","content":""},', b"0]}"), "literals": (b'{"n":[', b"null,", b"0]}"),
    "wrong ids": (b'{"tokens":[', b"7,", b'"x"]}'),
    "parts": (b'{"messages":[{"role":"user","content":[', b"{},", b"0]}]}"),
}  # fmt: skip
LARGE = tuple(_PARTS)
"""Names that :func:`large_body` takes. None of these is a right request to any path."""


def large_body(name: str, size: int = SIZE) -> bytes:
    """``size`` bytes at most, and hardly fewer."""
    start, part, end = _PARTS[name]
    return start + part * ((size - len(start) - len(end)) // len(part)) + end


def just_small_enough(start: str, part: str, end: str, count: int) -> bytes:
    """``part`` for ``count`` times, with commas."""
    return f"{start}{','.join([part] * count)}{end}".encode()


JUST = {
    "numbers": just_small_enough('{"prompt":[', "1234567", ',"x"]}', 520_000),
    "lists": just_small_enough('{"prompt":[', "[]", ',"x"]}', 65_000),
    "tools": just_small_enough('{"tools":[', '{"a":{}}', "]}", 32_000),
    "messages": just_small_enough('{"messages":[', '{"role":"user","content":"x"}', ',"x"]}', 43_000),
    "names": just_small_enough('{"logit_bias":{', '"1":1', ',"2":"x"}}', 130_000),
    "parts": just_small_enough('{"messages":[', '{"role":"user","content":[]}', ',"x"]}', 32_000),
}
"""Wrong requests that just keep to the limits of what is parsed."""
