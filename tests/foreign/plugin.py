"""Lets tests that were written for another server run against ours: a pytest plugin.

Their own engine is not installed. Whatever they import of it is an empty stand-in, but what starts a server, which
starts ours, and what makes a tokenizer, which asks the server's. Tests that use no server test the engine's insides and
are left out; so are those that ``scope.toml`` names, each for its reason.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import os
import re
import socket
import subprocess
import sys
import time
import types
import unittest
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

import anthropic
import httpx
import openai
import pytest
import tomllib

SCOPE = tomllib.loads((Path(__file__).parent / "scope.toml").read_text())
SERVERS = {"server", "client", "default_server", "tool_use_client", "base_url"}
STARTERS = ("RemoteOpenAIServer(", "popen_launch_server(")
"""What the code of a test, or of its class, calls that starts a server."""


class Stand(types.ModuleType):
    """A module in which everything is there and nothing does anything."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # Names of models go into requests, and are those that our server gives its own.
        return name.lower() if name.isupper() else MagicMock(name=name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for the packages that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        known = name.split(".")[0] in SCOPE["packages"] or name == "tests.utils"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Stand(spec.name)
        for name, value in PARTS.items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is run."""


class Server:
    """Our server, under the name that a test's own would have."""

    def __init__(self, model: str, args: list[str] | None = None, **options: Any) -> None:
        self.model = model
        given = {name.replace("_", "-"): value for name, value in zip(args or [], (args or [])[1:], strict=False)}
        self.port = options.get("port") or free_port()
        self.key = given.get("--api-key")
        length = given.get("--max-model-len", given.get("--context-length", "8192"))
        command = [os.environ["FOREIGN_KVBITS"], "serve", os.environ["FOREIGN_MODEL"], "--port", str(self.port),
                   "--served-model-name", given.get("--served-model-name", model), "--kv-cache-dtype", "int8",
                   "--kv-cache-memory", "1GiB", "--max-model-len", length]  # fmt: skip
        command += [] if self.key is None else ["--api-key", self.key]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Server:
        for _ in range(600):
            try:
                httpx.get(self.url_for("health")).raise_for_status()
            except httpx.HTTPError:
                assert self.process.poll() is None
                time.sleep(0.5)
            else:
                break
        CURRENT.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        CURRENT.remove(self)
        self.process.terminate()
        self.process.wait(60)

    @property
    def url_root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *parts])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.url_for("v1"), api_key="none", **{"max_retries": 0, "timeout": 600, **options}
        )

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        options = {"max_retries": 0, "timeout": 600, **options}
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key="none", **options)

    def get_async_client_anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        options = {"max_retries": 0, "timeout": 600, **options}
        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key="none", **options)


CURRENT: list[Server] = []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(model: str, base_url: str, *given: Any, api_key: str | None = None, **options: Any) -> Server:
    """SGLang's way to start a server, at ``base_url``."""
    args = [str(arg) for arg in options.get("other_args", ())] + ([] if api_key is None else ["--api-key", api_key])
    return Server(model, args, port=int(base_url.rsplit(":", 1)[1])).__enter__()


def end(pid: int, *given: Any, **options: Any) -> None:
    """Its way to stop one."""
    next(server for server in CURRENT if server.pid == pid).__exit__()


class Tokenizer:
    """The tokenizer of the server that runs."""

    chat_template = None
    vocab_size = 151_936

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._ask("tokenize", prompt=text, add_special_tokens=add_special_tokens)["tokens"]

    def __call__(self, text: str, **options: Any) -> Any:
        return types.SimpleNamespace(input_ids=self.encode(text, options.get("add_special_tokens", True)))

    def decode(self, tokens: Any, **options: Any) -> str:
        tokens = [tokens] if isinstance(tokens, int) else list(tokens)
        return self._ask("detokenize", tokens=tokens)["prompt"]

    def apply_chat_template(
        self, conversation: Any = None, messages: Any = None, tokenize: bool = True, **options: Any
    ) -> Any:
        names = ("add_generation_prompt", "continue_final_message", "tools")
        given = {name: options[name] for name in names if options.get(name) is not None}
        tokens = self._ask("tokenize", messages=conversation or messages, **given)["tokens"]
        return tokens if tokenize else self.decode(tokens)

    def get_vocab(self) -> dict[str, int]:
        return {self.decode([token]): token for token in range(2000)}

    def convert_ids_to_tokens(self, tokens: list[int]) -> list[str]:
        return [self.decode([token]) for token in tokens]

    def _ask(self, path: str, **body: Any) -> Any:
        keys = {} if CURRENT[-1].key is None else {"Authorization": f"Bearer {CURRENT[-1].key}"}
        answer = httpx.post(CURRENT[-1].url_for(path), json=body, headers=keys, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()


PARTS: dict[str, Any] = {
    "RemoteOpenAIServer": Server,
    "iinfo": lambda kind: types.SimpleNamespace(min=-(2**63), max=2**63 - 1),
    "ROCM_EXTRA_ARGS": [],
    "CustomTestCase": unittest.TestCase,
    "DEFAULT_URL_FOR_TEST": f"http://127.0.0.1:{free_port()}",
    "kill_process_tree": end,
    "popen_launch_server": launch,
    "get_tokenizer": lambda *args, **options: Tokenizer(),
    "ModelConfig": lambda *args, **options: types.SimpleNamespace(get_vocab_size=lambda: Tokenizer.vocab_size),
}
sys.meta_path.insert(0, Finder())


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept, left, reasons = [], [], {}
    for item in items:
        name = _name(item.nodeid)
        reason = next((why for pattern, why in SCOPE["out"].items() if fnmatch(name, pattern)), None)
        if reason is None and not SERVERS & set(item.fixturenames) and not _starts_one(item):
            reason = "uses no server"
        (kept if reason is None else left).append(item)
        reasons.setdefault(reason, []).append(name)
    items[:] = kept
    config.left_out = {reason: names for reason, names in reasons.items() if reason is not None}
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    stats = terminalreporter.stats
    failed = [report for kind in ("failed", "error") for report in stats.get(kind, ())]
    passed, total = len(stats.get("passed", ())), len(stats.get("passed", ())) + len(failed)
    terminalreporter.section("in scope")
    for report in failed:
        name = _name(report.nodeid)
        why = next((why for pattern, why in SCOPE["fails"].items() if fnmatch(name, pattern)), "NOT EXPLAINED")
        terminalreporter.line(f"{name}: {why}")
    for reason, names in sorted(config.left_out.items()):
        terminalreporter.line(f"left out, {len(names)}: {reason}")
    terminalreporter.line(f"passed {passed} of {total} ({100 * passed / max(total, 1):.0f} %)")


def _starts_one(item: Any) -> bool:
    if item.cls is None:
        return any(start in inspect.getsource(item.function) for start in STARTERS)
    code = inspect.getsource(item.cls) + inspect.getsource(inspect.getmodule(item.cls))
    return any(start in code for start in STARTERS)


def _name(node: str) -> str:
    # Brackets mean something else in a pattern.
    return re.sub(r"[\[\]]", "|", re.sub(r"^.*/(?=test_\w+\.py)", "", node))


@pytest.fixture(scope="module")
def zephyr_lora_files() -> str:
    return ""
