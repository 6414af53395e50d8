"""The demo: what it reports is what the pool and the engine did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import chat_tokenizer, save, tiny_model

from kvbits.cli.main import run
from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.drive import drive
from kvbits.models import load_model

KEYS = (
    "dtype sessions_admitted sessions_capacity kv_bytes_per_token prefill_tokens_per_s decode_tokens_per_s kl_mean "
    "top1_agreement answers_found answers_total"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    return save(tiny_model("llama", max_position_embeddings=4096), directory, chat_tokenizer)


def smollm2() -> ModelGeometry:
    layer = LayerGeometry(num_heads=9, num_kv_heads=3, key_dim=64, value_dim=64, scale=0.125)
    return ModelGeometry("smollm2", (layer,) * 30, 8192, 49152)


def test_the_demo_runs_more_sessions_from_the_same_bytes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 16 bit: 64 tokens x 3 layers x 2 heads x 32 elements x 2 bytes = 24 KiB a page, so two sessions of 1,000 tokens.
    options = (
        "--sessions",
        "8",
        "--document-tokens",
        "800",
        "--windows",
        "1",
        "--kv-cache-memory",
        "1MiB",
        "--also",
        model,
    )
    with pytest.raises(SystemExit) as caught:
        run(["demo", model, "--dtype", "float32", "--output", str(tmp_path), *options])
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    assert "sessions at once" in shown.out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"KL of {Path(model).stem}" in " ".join(shown.out.split())
    found = json.loads((tmp_path / "demo.json").read_text())
    rows = found["dtypes"]
    assert found["also"]["dtypes"]["int4"]["kl_mean"] == rows[2]["kl_mean"]  # the same model twice
    assert [row["dtype"] for row in rows] == ["bf16", "int8", "int4"]
    for row in rows:
        assert set(KEYS.split()) <= set(row)
        assert row["answers_total"] == 8
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0
    admitted = [row["sessions_admitted"] for row in rows]
    assert 1 <= admitted[0] < admitted[1] < admitted[2] <= 8
    assert rows[0]["kl_mean"] == 0.0
    assert rows[0]["top1_agreement"] == 1.0
    assert 0 < rows[1]["kl_mean"] < rows[2]["kl_mean"]
    assert rows[0]["kv_bytes_per_token"] == 3 * 2 * 32 * 2


def test_sessions_counted_as_running_at_once_never_exceed_what_the_pool_holds(model: str) -> None:
    """The same drive on pools of known size: exactly as many sequences get a token in one step as have room."""
    loaded = load_model(model, dtype="float32")
    layout = PoolLayout.of(loaded.geometry, parse_policy("int4", loaded.geometry.num_layers))
    prompt = [5 + i % 60 for i in range(300)]
    per_session = layout.frames_of(300 + 20)
    for room in (1, 2, 4):
        frames = room * per_session + 1 + room * per_session // 50
        config = EngineConfig("int4", frames * layout.frame_bytes, enable_prefix_caching=False)
        engine = Engine(loaded, config)
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        steps = list(drive(engine, [prompt] * 6, params))
        assert max(step.sequences for step in steps) == room
        assert sum(step.prompt_tokens for step in steps) == 6 * 300
        assert sum(step.decoded + step.begun for step in steps) == 6 * 20
        assert engine.pages.available() == engine.pool.num_frames


def test_stopping_a_drive_early_gives_every_page_back(model: str) -> None:
    engine = Engine(load_model(model, dtype="float32"), EngineConfig("int8", 1 << 22, enable_prefix_caching=False))
    for step in drive(engine, [[7] * 100, [8] * 100], SamplingParams(max_tokens=50, ignore_eos=True)):
        if step.decoded == 2:
            break
    assert not engine.has_unfinished()
    assert engine.pages.available() == engine.pool.num_frames


@pytest.mark.parametrize(("dtype", "least"), [("int8", 1.85), ("int4", 3.3)])
def test_sessions_that_a_gigabyte_holds(dtype: str, least: float) -> None:
    """Sessions of 4,096 tokens of SmolLM2, open pages included, against 16 bit."""

    def sessions(name: str) -> int:
        layout = PoolLayout.of(smollm2(), parse_policy(name, 30))
        return (1 << 30) // layout.frame_bytes // layout.frames_of(4096)

    # By hand: 16 bit takes 23,040 bytes a token, and a running session one page more than its tokens fill.
    assert sessions("bf16") == (1 << 30) // (23040 * 64) // 65
    assert sessions(dtype) / sessions("bf16") >= least
