"""``--disable-mla``: every head's keys and values of a model that could cache its latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.command import status
from helpers.hybrids import PROMPTS, answers, expected
from helpers.latents import loaded_of
from helpers.serving import engine_of
from helpers.tiny import chat_tokenizer, save, tiny_model
from helpers.tiny_engine import one_thread

from kvbits import LLM
from kvbits.engine.config import EngineConfig
from kvbits.engine.transfer import export_pages, import_pages
from kvbits.errors import ConfigError
from kvbits.models import load_model
from kvbits.models.load import wrap
from kvbits.ray.options import ReplicaOptions
from kvbits.server.options import ServerOptions

__all__ = ["one_thread"]

FAMILY = "minicpm3"
MEMORY = ("--kv-cache-memory", "8MiB")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model(FAMILY), tmp_path_factory.mktemp("mla"), chat_tokenizer)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(file: Path, *arguments: object) -> dict[str, Any]:
    assert status(*arguments, "--json", file) == 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("family", ["deepseek_v2", "youtu", FAMILY])
def test_the_same_text_from_heads(family: str, tmp_path: Path) -> None:
    """:mod:`test_latents` has the same of latents."""
    name = save(tiny_model(family), tmp_path)
    loaded = load_model(name, "float32", disable_mla=True)
    assert {layer.num_kv_heads for layer in loaded.geometry.layers} == {4}
    assert not loaded.geometry.expanded, "it was asked for, so there is no reason to tell"
    assert answers(engine_of(loaded, kv_cache_dtype="bf16"), PROMPTS) == expected(family)


@pytest.mark.parametrize(("options", "elements"), [((), 32 + 16), (("--disable-mla",), 4 * (48 + 16))])
def test_bytes_are_as_planned(path: str, options: tuple[str, ...], elements: int, tmp_path: Path) -> None:
    planned = written(
        tmp_path / "p.json", "plan", path, "--memory", "64MiB", "--workspace", "1MiB", "--context", 188,
        "--kv-cache-dtype", "bf16", "--kv-cache-dtype", "int8", *options,
    )  # fmt: skip
    wide, scheme = planned["schemes"]
    assert planned["mla"] == ("expanded" if options else "latent")
    assert wide["kv_bytes_per_token"] == 3 * elements * 2
    text = tmp_path / "book.txt"
    text.write_text(" ".join(f"w{5 + i * 7 % 80}" for i in range(2000)), encoding="utf-8")
    sizes = ("--context", 188, "--batch", 2, "--new-tokens", 4, "--text", text)
    speed = written(tmp_path / "b.json", "bench", path, "--kv-cache-dtype", "int8", *sizes, *options)
    assert speed["kv_bytes_per_token"] == scheme["kv_bytes_per_token"]
    assert speed["kv_bytes_per_session"] == scheme["session_bytes"]
    with LLM(path, kv_cache_dtype="int8", kv_cache_memory="8MiB", disable_mla=bool(options), progress=False) as llm:
        assert llm.engine.pool.bytes_per_token() == scheme["kv_bytes_per_token"]


def test_commands_and_replicas_take_it(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    wrapped = wrap

    def noted(*arguments: Any, **options: Any) -> Any:
        kept.append(wrapped(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr("kvbits.models.load.wrap", noted)
    asked = ("generate", path, "-p", "w5 w6", "--max-tokens", 3, "--kv-cache-dtype", "int8", *MEMORY)
    assert status(*asked, "--disable-mla") == 0
    monkeypatch.setattr("sys.stdin", (tmp_path / "said").open("w+"))
    assert status("chat", path, "--kv-cache-dtype", "int8", *MEMORY, "--disable-mla") == 0
    ReplicaOptions(path, EngineConfig(disable_mla=True), ServerOptions("m")).load()
    assert len(kept) == 3
    assert not any(loaded.geometry.latent for loaded in kept)


def test_a_model_that_was_loaded_for_latents_is_refused(path: str) -> None:
    loaded = load_model(path)
    with pytest.raises(ConfigError, match=r"disable_mla is asked for, and .* was loaded for cached latents"):
        LLM(loaded, kv_cache_dtype="int8", kv_cache_memory="8MiB", disable_mla=True, progress=False)
    with pytest.raises(ConfigError, match="give it to load_model too"):
        engine_of(loaded, disable_mla=True)


def test_pages_and_losses_are_kept_apart(path: str) -> None:
    latents, heads = load_model(path), load_model(path, disable_mla=True)
    assert latents.fingerprint != heads.fingerprint == load_model(path, weights="int8", disable_mla=True).fingerprint
    engine = engine_of(heads, kv_cache_dtype="int8")
    answers(engine, [PROMPTS[2]], max_tokens=2)
    with pytest.raises(ConfigError, match="the model with the hash"):
        import_pages(engine_of(latents, kv_cache_dtype="int8"), export_pages(engine, PROMPTS[2]))


def test_heads_can_be_calibrated(path: str, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(" ".join(f"w{4 + (i * j) % 90}" for i in range(60)) for j in range(40)), "utf-8")
    sizes = ("--window", 192, "--windows", 1, "--check-windows", 1, "--sink", "none", "--bits", 6)
    policy = tmp_path / "policy"
    assert status("calibrate", path, "--text", text, "-o", policy, *sizes, "--disable-mla") == 0
    asked = ("generate", path, "-p", "w5 w6", "--max-tokens", 3, "--kv-policy", policy, *MEMORY)
    assert status(*asked, "--disable-mla") == 0
    assert status(*asked) == 2, "a policy of heads is none of latents"


def test_models_without_latents_are_as_ever(tmp_path: Path) -> None:
    name = save(tiny_model("llama"), tmp_path)
    plain, asked = load_model(name), load_model(name, disable_mla=True)
    assert (asked.geometry, asked.fingerprint) == (plain.geometry, plain.fingerprint)


def test_a_model_that_is_on_another_device_has_its_heads_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbits.models.load.fingerprint", lambda _: "0" * 16)
    assert not wrap(tiny_model(FAMILY).to("meta"), None, FAMILY).geometry.latent
    assert loaded_of(FAMILY).geometry.latent
