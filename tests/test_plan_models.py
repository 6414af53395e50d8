"""The planner's model facts against transformers' own models, and what follows from them by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import tiny_config
from transformers import AutoConfig

from kvbits.codecs import parse_policy
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import geometry_of
from kvbits.models.facts import facts_of_model, parameters_of
from kvbits.planning.facts import known_config, known_facts, known_models
from kvbits.planning.hf_config import MLA, layers_of
from kvbits.planning.memory import weights_bytes, workspace_bytes
from kvbits.planning.ranks import rank_geometry
from kvbits.planning.request import Options, make_plan
from kvbits.planning.window import windowed_session_bytes


@pytest.mark.parametrize("name", known_models())
def test_tables_agree_with_transformers(name: str) -> None:
    """Every model of the tables, built without memory: parameters, embeddings, experts."""
    fields = known_config(name)
    assert fields is not None
    counted = parameters_of(AutoConfig.for_model(**fields))
    facts = known_facts(name)
    assert facts is not None
    assert counted.total == facts.parameters.total
    assert counted.embeddings == facts.parameters.embeddings
    assert counted.experts == pytest.approx(facts.parameters.experts, rel=1e-3)
    assert facts.source.startswith("https://")


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-2b", "qwen3-8b", "gemma-3-12b", "gpt-oss-20b"])
def test_geometry_from_fields_is_what_a_trial_pass_measures(name: str) -> None:
    fields = known_config(name)
    assert fields is not None
    measured = geometry_of(AutoConfig.for_model(**fields))
    for read, real in zip(layers_of(fields), measured.layers, strict=True):
        assert (read.num_heads, read.num_kv_heads) == (real.num_heads, real.num_kv_heads)
        assert (read.key_dim, read.value_dim, read.window) == (real.key_dim, real.value_dim, real.window)


@pytest.mark.parametrize("mla", ["latent", "expanded"])
def test_latent_attention_from_fields_is_what_a_trial_pass_measures(mla: MLA) -> None:
    config = tiny_config("deepseek_v3")
    assert layers_of(config.to_dict(), mla) == geometry_of(config, latents=mla == "latent").layers


def test_smollm2_from_the_table_is_the_model_that_loads() -> None:
    from kvbits.models.locate import locate

    source = locate("smollm2-135m")
    config = AutoConfig.from_pretrained(source.path, gguf_file=source.gguf)
    facts = known_facts("SmolLM2-135M-Instruct")
    assert facts is not None
    measured = geometry_of(config)
    assert [(g.num_heads, g.num_kv_heads, g.key_dim, g.value_dim) for g in facts.geometry.layers] == [
        (g.num_heads, g.num_kv_heads, g.key_dim, g.value_dim) for g in measured.layers
    ]
    assert facts.geometry.max_position == measured.max_position
    assert facts.parameters.total == parameters_of(config).total


def test_sizes_by_hand() -> None:
    """Figures that the publishers state: gpt-oss' checkpoints (model card, arXiv:2508.10925), DeepSeek's cache."""
    small, large = known_facts("gpt-oss-20b"), known_facts("gpt-oss-120b")
    assert small is not None
    assert large is not None
    assert weights_bytes(small.parameters, "mxfp4") / 2**30 == pytest.approx(12.8, abs=0.05)
    assert weights_bytes(large.parameters, "mxfp4") / 2**30 == pytest.approx(60.8, abs=0.05)
    assert small.parameters.active / 1e9 == pytest.approx(3.6, abs=0.4)
    deepseek = known_facts("deepseek-v3")
    assert deepseek is not None
    assert deepseek.geometry.bytes_per_token_16bit() == 61 * (512 + 64) * 2
    assert deepseek.parameters.active / 1e9 == pytest.approx(37, abs=1)
    expanded = known_facts("deepseek-v3", "expanded")
    assert expanded is not None
    assert expanded.geometry.bytes_per_token_16bit() == 61 * 128 * (192 + 128) * 2
    llama = known_facts("meta-llama/Llama-3.1-8B")
    assert llama is not None
    assert weights_bytes(llama.parameters, "bf16") == 2 * 8030261248
    assert weights_bytes(llama.parameters, "fp8") == 8030261248 + 128256 * 4096 * 2
    assert weights_bytes(llama.parameters, "5GiB") == 5 << 30
    assert workspace_bytes(llama, 4096, 1) > workspace_bytes(llama, 2048, 1) > workspace_bytes(llama, 2048, 1, 2)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_ranks_share_kv_heads_and_then_repeat_them(ranks: int, kv_heads: int) -> None:
    facts = known_facts("llama-3.1-70b")
    assert facts is not None
    share = rank_geometry(facts.geometry, ranks)
    assert {(g.num_heads, g.num_kv_heads) for g in share.layers} == {(64 // ranks, kv_heads)}


def test_ranks_keep_one_latent_each() -> None:
    facts = known_facts("deepseek-v3")
    assert facts is not None
    assert rank_geometry(facts.geometry, 8).bytes_per_token_16bit() == facts.geometry.bytes_per_token_16bit()


@pytest.mark.parametrize(("name", "ranks"), [("smollm2-135m", 2), ("llama-3.1-8b", 3), ("llama-3.1-8b", 0)])
def test_ranks_that_do_not_divide_the_heads_are_refused(name: str, ranks: int) -> None:
    facts = known_facts(name)
    assert facts is not None
    with pytest.raises(ConfigError, match=f"{ranks}"):
        rank_geometry(facts.geometry, ranks)


def test_windows_keep_what_a_later_query_sees() -> None:
    """Against a count page by page of what the next token and all later ones can see."""
    facts = known_facts("gpt-oss-20b")
    assert facts is not None
    geometry = facts.geometry
    policy = parse_policy("int8+sink:bf16", geometry.num_layers)
    for context in (1, 63, 64, 127, 128, 129, 191, 192, 255, 1000, 5000):
        expected = 0
        for index, layer in enumerate(geometry.layers):
            expected += 64 * layer.num_kv_heads * (layer.key_dim + layer.value_dim) * 2
            for page in range(context // 64):
                last = 64 * page + 63
                if layer.window is None or context - last < layer.window:
                    schemes = policy.sink if page == 0 and policy.sink else policy.layers
                    expected += schemes[index].layer_bytes(layer)
        assert windowed_session_bytes(geometry, policy, context) == expected, context


def test_a_plan_of_two_ranks_is_that_of_half_the_heads() -> None:
    facts = known_facts("llama-3.1-8b")
    assert facts is not None
    asked = Options(memory="24GiB", weights="bf16", contexts=(8192,), dtypes=("int8",), workspace="1GiB", ranks=2)
    (scheme,) = make_plan(facts, asked).plan.schemes
    # int8: 136 bytes for 128 elements of keys, 130 of values; 4 of 8 KV heads; one open page of 16 bit takes two frames
    frame = 64 * 32 * 4 * (136 + 130)
    cache = (24 << 30) - 8030261248 - (1 << 30)
    assert scheme.frame_bytes == frame
    assert scheme.contexts[0].sessions == cache // frame // (8192 // 64 + 2)


def test_a_configuration_file_is_read_and_measured(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()), encoding="utf-8")
    facts = facts_of_model(str(path))
    assert facts.geometry.layers == geometry_of(config).layers
    assert facts.parameters.total == parameters_of(config).total
    assert facts_of_model(str(tmp_path)).geometry.layers == facts.geometry.layers
    latent = tmp_path / "latent.json"
    latent.write_text(json.dumps(tiny_config("deepseek_v3").to_dict()), encoding="utf-8")
    assert facts_of_model(str(latent)).geometry.bytes_per_token_16bit() == 3 * (32 + 16) * 2
    assert facts_of_model(str(latent), "expanded").geometry.bytes_per_token_16bit() == 3 * 4 * (48 + 16) * 2


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ConfigError, "cannot read the model configuration"),
        ("{}", ConfigError, "it has no model_type"),
        ("[1]", ConfigError, "it has no model_type"),
        ('{"model_type": "unheard-of"}', ConfigError, "transformers cannot read"),
        ('{"model_type": "mamba"}', UnsupportedError, "mamba"),
    ],
)
def test_bad_configurations_are_named(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        facts_of_model(str(path))
