"""What is typed: a line that can be edited, with a history, and several lines where they were pasted."""

from __future__ import annotations

import select
import sys

_PASTE = 0.02
"""Seconds in which the next line of a paste is there, and the next of a typist's is not."""


def read_message() -> str | None:
    """The next message, ``None`` at the end of the input. Only from a terminal may it have several lines.

    There a paste arrives as one message: terminals mark it for readline; from others its lines come at once.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    _edit()
    try:
        lines = [_ask("> ")]
        while _more():
            lines.append(_ask(""))
    except EOFError:
        return None
    return "\n".join(lines).strip()


def _ask(prompt: str) -> str:
    # readline writes to stdout, which holds answers: of a redirected one the prompt is no part.
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return input()


def _more() -> bool:
    return bool(select.select([sys.stdin], [], [], _PASTE)[0])


def _edit() -> None:
    """Line editing and a history of this chat, where Python has them."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
