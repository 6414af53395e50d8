"""Cached latents: what a page holds, what a plan says, where heads are expanded instead, what is refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.hybrids import PROMPTS, answers
from helpers.latents import expected, latent_engine, loaded_of
from helpers.serving import engine_of, greedy
from helpers.tiny import save, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.minicpm3 import modeling_minicpm3
from typer.testing import CliRunner

from kvbits import LLM, SamplingParams
from kvbits.calibration.goal import Goal, Sizes
from kvbits.calibration.run import calibrate
from kvbits.cli.main import app
from kvbits.codecs import PoolLayout, parse_policy
from kvbits.codecs.names import parse_names
from kvbits.engine.engine import Engine
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.transfer import export_pages, import_pages
from kvbits.errors import UnsupportedError
from kvbits.hf import QuantizedCache
from kvbits.kernels.triton.format import refusal
from kvbits.models import geometry_of, load_model
from kvbits.models.facts import facts_of_model
from kvbits.models.load import wrap
from kvbits.models.outline import outline_of
from kvbits.planning.facts import known_config, known_facts

LITE = {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
}  # fmt: skip
"""DeepSeek-V2-Lite, as its publisher's config.json has it."""


@pytest.mark.parametrize(("dtype", "bits", "scales"), [("bf16", 16, 0), ("int8", 8, 4), ("int4", 4, 4)])
def test_bytes_of_deepseek_v2_lites_shape(dtype: str, bits: int, scales: int) -> None:
    """A channel of a page has a scale and a zero of 2 bytes each for 64 tokens."""
    geometry = geometry_of(AutoConfig.for_model("deepseek_v2", **LITE))
    layout = PoolLayout.of(geometry, parse_policy(dtype, 27))
    each = (512 + 64) * bits / 8 + (512 + 64) * scales / 64
    assert layout.bytes_per_token == 27 * each
    assert layout.open.used_bytes == 27 * 64 * (512 + 64) * 2
    engine = latent_engine("deepseek_v2-lite", kv_cache_dtype=dtype, kv_cache_memory=8 << 20)
    assert engine.pool.bytes_per_token() == 2 * each
    assert engine.pool.bits_per_element() == 8 * each / 576


