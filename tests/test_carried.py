"""Checkpoints that carry their own quantization: the same values in the kernels' formats, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.carried_files import Form, awq, change_config, compressed, gptq, of_compressed, rounded, words, write
from helpers.tiny import save, tiny_model
from safetensors.torch import load_file, save_file

from kvbits.engine.precheck import check_model
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models import load_model
from kvbits.models.locate import locate
from kvbits.models.packed import packed_weights
from kvbits.models.reader import Reader

FORMS = {
    "w4a16": (Form(compressed, of_compressed(4, True), group=64, scales=torch.bfloat16), "q4_0"),
    "w4a16-asym": (Form(compressed, of_compressed(4, False), group=128, symmetric=False), "uint4"),
    "w8a16": (Form(compressed, of_compressed(8, True), bits=8, group=128), "q8_0"),
    "w8a16-asym": (Form(compressed, of_compressed(8, False), bits=8, symmetric=False), "uint8"),
    "w8a16-channel": (Form(compressed, of_compressed(8, True, strategy="channel"), bits=8, group=-1), "q8_0"),
    "gptq": (Form(gptq, {"quant_method": "gptq", "bits": 4}, group=128, zero_offset=1), "q4_0"),
    "gptq-asym": (Form(gptq, {"quant_method": "gptq", "bits": 4}, symmetric=False, zero_offset=1), "uint4"),
    "gptq-8": (Form(gptq, {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, bits=8), "q8_0"),
    "gptq-8-asym": (Form(gptq, {"quant_method": "gptq", "bits": 8}, 8, 64, False, zero_offset=1), "uint8"),
    "awq": (Form(awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, 4, 64, False), "uint4"),
}  # fmt: skip


def model_of(**changes: Any) -> Any:
    """Rows of inputs that groups of 128 divide."""
    return tiny_model("qwen2", hidden_size=128, head_dim=32, intermediate_size=256, num_hidden_layers=2, **changes)


@pytest.mark.parametrize("form", FORMS)
def test_the_values_are_those_that_were_packed(form: str, tmp_path: Path) -> None:
    """Bit for bit in the kernels' formats, and the logits those of transformers' own code on these weights."""
    model, (packing, wanted) = model_of(), FORMS[form]
    meant = write(model, tmp_path, packing)
    loaded = load_model(str(tmp_path))
    packed = dict(packed_weights(loaded.model))
    assert loaded.fused is not None
    assert packed["lm_head.weight"].weight_format.name == "bf16"
    for name, expected in meant.items():
        assert packed[name].weight_format.name == wanted
        assert torch.equal(packed[name].unpack(torch.arange(len(expected))), expected), name
    with torch.no_grad():
        for name, expected in meant.items():
            model.get_parameter(name).copy_(expected)
    tokens = torch.randint(4, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    found = Reader("m", locate(str(tmp_path))).weights(torch.float32)()
    with torch.inference_mode():
        expected, ours = model(input_ids=tokens).logits, found(input_ids=tokens).logits
    # norms, embedding and head were stored in 16 bits
    assert (ours - expected).norm() < 0.01 * expected.norm()


def test_unpacked_or_rounded_they_are_the_same_model(tmp_path: Path) -> None:
    meant = write(model_of(), tmp_path, FORMS["awq"][0])
    kept, plain = load_model(str(tmp_path)), load_model(str(tmp_path), weights="bf16")
    wide, small = load_model(str(tmp_path), "float32"), load_model(str(tmp_path), weights="int8")
    assert kept.fingerprint == plain.fingerprint == wide.fingerprint == small.fingerprint
    name, expected = next(iter(meant.items()))
    rows = torch.arange(len(expected))
    assert torch.equal(dict(packed_weights(plain.model))[name].unpack(rows), expected.to(torch.bfloat16).float())
    assert torch.equal(wide.model.get_parameter(name), expected)
    assert dict(packed_weights(small.model))[name].weight_format.name == "int8"
    rounded = load_model(str(tmp_path), "float32", weights="int8").model.get_parameter(name)
    assert torch.equal(dict(packed_weights(small.model))[name].unpack(rows), rounded), "rounded once, not twice"


def test_words_are_those_of_the_library() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, _, zeros = rounded(torch.randn(64, 128), FORMS["w4a16-asym"][0])
    for bits, offset in ((4, 8), (8, 128)):
        signed = (codes - offset).to(torch.int8)
        assert torch.equal(words(codes, bits), helpers.pack_to_int32(signed, bits))
    assert torch.equal(words(zeros.T, 4).T, helpers.pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0))


def test_groups_in_another_order_are_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    write(model_of(), tmp_path, FORMS["gptq"][0])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.down_proj\.qweight.*desc_act"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.scales"), "no tensor model.layers.0.mlp.up_proj.scales"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.qweight"), "only qzeros, scales"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 8, dtype=torch.int32)}), "shape"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.scales": torch.zeros(3, 256)}), "shape"),
        (lambda t: t.pop("model.layers.0.input_layernorm.weight"), "model.layers.0.input_layernorm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Any, says: str, tmp_path: Path) -> None:
    write(model_of(), tmp_path, FORMS["awq"][0])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=says):
        load_model(str(tmp_path))


def test_scales_beyond_float16_are_refused(tmp_path: Path) -> None:
    write(model_of(), tmp_path, FORMS["w4a16"][0])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = 1e6
    save_file(tensors, file)
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight_packed has scales that float16 does not hold"):
        load_model(str(tmp_path))


def test_groups_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    write(model_of(), tmp_path, replace(FORMS["gptq"][0], group=16))
    with pytest.raises(UnsupportedError, match="groups of 16 inputs"):
        load_model(str(tmp_path))


def test_codes_that_the_configuration_does_not_name_are_refused(tmp_path: Path) -> None:
    write(model_of(), tmp_path, FORMS["gptq"][0])
    change_config(tmp_path, quantization_config=None)
    with pytest.raises(UnsupportedError, match=r"has model\.layers\.\d\..*_proj in bits, which its config\.json"):
        load_model(str(tmp_path))


def test_scales_of_a_cache_alone_are_no_quantization_of_weights(tmp_path: Path) -> None:
    save(model_of(), tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "modelopt", "config_groups": {}})
    assert {weight.weight_format.name for _, weight in packed_weights(load_model(str(tmp_path)).model)} == {"bf16"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "fp8"}, "fp8 weights"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes weights"),
        ({"quant_method": "hqq"}, "hqq weights"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ weights of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ weights of the format marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ weights of the version gemv"),
        (of_compressed(8, True) | {"format": "float-quantized"}, "the format float-quantized"),
        (of_compressed(2, True), "compressed-tensors weights of 2 bits"),
        (of_compressed(4, True) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
    ],
)
def test_other_quantizations_are_refused_by_name(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    """By the configuration alone, with what to take instead."""
    save(model_of(), tmp_path)
    change_config(tmp_path, quantization_config=config)
    for check in (check_model, load_model):
        with pytest.raises(UnsupportedError, match=rf"carries .*{says}.*--weights int8 or int4"):
            check(str(tmp_path))
