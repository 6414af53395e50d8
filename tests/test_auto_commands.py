"""``--kv-cache-dtype auto`` and what is said of a named dtype: commands, server, replicas, transformers' cache."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import jsonschema
import pytest
from helpers.command import complaint, status
from helpers.process import SMALL, saved_byte_model, serving
from helpers.serving import MODEL, byte_model, engine_of, running
from helpers.tiny import VOCAB, save, tiny_model
from prometheus_client.parser import text_string_to_metric_families

from kvbits.auto import choose as choosing
from kvbits.auto.choose import Choice, named
from kvbits.auto.loss import Loss
from kvbits.auto.wanted import BOUND, Wanted
from kvbits.cli import choosing as lines
from kvbits.engine.config import EngineConfig
from kvbits.errors import ConfigError
from kvbits.hf import QuantizedCache
from kvbits.ray.options import ReplicaOptions
from kvbits.server.options import ServerOptions

LOSS = Loss("3*int4", 0.011, 0.0098, 0.0125, 2048, 2048, "book.txt", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny_model("llama", head_dim=32, seed=7), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Short windows, and an empty cache directory."""
    monkeypatch.setattr(choosing, "CONTEXT", 256)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvbits" / "losses"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{4 + (i * i + i // 7) % (VOCAB - 4)}" for i in range(1200)))
    return path


