"""What a command cannot do with a kind of model is told before a weight is read, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers.command import complaint, status
from helpers.tiny import save, tiny_model
from helpers.tiny_engine import one_thread
from helpers.zoo import LONGROPE, ZOO

__all__ = ["one_thread"]

Saved = Callable[[str], str]
WINDOW = ("--window", 192, "--windows", 1)
BITS = ("--bits", 6, *WINDOW)
MEMORY = ("--kv-cache-memory", "8MiB")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return cache(lambda family: save(tiny_model(family, **ZOO[family]), tmp_path_factory.mktemp(family)))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(" ".join(f"w{4 + (i * j) % 90}" for i in range(60)) for j in range(40)), "utf-8")
    return file


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("minicpm3", ("calibrate", *BITS), "calibration does not work with cached latents"),
        ("gemma3n_text", ("calibrate", *BITS), "calibration cannot do layers that share keys and values"),
        ("gemma4_text", ("calibrate", *BITS), "calibration cannot do layers that share keys and values"),
        ("llama4_text", ("calibrate", *BITS), "calibration cannot do the chunked attention"),
        ("granitemoehybrid", ("calibrate", *BITS), "calibration has no place for the states of recurrent layers"),
        ("phi3-longrope", ("calibrate", "--bits", 6, "--window", 600), "context of 600 tokens is over the 512"),
        ("llama4_text", ("quantize", *WINDOW), "error feedback cannot do the chunked attention"),
        ("deepseek_v3", ("quantize", *WINDOW), "is a mixture of experts"),
        ("minicpm3", ("export", "--to", "modelopt", *WINDOW), "0 of the 3 layers"),
        ("phi3", ("export", "--to", "modelopt", *WINDOW), "0 of the 3 layers"),
        ("llama4_text", ("export", "--to", "modelopt", *WINDOW), "cannot do the chunked attention"),
    ],
)
def test_commands_that_make_something(
    family: str,
    arguments: tuple[object, ...],
    words: str,
    saved: Saved,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, out = saved(family), tmp_path / "out"
    capsys.readouterr()
    _no_weights(monkeypatch)
    assert words in complaint(capsys, arguments[0], name, *arguments[1:], "--text", book, "-o", out)
    assert not out.exists()


LATENT = "a latent is key and value at once"
SELF = ("--speculative-config", '{"method": "self"}')


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "--kv-cache-dtype", "int8,int4", *WINDOW), LATENT),
        (("advise", "--kv-cache-dtype", "int8,int4", "--context", 200, *WINDOW, *MEMORY), LATENT),
        (("bench", "--kv-cache-dtype", "int8,int4", "--context", 128), LATENT),
        (("generate", "-p", "w5", "--kv-cache-dtype", "int8,int4", *MEMORY), LATENT),
        (("generate", "-p", "w5", "--kv-cache-dtype", "int8h", *MEMORY, *SELF), "'self' does not work with cached"),
        (("generate", "-p", "w5", "--kv-cache-dtype", "int8", "--kv-cache-memory", "9KiB"), "one session needs 18 KiB"),
    ],
)
def test_commands_that_run_a_model_with_latents(
    arguments: tuple[object, ...],
    words: str,
    saved: Saved,
    book: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = saved("minicpm3")
    capsys.readouterr()
    _no_weights(monkeypatch)
    text = ("--text", book) if arguments[0] in ("evaluate", "advise", "bench") else ()
    assert words in complaint(capsys, arguments[0], name, *arguments[1:], *text)


def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr("kvbits.models.reader.Reader.weights", unexpected)


def test_advice_on_a_long_context_takes_the_long_factors(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were asked for only after loading, and refused then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("kvbits.evaluation.survey.TASKS", ())
    name, out = save(tiny_model("phi3", **LONGROPE), tmp_path / "model"), tmp_path / "a.json"
    sizes = ("--context", 300, *WINDOW, "--speed-context", 128, "--new-tokens", 4, "--kv-cache-dtype", "int8")
    assert status("advise", name, "--text", book, *MEMORY, *sizes, "--json", out) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["context"] == 300
