"""Exported FP8 scales: against transformers' own cache and the compressed-tensors package, which reads them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.utils import calculate_qparams
from helpers.command import status
from helpers.tiny import VOCAB, save, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvbits.errors import UnsupportedError
from kvbits.export.checkpoint import hf_quant_config
from kvbits.export.scales import collect_scales, fp8
from kvbits.models import load_model
from kvbits.models.checkpoint import attention_modules

WINDOWS = [[4 + (i * i * 7 + 13 * j) % (VOCAB - 4) for i in range(192)] for j in range(2)]
MODULES = [f"model.layers.{i}.self_attn" for i in range(3)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def directory(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{4 + (i * i + i // 7) % (VOCAB - 4)}" for i in range(1200)))
    return str(path)


def export(*arguments: object) -> int:
    return status("export", *arguments)


@torch.no_grad()
def cached(model: PreTrainedModel, index: int, side: str) -> torch.Tensor:
    """What transformers' own cache holds of both windows, ``[windows, kv_heads, tokens, dim]``."""
    layers = model(torch.tensor(WINDOWS), use_cache=True).past_key_values.layers
    found: torch.Tensor = getattr(layers[index], side)
    return found


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_scales_are_what_compressed_tensors_computes_from_transformers_cache(
    model: PreTrainedModel, directory: str, per: str
) -> None:
    loaded = load_model(directory, "float32")
    scales = collect_scales(loaded, WINDOWS, "head" if per == "head" else "tensor")
    strategy = "attn_head" if per == "head" else "tensor"
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    for index, layer in enumerate(scales):
        for side, mine in (("keys", layer.key), ("values", layer.value)):
            rows = cached(model, index, side)
            axes = (0, 2, 3) if per == "head" else (0, 1, 2, 3)
            theirs, _ = calculate_qparams(rows.amin(axes).reshape(-1), rows.amax(axes).reshape(-1), args)
            torch.testing.assert_close(mine, theirs.float().reshape(-1), rtol=2e-4, atol=0)


def test_float8_by_hand() -> None:
    """With a scale of 1: 448 is the largest; above 256 the steps are 32; below 2**-6 they are 2**-9."""
    rows = torch.tensor([448.0, 1000.0, -1000.0, 257.0, 300.0, 1.0, 1.07, 2.0**-9, 2.0**-11]).view(1, 1, -1)
    expected = [448.0, 448.0, -448.0, 256.0, 288.0, 1.0, 1.125, 2.0**-9, 0.0]
    assert fp8(rows, torch.ones(1)).flatten().tolist() == expected
    # a scale of 1/16 per head: the same codes of numbers sixteen times as large
    assert fp8(rows / 16, torch.tensor([1 / 16])).flatten().tolist() == [x / 16 for x in expected]


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_the_checkpoint_loads_with_its_scales(
    model: PreTrainedModel, directory: str, text: str, tmp_path: Path, per: str
) -> None:
    """Through transformers and compressed-tensors, which quantize the cache with the scales that they read."""
    out = tmp_path / "export"
    report = tmp_path / "report.json"
    code = export(directory, "--to", "compressed-tensors", "--per", per, "--text", text, "--context", 192, "-o", out,
                  "--json", report)  # fmt: skip
    assert code == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, scheme.type, scheme.strategy) == (8, "float", "attn_head" if per == "head" else "tensor")
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    written = json.loads(report.read_text())["layers"]
    if per == "tensor":
        factors = json.loads((out / "sglang-kv-scales.json").read_text())["kv_cache"]["scaling_factor"]["0"]
        assert factors == {str(i): max(*layer["k_scale"], *layer["v_scale"]) for i, layer in enumerate(written)}
    for module, layer in zip(MODULES, written, strict=True):
        for name in ("k_scale", "v_scale"):
            parameter = loaded.get_parameter(f"{module}.{name}")
            assert parameter.shape == ((2, 1, 1) if per == "head" else (1,))
            assert parameter.flatten().tolist() == pytest.approx(layer[name])
    ids = torch.tensor(WINDOWS[:1])
    with torch.no_grad():
        quantized, exact = (torch.log_softmax(m(ids).logits, -1) for m in (loaded, model))
    kl = float((exact.exp() * (exact - quantized)).sum(-1).mean())
    # scales of a wrong size saturate or flush to zero; these cost what 8 bits cost
    assert 0 < kl < 0.02
    broken = loaded
    for module in MODULES:
        broken.get_parameter(f"{module}.k_scale").data.mul_(1e-3)
    with torch.no_grad():
        wrong = torch.log_softmax(broken(ids).logits, -1)
    assert float((exact.exp() * (exact - wrong)).sum(-1).mean()) > 10 * kl


def test_modelopt_layout(directory: str, text: str, tmp_path: Path) -> None:
    out = tmp_path / "export"
    assert export(directory, "--to", "modelopt", "--text", text, "--context", 192, "-o", out) == 0
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"] == {
        "quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
    }  # fmt: skip
    assert hf_quant_config("1")["producer"] == {"name": "kvbits", "version": "1"}
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    scales = {}
    for name, file in index.items():
        with safe_open(out / file, "pt") as tensors:
            tensor = tensors.get_tensor(name)
        if name.endswith("_scale"):
            scales[name] = tensor
    assert set(scales) == {f"{m}.{x}_proj.{x}_scale" for m in MODULES for x in "kv"}
    assert all(t.shape == () and t.dtype == torch.float32 and float(t) > 0 for t in scales.values())


def test_fused_projections_are_refused(tmp_path: Path) -> None:
    loaded = load_model(save(tiny_model("phi3"), tmp_path), "float32")
    with pytest.raises(UnsupportedError, match="0 of the 3 layers"):
        attention_modules(loaded.model, loaded.geometry)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "gguf"), "--to is 'gguf'"),
        (("--to", "modelopt", "--per", "head"), "one scale per tensor"),
        (("--to", "compressed-tensors", "--per", "row"), "--per is 'row'"),
        (("--to", "compressed-tensors"), "--text FILE"),
        (("--to", "flags"), "--kv-cache-dtype DTYPE or --kv-policy DIR"),
        (("--to", "flags", "--kv-cache-dtype", "int9"), "int9"),
        (("--to", "flags", "--kv-cache-dtype", "int4", "--engine", "vlm"), "vlm"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("smollm2-135m", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_the_models_own_directory_is_left_alone(directory: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((p.name, p.stat().st_size) for p in Path(directory).iterdir())
    code = export(directory, "--to", "compressed-tensors", "--text", text, "--context", 192, "-o", directory)
    assert code == 2
    assert "own directory" in capsys.readouterr().err
    assert sorted((p.name, p.stat().st_size) for p in Path(directory).iterdir()) == before