def test_generate_chooses_once_and_says_what(
    model: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    ask = ("generate", model, "-p", "w5 w6", "--max-tokens", 4, "--temperature", 0, "--dtype", "float32", "--json", out)
    assert status(*ask) == 0
    first = capsys.readouterr()
    line = next(line for line in first.err.splitlines() if line.startswith("auto takes "))
    found = json.loads(out.read_text())
    assert f"auto takes {found['dtype']} (" in line

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(choosing, "measure", never)
    monkeypatch.setattr(choosing, "own_windows", never)
    assert status(*ask, "--max-kl", 0.05) == 0
    assert "auto takes " in capsys.readouterr().err
    loose = json.loads(out.read_text())
    assert loose["loss"]["high"] <= 0.05
    # the dtype by its name: the same text, and the figure
    assert status(*ask, "--kv-cache-dtype", loose["dtype"]) == 0
    again, shown = json.loads(out.read_text()), capsys.readouterr()
    assert again["results"] == loose["results"]
    assert again["loss"] == loose["loss"]
    words = f"measured on {loose['loss']['tokens']} tokens that the model wrote"
    (line,) = [line for line in shown.err.splitlines() if not line.startswith(("Loading ", "[cut by"))]
    assert line.startswith(f"{loose['dtype']} on this model: KL ")
    assert line.endswith(words)


def test_auto_may_be_written_like_any_dtype(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status("generate", model, "-p", "w5", "--max-tokens", 1, "--kv-cache-dtype", "Auto") == 0
    assert "auto takes " in capsys.readouterr().err


def test_evaluate_is_remembered(
    model: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    out = tmp_path / "out.json"
    ask = ("generate", model, "-p", "w5 w6", "--max-tokens", 4, "--kv-cache-dtype", "int8/int4", "--json", out)
    assert status(*ask) == 0
    assert "int8/int4 was never measured on this model" in capsys.readouterr().err
    assert json.loads(out.read_text())["loss"] is None
    evaluated = tmp_path / "evaluate.json"
    common = ("evaluate", model, "--text", text, "--context", 256, "--windows", 2, "--json", evaluated)
    assert status(*common, "--kv-cache-dtype", "int8,int4", "--kv-cache-dtype", "bf16") == 0
    kl = json.loads(evaluated.read_text())["results"][0]["kl_mean"]
    capsys.readouterr()
    assert status(*ask) == 0
    assert "tokens of words.txt" in capsys.readouterr().err
    loss = json.loads(out.read_text())["loss"]
    assert loss["kl"] == pytest.approx(kl)
    # of other weights: a measurement of its own
    assert status(*common, "--kv-cache-dtype", "int8,int4", "--weights", "int8") == 0
    assert len(list(small.rglob("*.json"))) == 2
    assert (loss["text"], loss["arithmetic"], loss["tokens"]) == ("words.txt", "float32", 2 * 127)


def test_serve_chooses_and_tells_its_clients(tmp_path: Path) -> None:
    model = saved_byte_model(tmp_path / "model")
    with serving(model, *SMALL[:-2]) as (process, url):
        one = httpx.get(url + "/v1/models", timeout=30).json()["data"][0]
        said = process.said()
    line = next(line for line in said.splitlines() if "auto takes " in line)
    assert f"auto takes {one['kv_cache_dtype']} (" in line
    assert "measuring " in said
    assert one["kv_cache_loss"]["kl_high"] <= BOUND or one["kv_cache_dtype"] == "bf16"


@pytest.mark.parametrize("command", [("generate", "-p", "w5"), ("serve",), ("chat",)])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-kl", "0.3"), "--max-kl is 0.3; it must be over 0 and at most 0.05"),
        (("--max-kl", "0.01", "--kv-cache-dtype", "int4"), "--max-kl is for --kv-cache-dtype auto"),
        (("--text", "nowhere.txt"), "cannot read the text file 'nowhere.txt'"),
    ],
)
def test_refusals_come_before_the_model(
    command: tuple[str, ...], options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint(capsys, command[0], "no-such-model", *command[1:], *options)


def test_a_text_that_is_too_short(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], small: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("w5 " * 511)
    line = complaint(capsys, "generate", model, "-p", "w5", "--text", path)
    assert "has 511 tokens; 512 are needed" in line
    assert not list(small.rglob("*"))


def test_interrupting_the_measurement_is_one_line_and_leaves_nothing(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(choosing, "measure", interrupted)
    assert status("generate", model, "-p", "w5") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "kvbits: interrupted"
    assert not list(small.rglob("*"))


def test_commands_that_need_a_name_refuse_auto(model: str, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ask in (("evaluate", model, "--text", text), ("bench", model)):
        assert "'auto' is chosen when" in complaint(capsys, *ask, "--kv-cache-dtype", "auto")


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_EVERY", 0.0)
    said: list[str] = []
    choice = lines.chosen(byte_model(head_dim=32, seed=5), Wanted("auto"), said.append)
    assert said[0].endswith("...")
    assert any(line.endswith(": 100 %") for line in said)
    assert said[-1] == choice.line


@pytest.mark.parametrize("loss", [LOSS, None])
def test_models_and_metrics_carry_the_loss(loss: Loss | None) -> None:
    with running(engine_of(byte_model()), loss=loss) as server:
        listed = httpx.get(server.url + "/v1/models").json()
        one = httpx.get(f"{server.url}/v1/models/{MODEL}").json()
        described = httpx.get(server.url + "/openapi.json").json()["paths"]
        metrics = httpx.get(server.url + "/metrics").text
    for path, answer in (("/v1/models", listed), ("/v1/models/{name}", one)):
        schema = described[path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(answer, schema)
    assert listed["data"] == [one]
    samples = {s.name: s.value for f in text_string_to_metric_families(metrics) for s in f.samples}
    if loss is None:
        assert one["kv_cache_loss"] is None
        assert "kvbits:kv_cache_kl_nats" not in samples
    else:
        assert one["kv_cache_loss"] == {"kl": 0.011, "kl_high": 0.0125, "tokens": 2048, "text": "book.txt"}
        assert (samples["kvbits:kv_cache_kl_nats"], samples["kvbits:kv_cache_kl_tokens"]) == (0.011, 2048)


def test_replicas_get_what_was_chosen_and_never_choose() -> None:
    options = ReplicaOptions("tiny", EngineConfig(kv_cache_dtype="auto"), ServerOptions("tiny"))
    loaded = byte_model()
    chosen = options.with_choice(Choice(loaded.policy("int4"), LOSS, ""))
    assert (chosen.engine.kv_cache_dtype, chosen.loss) == (loaded.policy("int4"), LOSS)
    assert named(loaded, chosen.engine.kv_cache_dtype).policy == loaded.policy("int4")
    with pytest.raises(ConfigError, match="'auto' is chosen when"):
        named(loaded, options.engine.kv_cache_dtype)


def test_the_cache_for_transformers_refuses_auto() -> None:
    with pytest.raises(ConfigError, match="'auto' is chosen when"):
        QuantizedCache(tiny_model("llama"), kv_cache_dtype="auto")