def test_a_plan_for_deepseek_v3_is_what_its_configuration_measures(tmp_path: Path) -> None:
    fields = known_config("deepseek-v3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    known, measured = known_facts("deepseek-v3"), facts_of_model(str(path))
    assert measured.geometry.layers == known.geometry.layers
    assert len(measured.geometry.layers) == 61
    assert measured.geometry.bytes_per_token_16bit() == 61 * (512 + 64) * 2
    expanded = facts_of_model(str(path), "expanded").geometry.bytes_per_token_16bit()
    assert expanded / measured.geometry.bytes_per_token_16bit() == pytest.approx(71.1, abs=0.1)


def _config(family: str, path: Path) -> str:
    path.write_text(json.dumps(tiny_config(family).to_dict()), encoding="utf-8")
    return str(path)


def test_a_plan_says_what_is_cached_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, out = _config("minicpm3", tmp_path / "config.json"), tmp_path / "plan.json"
    asked = ["plan", name, "--memory", "64MiB", "--workspace", "1MiB", "--kv-cache-dtype", "int8", "--json", str(out)]
    said = CliRunner().invoke(app, asked)
    assert "The cache is the latents of multi-head latent attention" in " ".join(said.stdout.split()), said.output
    document = json.loads(out.read_text())
    assert document["mla"] == "latent"
    assert document["schemes"][0]["kv_bytes_per_token"] == 3 * 48 * (1 + 4 / 64)
    own = modeling_minicpm3.MiniCPM3Attention.__init__

    def biased(self: nn.Module, *args: object, **kwargs: object) -> None:
        own(self, *args, **kwargs)
        self.kv_b_proj = nn.Linear(self.kv_b_proj.in_features, self.kv_b_proj.out_features, bias=True)

    monkeypatch.setattr(modeling_minicpm3.MiniCPM3Attention, "__init__", biased)
    said = CliRunner().invoke(app, asked)
    text = " ".join(said.stdout.split())
    assert "every head's keys and values, not latents: MiniCPM3Attention expands latents by something else" in text
    document = json.loads(out.read_text())
    assert document["mla"] == "expanded"
    assert document["schemes"][0]["kv_bytes_per_token"] > 3 * 4 * (48 + 16)


def test_logits_that_differ_bring_the_heads_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A family whose expanded keys are not what its parts say."""
    own = modeling_deepseek_v2.DeepseekV2Attention.expand_kv

    def other(self: nn.Module, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = own(self, latent, rotary)
        return keys.flip(1), values

    monkeypatch.setattr(modeling_deepseek_v2.DeepseekV2Attention, "expand_kv", other)
    model = tiny_model("deepseek_v2-dense")
    with caplog.at_level(logging.WARNING):
        loaded = wrap(model, None, "changed")
    assert "changed caches every head's keys and values instead of latents: its logits with cached" in caplog.text
    assert not loaded.geometry.latent
    assert loaded.geometry.layers[0].num_kv_heads == 4
    tokens = PROMPTS[0]
    right = tiny_model("deepseek_v2-dense").generate(
        torch.tensor([tokens]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert greedy(engine_of(loaded, kv_cache_dtype="bf16"), tokens, 3)[0] == right[0, len(tokens) :].tolist()


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_files_are_loaded_and_answered_from(weights: str, tmp_path: Path) -> None:
    """As a user does: a directory, in bfloat16 with packed layers, through ``kvbits.LLM``."""
    name = save(tiny_model("deepseek_v3"), tmp_path)
    assert outline_of(name).geometry is None, "latents or heads: known when it loads"
    llm = LLM(name, kv_cache_dtype="int8", kv_cache_memory="8MiB", weights=weights)
    loaded = llm.engine.loaded
    assert loaded.geometry.latent
    assert loaded.model.model.layers[0].self_attn.kv_b_proj is None, "it is not held twice"
    assert loaded.fingerprint == wrap(AutoModelForCausalLM.from_pretrained(name), None, name).fingerprint
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    found = [llm.generate("w5 w6 w7", params)[0].outputs[0].token_ids for _ in range(2)]
    assert len(found[0]) == 8
    assert found[0] == found[1]


def test_pages_go_to_another_engine() -> None:
    engine = latent_engine("minicpm3", kv_cache_dtype="int8")
    right = answers(engine, [PROMPTS[2]], max_tokens=8)
    other = latent_engine("minicpm3", kv_cache_dtype="int8")
    assert import_pages(other, export_pages(engine, PROMPTS[2])) == 128
    assert answers(other, [PROMPTS[2]], max_tokens=8) == right
    assert other.stats.cached_tokens == 128


def test_the_hugging_face_cache_expands_and_gives_the_model_back() -> None:
    model = tiny_model("minicpm3")
    loaded = wrap(model, None, "minicpm3")
    cache = QuantizedCache(model, "bf16", kv_cache_memory="8MiB")
    tokens = torch.tensor([PROMPTS[0]])
    found = model.generate(tokens, past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found[0, len(PROMPTS[0]) :].tolist() == expected("minicpm3")[0][:8]
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None), found)
    engine = engine_of(wrap(model, None, "minicpm3"), kv_cache_dtype="bf16")
    assert engine.loaded.fingerprint == loaded.fingerprint
    assert answers(engine, [PROMPTS[0]], max_tokens=8) == [expected("minicpm3")[0][:8]]


def test_what_cannot_be_done_with_latents_is_refused_by_name(tmp_path: Path) -> None:
    loaded = loaded_of("minicpm3")
    with pytest.raises(UnsupportedError, match="a latent is key and value at once, so name one dtype for both"):
        engine_of(loaded, kv_cache_dtype="int8,int4")
    with pytest.raises(UnsupportedError, match="layer 0 cannot be stored as 'int8/int4': a latent is key and value"):
        parse_names("int8,int4", 3).check(loaded.geometry)
    config = latent_engine("minicpm3", kv_cache_dtype="int8h").config
    with pytest.raises(UnsupportedError, match="the speculative method 'self' does not work with cached latents"):
        Engine(loaded, config, speculative=SpeculativeConfig(method="self"))
    with pytest.raises(UnsupportedError, match="calibration does not work with cached latents"):
        calibrate(loaded, [], tmp_path, Goal(bits=4), None, Sizes(256), None, print)
    assert refusal(parse_policy("int8", 1).layers[0], loaded.geometry.layers[0]) == "latents are cached on CPUs only"


def test_a_gpu_is_given_every_heads_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save(tiny_model("minicpm3"), tmp_path)
    monkeypatch.setattr("kvbits.models.load.find_device", lambda _: torch.device("meta"))
    monkeypatch.setattr("kvbits.models.load.check_formats", lambda *_: None)
    assert load_model(name, device="cuda").geometry.layers[0].num_kv_heads == 4
