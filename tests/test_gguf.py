"""GGUF files of every family that kvbits reads itself, against transformers' own models with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from helpers.gguf_files import metadata_of, same_weights, save_gguf, tensors_of, word_vocabulary, write
from helpers.tiny import randomized, save, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import load_model
from kvbits.models.gguf import GgufFile, Weights, configuration
from kvbits.models.locate import locate
from kvbits.models.reader import Reader

FAMILIES = (
    "llama", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def model_of(family: str, **changes: Any) -> Any:
    """A tiny model whose files can say all of it: no window that GGUF has no key for."""
    if family in ("gemma", "qwen2_moe", "qwen3_moe"):
        options = {"head_dim": 32, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
        options |= {
            "vocab_size": 97,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
        if family != "gemma":
            options |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
            options |= {"norm_topk_prob": family == "qwen3_moe", "shared_expert_intermediate_size": 48}
        if family == "qwen2_moe":
            del options["head_dim"]
        config = AutoConfig.for_model(family, **options, **changes)
        return randomized(AutoModelForCausalLM.from_config(config))
    if family == "gemma2":
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        changes = {"query_pre_attn_scalar": 32, **caps} | changes
    if family == "gemma3_text":
        changes = {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 3} | changes
    return tiny_model(family, **changes)


def read(path: str, dtype: torch.dtype = torch.float32) -> Any:
    file = GgufFile(Path(path))
    return Weights(file, configuration(file), dtype).read()


def logits(model: Any, length: int = 300) -> torch.Tensor:
    tokens = torch.randint(4, 97, (1, length), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_to_the_bit(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    if family.startswith("gemma"):  # 1 is added to a norm in float32, so only such weights can come back
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data = torch.arange(len(parameter)) / 64.0 - 0.5
    found = read(save_gguf(model, tmp_path / "m.gguf"))
    assert same_weights(found, model)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert torch.equal(logits(found), logits(model))
    half = read(str(tmp_path / "m.gguf"), torch.bfloat16)
    assert same_weights(half, model.to(torch.bfloat16)) or all(
        torch.equal(a, b) for a, b in zip(half.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16", "BF16"])
def test_quantized_tensors_are_unpacked_as_the_gguf_package_does(kind: str, tmp_path: Path) -> None:
    model = model_of("llama")
    number = GGMLQuantizationType[kind]
    stored = tensors_of(model)
    kinds = {name: number for name, values in stored.items() if values.ndim == 2}
    found = read(save_gguf(model, tmp_path / "m.gguf", kinds=kinds), torch.bfloat16)
    embedding = quants.dequantize(quants.quantize(stored["token_embd.weight"], number), number)
    assert torch.equal(found.model.embed_tokens.weight, torch.from_numpy(embedding).to(torch.bfloat16))
    query = quants.dequantize(quants.quantize(stored["blk.1.attn_q.weight"], number), number)
    halves = torch.from_numpy(query).view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(found.model.layers[1].self_attn.q_proj.weight, halves.to(torch.bfloat16))


def llama3_divisors(base: float, dims: int, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1 (arXiv:2407.21783), frequency by frequency."""
    found = []
    for i in range(0, dims, 2):
        wave = 2 * np.pi * base ** (i / dims)
        if wave < 8192 / 4:
            found.append(1.0)
        elif wave > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wave - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


