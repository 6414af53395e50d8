"""``kvbits chat`` at a terminal: commands, pastes, interrupts, and what fails."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.process import saved_byte_model
from helpers.serving import byte_model

from kvbits import LLM
from kvbits.cli.asker import Local, Turn
from kvbits.cli.chat import _answer, _figures
from kvbits.cli.conversation import COMMANDS, Conversation
from kvbits.engine.outputs import Delta
from kvbits.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_byte_model(tmp_path_factory.mktemp("model"))


def test_commands(tmp_path: Path) -> None:
    said: list[str] = []
    chat = Conversation("Be brief.", said.append)
    chat.messages += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert not chat.command("hello /help")
    assert not chat.command("//help")
    assert not chat.command("/usr/bin is a path")
    assert chat.command("/help")
    assert all(name in said[-1] for name in COMMANDS)
    path = tmp_path / "chat.json"
    assert chat.command(f"/save {path}")
    assert json.loads(path.read_text()) == {"messages": chat.messages}
    with pytest.raises(ConfigError, match="name of a file"):
        chat.command("/save")
    assert chat.command("/system Speak\nGerman.")
    assert chat.messages[0] == {"role": "system", "content": "Speak\nGerman."}
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.command("/clear")
    assert chat.messages == [{"role": "system", "content": "Speak\nGerman."}]
    assert chat.command("/nonsense")
    assert "no command /nonsense" in said[-1]
    assert not chat.ended
    assert chat.command("/exit")
    assert chat.ended


class Terminal:
    """``kvbits chat`` on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        start = "from kvbits.cli.main import run; run()"
        self._fd, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "chat", *arguments], stdin=other, stdout=other, stderr=other,
            start_new_session=True, env={**os.environ, "TERM": "xterm"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        os.close(other)
        self.said = ""

    def read(self, pattern: str, seconds: float = 120.0) -> str:
        """What is said until ``pattern``, from where the last reading ended."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.said)) is None:
            assert time.monotonic() < end, self.said[-2000:]
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self._fd, 65536).decode("utf-8", "replace")
                except OSError as error:  # its end
                    raise AssertionError(self.said[-2000:]) from error
        found, self.said = self.said[: match.end()], self.said[match.end() :]
        return found

    def says(self, pattern: str, seconds: float) -> bool:
        try:
            self.read(pattern, seconds)
        except AssertionError:
            return False
        return True

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(model: str, tmp_path: Path) -> Iterator[Terminal]:
    options = ("--dtype", "float32", "--kv-cache-memory", "4MiB", "--max-tokens", "700", "--threads", "1")
    found = Terminal(model, *options, "--kv-cache-dtype", "int8", "--seed", "1", "--temperature", "1")
    found.read("> ")
    yield found
    found.close()


def test_a_paste_is_one_message_and_an_interrupt_ends_an_answer_only(terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"

    def saved() -> list[dict[str, str]]:
        terminal.type(f"/save {file}\r")
        terminal.read(r"messages in ")
        terminal.read("> ")
        found: list[dict[str, str]] = json.loads(file.read_text())["messages"]
        return found

    # A terminal that marks pastes, and one whose lines just come at once.
    terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
    figures = terminal.read(r"\[[\d.,]+ tokens/s; first token after [\d.]+ s; .*\]\s")
    assert "this chat" in figures
    terminal.read("> ")
    assert [m["content"] for m in saved() if m["role"] == "user"] == ["one\ntwo"]
    terminal.type("/clear\r")
    terminal.read("a new conversation")
    terminal.read("> ")
    terminal.type("x" * 3000 + "\r")  # what fails leaves nothing
    assert "tokens" in terminal.read("kvbits: error: .*")
    terminal.read("> ")
    assert saved() == []
    # Ctrl-C at the prompt drops the line; the chat goes on. Python sees a signal that came before it waited for keys
    # with the next key only: so it gets time to wait, and what is typed next shows it, not readline's drawing.
    terminal.type("dropped")
    terminal.read("dropped")
    time.sleep(0.5)
    terminal.process.send_signal(signal.SIGINT)
    terminal.says("> ", 1)
    terminal.type("/clear\r")
    terminal.read("a new conversation")  # else "dropped/clear" was a message
    terminal.read("> ")
    assert saved() == []
    terminal.type("/exit\r")
    assert terminal.process.wait(30) == 0


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_interrupt_ends_an_answer_and_keeps_what_it_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", Keyboard())
    llm = LLM(byte_model(), kv_cache_dtype="int8", kv_cache_memory="4MiB", progress=False)
    asker = Local(llm, True, 900, {"seed": 1, "temperature": 1.0})
    steps = 0
    step = llm.engine.step

    def counted() -> list[Delta]:
        nonlocal steps
        steps += 1
        if steps == 20:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step, which goes on to its end
        return list(step())

    monkeypatch.setattr(llm.engine, "step", counted)
    conversation = Conversation(None, print)
    before = signal.getsignal(signal.SIGINT)
    _answer(conversation, "go", asker)
    assert steps == 20
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[1]["content"] + "\n" == capsys.readouterr().out
    assert all(delta.finish_reason == "abort" for delta in step())
    assert not llm.engine.has_unfinished()
    llm.engine.pages.check()
    assert signal.getsignal(signal.SIGINT) is before
    # An error after some text keeps nothing.
    monkeypatch.setattr(
        llm.engine, "step", lambda: [Delta("request-1", 0, (1,), "half"), Delta("request-1", 0, error="no")]
    )
    with pytest.raises(RequestError, match="no"):
        _answer(conversation, "again", asker)
    assert len(conversation.messages) == 2


def test_speed_is_that_of_decoding() -> None:
    line = _figures(Turn(1000, 0, 11, 2.0**21, "length"), 3.0, 2.0, False)
    assert line == (
        "[5.0 tokens/s; first token after 3.00 s; 0 of 1,000 prompt tokens from the cache; this chat: 2.0 MiB; "
        "cut by --max-tokens]"
    )
