"""Every model family on the paged cache against transformers' own eager attention and its own cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.driver import Driver
from helpers.latents import RoundedCache
from helpers.tiny import FAMILIES, LATENTS, VOCAB, save, tiny_config, tiny_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import eager_mask

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels import Backend
from kvbits.models import geometry_of, load_model
from kvbits.models.fingerprint import fingerprint_of
from kvbits.models.load import wrap

LENGTH = 150
"""Tokens: two sealed pages and an open one; longer than every window of the tiny models."""

TOKENS = torch.randint(4, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


def eager_with_bf16_keys(module, query, key, value, attention_mask, **kwargs):
    """The family's own eager attention; keys and values are rounded as a 16-bit cache would."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key.bfloat16().float(), value.bfloat16().float(), attention_mask, **kwargs)


def hugging_face_logits(model: torch.nn.Module, tokens: list[int], chunks: list[int], latents: bool = False) -> Tensor:
    """Logits of all tokens by transformers alone: eager attention, its own masks and its own cache.

    ``latents``: these are what is rounded, not the keys and values that they are expanded to.
    """
    AttentionInterface.register("eager-bf16-kv", eager_with_bf16_keys)
    AttentionMaskInterface.register("eager-bf16-kv", eager_mask)
    model.set_attn_implementation("eager" if latents else "eager-bf16-kv")
    cache = (RoundedCache if latents else DynamicCache)(config=model.config)
    parts, at = [], 0
    with torch.inference_mode():
        for count in chunks:
            ids = torch.tensor([tokens[at : at + count]])
            parts.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
            at += count
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_hugging_face(family: str, backend: Backend) -> None:
    # float32 weights and the same bfloat16 keys and values on both sides: what is left is the order of float32 sums
    # (about 1e-6 relative) and, where it tips a bfloat16 rounding of one key (2**-8), a step of that key
    model = tiny_model(family)
    chunks = [70, 60, *[1] * (LENGTH - 130)]
    expected = hugging_face_logits(model, TOKENS, chunks, family in LATENTS)
    driver = Driver(wrap(model, None, family), "bf16", backend)
    got, at = [], 0
    for count in chunks:
        got.append(driver.step({0: TOKENS[at : at + count]})[0])
        at += count
    error = (torch.cat(got) - expected).abs().max() / expected.abs().max()
    assert error < 2e-3, f"{family}: relative error {error:.2e}"
    print(f"{family}: relative error {error:.2e}")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_batch_of_sequences_gives_what_each_gives_alone(family: str, backend: Backend) -> None:
    loaded = wrap(tiny_model(family), None, family)
    prompts = {0: TOKENS[:90], 1: TOKENS[20:33], 2: TOKENS[5:141]}
    alone = {}
    for s, prompt in prompts.items():
        alone[s] = Driver(loaded, "int8", backend).step({s: prompt})[s]
    packed = Driver(loaded, "int8", backend).step(prompts)
    for s in prompts:
        torch.testing.assert_close(packed[s], alone[s], rtol=2e-3, atol=2e-3)


def test_geometry_says_what_the_configuration_means() -> None:
    gemma = geometry_of(tiny_config("gemma2"))
    assert [g.window for g in gemma.layers] == [40, None, 40]
    assert {g.softcap for g in gemma.layers} == {2.0}
    assert {g.scale for g in gemma.layers} == {24**-0.5}
    assert [g.window for g in geometry_of(tiny_config("qwen2-window")).layers] == [None, 70, 70]
    assert {g.window for g in geometry_of(tiny_config("mistral")).layers} == {50}
    assert {g.sinks for g in geometry_of(tiny_config("gpt_oss")).layers} == {True}
    assert not any(g.sinks for g in gemma.layers)
    deepseek = geometry_of(tiny_config("deepseek_v3"), latents=False).layers[0]
    assert (deepseek.key_dim, deepseek.value_dim, deepseek.num_kv_heads, deepseek.latent) == (48, 16, 4, False)
    latent = geometry_of(tiny_config("deepseek_v3")).layers[0]
    assert (latent.key_dim, latent.value_dim, latent.num_kv_heads, latent.latent) == (32 + 16, 32, 1, True)
    llama = geometry_of(tiny_config("llama"), "mine")
    assert (llama.name, llama.max_position, llama.vocab_size, llama.num_layers) == ("mine", 512, VOCAB, 3)
    assert (llama.layers[0].num_heads, llama.layers[0].num_kv_heads) == (4, 2)


