"""The messages of ``kvbits chat``, and the commands that work on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from kvbits.cli.asker import Messages
from kvbits.errors import ConfigError
from kvbits.files import write_text

COMMANDS = {
    "/help": "this list",
    "/clear": "begin anew; the system message stays",
    "/system [TEXT]": "show or set the system message",
    "/save FILE": "write the messages as JSON",
    "/exit": "end the chat, as the end of input does (Ctrl-D)",
}


class Conversation:
    """Messages so far; ``say`` gets what a command answers."""

    def __init__(self, system: str | None, say: Callable[[str], None]) -> None:
        self.messages: Messages = []
        self.ended = False
        self._say = say
        if system:
            self._set_system(system)

    def command(self, text: str) -> bool:
        """Whether ``text`` was a command, which has been obeyed then.

        A word after a slash is one; ``//word`` is a message that begins with a slash. Raises ``ConfigError`` when a
        file cannot be written.
        """
        match = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?", text, re.DOTALL | re.IGNORECASE)
        if match is None:
            return False
        name, rest = match.group(1).lower(), (match.group(2) or "").strip()
        if name == "/help":
            width = max(map(len, COMMANDS))
            self._say("\n".join(f"{command:{width}}  {about}" for command, about in COMMANDS.items()))
        elif name == "/clear":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            self._say("a new conversation")
        elif name == "/system":
            if rest:
                self._set_system(rest)
            self._say(f"system: {self._system() or 'none'}")
        elif name == "/save":
            self._save(rest)
        elif name in ("/exit", "/quit", "/bye"):
            self.ended = True
        else:
            self._say(f"there is no command {name}; /help lists them, and //{name[1:]} sends it as a message")
        return True

    def _system(self) -> str | None:
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else None

    def _set_system(self, text: str) -> None:
        rest = self.messages[1:] if self._system() is not None else self.messages
        self.messages = [{"role": "system", "content": text}, *rest]

    def _save(self, file: str) -> None:
        if not file:
            raise ConfigError("/save needs the name of a file")
        document = json.dumps({"messages": self.messages}, indent=2, ensure_ascii=False)
        write_text(Path(file).expanduser(), document + "\n")
        self._say(f"{len(self.messages)} messages in '{file}'")