ROPES: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]] = {
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "linear-without-type": (
        {"llama.rope.scaling.factor": 4.0}, {}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "old-linear": (
        {"llama.rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0,
            "llama.rope.scaling.original_context_length": 64,
        },
        {},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    ),
    "yarn-betas": (
        {
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0,
            "llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0, "llama.rope.scaling.attn_factor": 1.5,
        },
        {},
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4,
            "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5 * (0.1 * float(np.log(8.0)) + 1),
        },
    ),
    "llama3": (
        {"llama.rope.freq_base": 5e5},
        {"rope_freqs.weight": llama3_divisors(5e5, 16, 8.0)},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 5e5,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_rope_scaling_is_that_of_transformers_set_by_hand(case: str, tmp_path: Path) -> None:
    changes, extra, by_hand = ROPES[case]
    model = tiny_model("llama", rope_parameters=dict(by_hand))
    plain = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": by_hand["rope_theta"]})
    path = save_gguf(model, tmp_path / "m.gguf", changes, extra)
    found = read(path)
    torch.testing.assert_close(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(plain) - logits(model)).abs().max() > 0.01  # it does matter here
    assert load_model(path, "float32").geometry.num_layers == 3


def test_any_divisors_of_frequencies_are_obeyed_whatever_the_length(tmp_path: Path) -> None:
    divisors = np.array([1, 1.5, 1, 7, 3, 1, 2, 9], np.float32)
    model = tiny_model("llama")
    path = save_gguf(model, tmp_path / "m.gguf", {}, {"rope_freqs.weight": divisors})
    model.model.rotary_emb.inv_freq /= torch.from_numpy(divisors)
    torch.testing.assert_close(logits(read(path), 500), logits(model, 500), rtol=1e-4, atol=1e-4)
    loaded = load_model(path, "float32")  # not refused as a rotary embedding that changes with the length
    assert loaded.geometry.max_position == 512


def test_longrope_within_its_first_context_and_beyond(tmp_path: Path) -> None:
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(2, 9, 8, dtype=np.float32)
    extra = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    changes = {
        "phi3.rope.scaling.type": "longrope", "phi3.rope.scaling.attn_factor": 1.25,
        "phi3.rope.scaling.original_context_length": 512, "phi3.rope.dimension_count": 16,
    }  # fmt: skip
    model = tiny_model("phi3", sliding_window=None)
    found = read(save_gguf(model, tmp_path / "m.gguf", changes, extra))
    model.model.rotary_emb.inv_freq /= torch.from_numpy(short)
    model.model.rotary_emb.attention_scaling = 1.25
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    path = save_gguf(model, tmp_path / "n.gguf", changes | {"phi3.rope.scaling.original_context_length": 64}, extra)
    config = configuration(GgufFile(Path(path)))
    assert config.rope_parameters["long_factor"] == long.tolist()
    assert load_model(path, "float32").geometry.max_position == 64
    assert load_model(path, "float32", max_model_len=65).geometry.max_position == 512


def test_half_rotated_heads_and_the_window_of_phi3(tmp_path: Path) -> None:
    changes = {"phi3.rope.dimension_count": 12, "phi3.attention.sliding_window": 100}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    model = tiny_model("phi3", rope_parameters=rope)
    assert torch.equal(logits(read(save_gguf(model, tmp_path / "m.gguf", changes))), logits(model))


def test_bases_scaling_and_windows_of_gemma3(tmp_path: Path) -> None:
    layers = ["full_attention", "sliding_attention", "full_attention"]
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    model = model_of("gemma3_text", rope_parameters=rope, layer_types=layers, sliding_window=33)
    changes = {
        "gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base_swa": 2e4,
        "gemma3.attention.sliding_window_pattern": [False, True, False],
    }  # fmt: skip
    found = read(save_gguf(model, tmp_path / "m.gguf", changes))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert load_model(str(tmp_path / "m.gguf"), "float32").geometry.layers[1].window == 33


def test_soft_caps_and_scales_of_gemma2(tmp_path: Path) -> None:
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0}
    model = model_of("gemma2", query_pre_attn_scalar=100, **caps)
    changes = {f"gemma2.{name}": value for name, value in caps.items()} | {"gemma2.attention.scale": 0.1}
    found = read(save_gguf(model, tmp_path / "m.gguf", changes))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    layer = load_model(str(tmp_path / "m.gguf"), "float32").geometry.layers[0]
    assert (layer.softcap, round(layer.scale, 6)) == (3.0, 0.1)


def test_an_array_with_one_value_for_all_layers_is_that_value(tmp_path: Path) -> None:
    model = model_of("llama")
    changes = {"llama.attention.head_count_kv": [2, 2, 2], "llama.feed_forward_length": [96, 96, 96]}
    assert same_weights(read(save_gguf(model, tmp_path / "m.gguf", changes)), model)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama", {"llama.rope.scaling.type": "dynamic", "llama.rope.scaling.factor": 2.0}, "rope.scaling.type"),
        ("llama", {"llama.attention.head_count_kv": [2, 4, 2]}, "llama.attention.head_count_kv"),
        ("llama", {"llama.attention.scale": 0.5}, "llama.attention.scale"),
        ("llama", {"llama.attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ("llama", {"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ("llama", {"llama.attention.causal": False}, "llama.attention.causal"),
        ("qwen2", {"qwen2.expert_count": 8}, "qwen2.expert_count"),
        ("mixtral", {"llama.expert_gating_func": 2}, "llama.expert_gating_func"),
        ("mixtral", {"llama.expert_weights_norm": False}, "llama.expert_weights_norm"),
        ("llama", {"llama.attention.value_length": 32}, "llama.attention.value_length"),
        ("llama", {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ("llama", {"llama.rope.scaling.attn_factor": 1.2, "llama.rope.scaling.factor": 2.0}, "attn_factor"),
        ("llama", {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log"),
        ("phi3", {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 2.0}, "phi3.rope.scaling.type"),
        ("gemma2", {"gemma2.rope.freq_base_swa": 5e5}, "gemma2.rope.freq_base_swa"),
        ("qwen2", {"general.type": "adapter"}, "general.type"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(family: str, changes: dict, says: str, tmp_path: Path) -> None:
    path = save_gguf(model_of(family), tmp_path / "m.gguf", changes)
    with pytest.raises(UnsupportedError, match=says) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_family_left_to_transformers_is_refused_where_its_reader_leaves_something_out(tmp_path: Path) -> None:
    model = model_of("qwen2")
    other = tmp_path / "starcoder2.gguf"
    metadata = {key.replace("qwen2.", "starcoder2."): value for key, value in metadata_of(model).items()}
    write(other, "starcoder2", metadata | word_vocabulary() | {"starcoder2.rope.scaling.factor": 4.0}, {})
    with pytest.raises(UnsupportedError, match=r"starcoder2\.(rope|attention)\."):
        load_model(str(other))
    part = tmp_path / "s-00001-of-00001.gguf"
    write(part, "starcoder2", word_vocabulary() | {"split.count": 2}, {})
    with pytest.raises(ConfigError, match="one of 2"):
        load_model(str(part))
    for i in (1, 2):
        vocabulary = word_vocabulary() if i == 1 else {}
        write(tmp_path / f"s-0000{i}-of-00002.gguf", "starcoder2", vocabulary | {"split.count": 2}, {})
    with pytest.raises(UnsupportedError, match="one of 2 files"):
        load_model(str(tmp_path / "s-00001-of-00002.gguf"))


class TestDamage:
    """One line that names the file and the tensor, before a tensor is unpacked."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise AssertionError("a tensor was unpacked")

        monkeypatch.setattr("kvbits.models.gguf.source.Source.values", fail)

    def check(self, path: str | Path, *says: str, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error) as caught:
            load_model(str(path))
        assert "\n" not in str(caught.value)
        for part in says:
            assert part in str(caught.value)

    def test_cut_off_anywhere(self, tmp_path: Path) -> None:
        whole = Path(save_gguf(model_of("llama"), tmp_path / "m.gguf")).read_bytes()
        cut = tmp_path / "cut.gguf"
        for size in (*range(8, 3000, 97), len(whole) // 2, len(whole) - 40):
            cut.write_bytes(whole[:size])
            self.check(cut, "cut.gguf")
        cut.write_bytes(whole[: len(whole) // 2])
        self.check(cut, "cut off", "tensor blk.")

    def test_any_byte_of_the_header_changed_is_no_crash(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        whole = Path(save_gguf(model_of("llama"), tmp_path / "m.gguf")).read_bytes()
        generator = np.random.default_rng(0)
        bad = tmp_path / "bad.gguf"
        for _ in range(300):
            place = int(generator.integers(4, 4000))
            bad.write_bytes(whole[:place] + bytes([int(generator.integers(256))]) + whole[place + 1 :])
            assert "\n" not in complaint(bad)

    @pytest.mark.parametrize("key", ["freq_base", "scaling.factor"])
    def test_a_rope_that_cannot_be(self, key: str, tmp_path: Path) -> None:
        for value in (-2.0, float("nan"), *([0.0] if key == "freq_base" else [])):
            path = save_gguf(model_of("llama"), tmp_path / "m.gguf", {f"llama.rope.{key}": value})
            self.check(path, f"llama.rope.{key} is {value}")

    def test_missing_wrong_and_unknown_tensors(self, tmp_path: Path) -> None:
        model = model_of("llama")
        path = tmp_path / "m.gguf"
        stored = tensors_of(model)
        metadata = metadata_of(model) | word_vocabulary()
        without = {name: values for name, values in stored.items() if name != "blk.2.ffn_up.weight"}
        write(path, "llama", metadata, without)
        self.check(path, "blk.2.ffn_up.weight", "m.gguf")
        write(path, "llama", metadata, stored | {"blk.1.attn_v.weight": stored["blk.1.attn_v.weight"][:16]})
        self.check(path, "blk.1.attn_v.weight", "[16, 64]", "[32, 64]")
        write(path, "llama", metadata, stored | {"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
        self.check(path, "blk.0.attn_sinks.weight", error=UnsupportedError)
        name = b"blk.0.ffn_down.weight"
        write(path, "llama", metadata, stored)
        data = bytearray(path.read_bytes())
        at = data.index(name) + len(name) + 4 + 16
        data[at : at + 4] = (99).to_bytes(4, "little")
        path.write_bytes(data)
        self.check(path, "blk.0.ffn_down.weight", "unknown type 99")

    def test_a_part_that_is_missing(self, tmp_path: Path) -> None:
        model = model_of("llama")
        paths = split(model, tmp_path)
        paths[1].unlink()
        self.check(paths[0], paths[1].name, "missing")
        self.check(tmp_path, paths[1].name, "missing")

    def test_missing_and_cut_off_shards_of_safetensors(self, tmp_path: Path) -> None:
        save(model_of("llama"), tmp_path / "m")
        model_of("llama").save_pretrained(tmp_path / "m", max_shard_size="60KB")
        (tmp_path / "m" / "model.safetensors").unlink()
        shards = sorted((tmp_path / "m").glob("*.safetensors"))
        assert len(shards) > 2
        whole = shards[1].read_bytes()
        shards[1].write_bytes(whole[:-100])
        self.check(tmp_path / "m", shards[1].name, "cut off", "tensor model.")
        shards[1].unlink()
        self.check(tmp_path / "m", shards[1].name)


def complaint(path: Path) -> str:
    """What reading the header and the configuration complains of, if anything."""
    try:
        file = GgufFile(path)
        if file.architecture == "llama":
            configuration(file)
    except (ConfigError, UnsupportedError) as error:
        return str(error)
    return ""


def split(model: Any, directory: Path) -> list[Path]:
    """The model in three files, metadata in the first."""
    stored = tensors_of(model)
    names = sorted(stored)
    paths = [directory / f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for i, path in enumerate(paths):
        facts = {"split.no": i, "split.count": 3, "split.tensors.count": len(names)}
        whole = metadata_of(model) | word_vocabulary() if i == 0 else {}
        write(path, "llama", whole | facts, {name: stored[name] for name in names[i::3]})
    return paths


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = model_of("llama")
    paths = split(model, tmp_path)
    for name in (tmp_path, paths[0], paths[2]):
        found = Reader("m", locate(str(name))).weights(torch.float32)()
        assert same_weights(found, model)