@pytest.mark.parametrize(
    ("model_type", "options", "says"),
    [
        ("llama", {"head_dim": 24}, "size 24"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"is_causal": False}, "both directions"),
        ("bloom", {"n_layer": 2, "hidden_size": 64, "n_head": 4}, "bloom"),
        ("t5", {}, "encoder-decoder"),
        ("mamba", {"num_hidden_layers": 2, "hidden_size": 64}, "mamba"),
        ("jamba", {"num_hidden_layers": 8}, "jamba"),
        ("kimi_linear", {"num_hidden_layers": 4}, "kimi_linear"),
        ("stablelm", {"num_hidden_layers": 2}, "does not hand its keywords on"),
        ("axk2", {}, "layers of type indexed_attention"),
        ("bert", {"is_decoder": False}, "neither causal nor"),
    ],
)
def test_what_cannot_run_is_refused_by_name(model_type: str, options: dict, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        geometry_of(AutoConfig.for_model(model_type, **options))


def test_a_chunked_mask_is_told_from_a_window() -> None:
    from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

    from kvbits.models.geometry import _ODD, _observe_mask

    assert int(_observe_mask(mask_function=sliding_window_causal_mask_function(64))) == 64
    for size in (1, 50, 64, 8192):
        found = _observe_mask(mask_function=chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long)))
        assert int(found) == (1 if size == 1 else -size), "chunks of one token are windows of one"

    def odd(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        start = torch.where(query > 99, (query - 99) // 50 * 50 + 99, 0)
        return (key >= start) & (key <= query)

    assert int(_observe_mask(mask_function=odd)) == _ODD
    assert int(_observe_mask(mask_function=lambda *where: torch.tensor(False))) == _ODD
    bent = tiny_model("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    assert {layer.window for layer in geometry_of(bent).layers} == {None}, "it builds a mask of no tokens for no layer"


def test_a_window_that_only_the_mask_knows_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import create_sliding_window_causal_mask
    from transformers.models.llama import modeling_llama

    config = tiny_config("llama")
    config.sliding_window = 33
    monkeypatch.setattr(modeling_llama, "create_causal_mask", create_sliding_window_causal_mask)
    assert {g.window for g in geometry_of(config).layers} == {33}


def test_a_run_that_differs_from_the_geometry_is_refused(backend: Backend) -> None:
    driver = Driver(wrap(tiny_model("gemma2"), None, "gemma2"), "bf16", backend)
    driver.loaded.model.model.layers[0].self_attn.attn_logit_softcapping = 3.0
    with pytest.raises(UnsupportedError, match=r"softcap=3\.0"):
        driver.step({0: TOKENS[:5]})


def test_a_model_without_a_step_is_refused() -> None:
    loaded = wrap(tiny_model("llama"), None, "llama")
    with pytest.raises(UnsupportedError, match="kvbits=Forward"):
        loaded.model(input_ids=torch.tensor([[1, 2]]))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_saved_model_loads_and_runs(family: str, tmp_path: Path, backend: Backend) -> None:
    model = tiny_model(family)
    lines: list[str] = []
    loaded = load_model(save(model, tmp_path), dtype="float32", progress=lines.append)
    assert lines
    assert loaded.tokenizer("w5 w6")["input_ids"] == [5, 6]
    expected = hugging_face_logits(model, TOKENS, [LENGTH])
    got = Driver(loaded, "bf16", backend).step({0: TOKENS})[0]
    assert (got - expected).abs().max() < 2e-3 * expected.abs().max()


def test_the_fingerprint_follows_the_weights_and_not_the_dtype(tmp_path: Path) -> None:
    a = load_model(save(tiny_model("llama"), tmp_path / "a"), dtype="float32")
    same = load_model(str(tmp_path / "a"), dtype="bfloat16")
    other = load_model(save(tiny_model("llama", seed=1), tmp_path / "b"), dtype="float32")
    assert same.model.dtype == torch.bfloat16
    assert a.fingerprint == same.fingerprint
    assert a.fingerprint != other.fingerprint


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_fingerprint_of_files_is_that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    """Tied embeddings, as parameters of one name, and weights in several files are no matter."""
    model = tiny_model(family, tie_word_embeddings=family == "llama").bfloat16()
    path = save(model, tmp_path)
    model.save_pretrained(path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint_of(path) == load_model(path).fingerprint


def test_files_that_hold_other_parameters_have_no_fingerprint(tmp_path: Path) -> None:
    path = save(tiny_model("llama"), tmp_path)
    tiny_config("llama", intermediate_size=128).save_pretrained(path)
    with pytest.raises(UnsupportedError, match=r"mlp.*128"):
        fingerprint_of(path)


def test_loading_leaves_no_trace_in_transformers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    path = save(tiny_model("llama"), tmp_path)
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr)
    capfd.readouterr()
    load_model(path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled(), sys.stderr) == before
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


class TestBadModels:
    def check(self, name: str, *says: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_model(name)
        message = str(caught.value)
        assert "\n" not in message
        for part in says:
            assert part in message

    def test_missing_path(self, tmp_path: Path) -> None:
        self.check(str(tmp_path / "none"), str(tmp_path / "none"), "does not exist", "smollm2-135m")

    def test_not_a_name(self) -> None:
        self.check("a model!", "a model!", "no Hugging Face id")
        self.check("", "empty")

    def test_unknown_dtype(self) -> None:
        with pytest.raises(ConfigError, match="'float8'; choose from bfloat16, float32"):
            load_model("smollm2-135m", dtype="float8")

    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import HfApi

        def fail(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no route")

        monkeypatch.setattr(HfApi, "model_info", fail)
        self.check("nobody/nothing", "nobody/nothing", "cannot be reached", "no route")

    def test_empty_directory(self, tmp_path: Path) -> None:
        self.check(str(tmp_path), "neither a config.json nor a .gguf")

    def test_two_ggufs(self, tmp_path: Path) -> None:
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).write_bytes(b"GGUF")
        self.check(str(tmp_path), "2 .gguf files", "a.gguf, b.gguf")

    def test_not_a_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"hello world")
        self.check(str(tmp_path / "x.gguf"), "not a GGUF file")

    def test_cut_off_gguf(self, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05\x00")
        self.check(str(tmp_path / "x.gguf"), "x.gguf", "cannot read")

    def test_no_weights(self, tmp_path: Path) -> None:
        save(tiny_model("llama"), tmp_path)
        (tmp_path / "model.safetensors").unlink()
        self.check(str(tmp_path), "no *.safetensors")

    def test_corrupt_weights(self, tmp_path: Path) -> None:
        save(tiny_model("llama"), tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        self.check(str(tmp_path), "cannot read the weights")

    def test_corrupt_configuration(self, tmp_path: Path) -> None:
        save(tiny_model("llama"), tmp_path)
        (tmp_path / "config.json").write_text("{")
        self.check(str(tmp_path), "cannot read the configuration")

    def test_unknown_family(self, tmp_path: Path) -> None:
        save(tiny_model("llama"), tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
        self.check(str(tmp_path), "cannot read the configuration", "no_such_family")

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        save(tiny_model("llama"), tmp_path, tokenizer=None)
        self.check(str(tmp_path), "cannot read the tokenizer")

    def test_refused_before_the_weights_are_read(self, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_config(tiny_config("llama", head_dim=24))
        save(model, tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(UnsupportedError, match="size 24"):
            load_model(str(tmp_path))


def test_the_packaged_model_is_found() -> None:
    from kvbits.models.locate import locate

    source = locate("SmolLM2-135M-Instruct")
    assert source.gguf
    assert (Path(source.path) / source.gguf).is_file()
