"""``kvbits quantize``: compressed-tensors' checkpoints, rounded layer by layer on what rounded layers give."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import complaint, status
from helpers.packed_files import decompressed, with_values
from helpers.tiny import save, tiny_model, tiny_tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from kvbits.calibration import quantize as whole
from kvbits.calibration.parts import Parts
from kvbits.calibration.weight_feedback import round_with_feedback
from kvbits.models import load_model
from kvbits.models.locate import locate
from kvbits.models.packed import packed_weights
from kvbits.models.reader import Reader
from kvbits.weights.integers import nearest

WINDOW, WINDOWS = 128, 4
SMALL = ("--window", WINDOW, "--windows", WINDOWS)


def text_of(words: int = 700) -> str:
    source = random.Random(5)
    return " ".join(f"w{min(4 + int(source.expovariate(0.05)), 96)}" for _ in range(words))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text_of())
    return path


def model_of(family: str, folder: Path, **changes: Any) -> str:
    return save(tiny_model(family, **changes).bfloat16(), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_of("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert status("quantize", model, "-o", out, "--text", text, *SMALL) == 0
    return out


def windows_of(text: Path) -> list[Tensor]:
    """The windows that are read: all over the text."""
    tokens = tiny_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]
    found = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]
    return [torch.tensor([found[i * len(found) // WINDOWS]]) for i in range(WINDOWS)]


@torch.no_grad()
def inputs_of(model: Any, names: list[str], windows: list[Tensor]) -> dict[str, Tensor]:
    """``float32 [tokens, in]`` of some linear layers while ``model`` reads ``windows``."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].append(args[0][0]))
        for name in names
    ]
    for window in windows:
        model(input_ids=window)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_kvbits_reads_what_the_words_say(model: str, made: Path) -> None:
    values = decompressed(made)
    packed = dict(packed_weights(load_model(str(made)).model))
    assert len(values) == 21
    for name, value in values.items():
        assert packed[name].weight_format.name == "uint4"
        assert torch.equal(packed[name].unpack(torch.arange(len(value))), value), name
    tokens = torch.randint(4, 97, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = Reader("m", locate(str(made))).weights(torch.float32)()(input_ids=tokens).logits
        expected = with_values(model, values)(input_ids=tokens).logits
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_compressed_tensors_decompresses_the_same(weights: str, model: str, text: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert status("quantize", model, "-o", tmp_path, "--text", text, "--weights", weights, *SMALL) == 0
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig.model_validate(fields)
    assert (config.format, config.ignore, list(config.config_groups)) == ("pack-quantized", ["lm_head"], ["group_0"])
    tensors = load_file(tmp_path / "model.safetensors")
    packed = dict(packed_weights(load_model(str(tmp_path)).model))
    for name, value in decompressed(tmp_path).items():
        stem = name.removesuffix("weight")
        own = {key.removeprefix(stem): part for key, part in tensors.items() if key.startswith(stem)}
        scheme = config.config_groups["group_0"]
        found = library.PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        assert torch.equal(value.to(found.dtype), found), name
        assert torch.equal(packed[name].unpack(torch.arange(len(value))), value)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_transformers_loads_it_unpacked(weights: str, model: str, text: Path, tmp_path: Path) -> None:
    """Its other way, which keeps the words, takes no zero points in groups."""
    pytest.importorskip("compressed_tensors")
    assert status("quantize", model, "-o", tmp_path, "--text", text, "--weights", weights, *SMALL) == 0
    unpacked = CompressedTensorsConfig(dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=unpacked).eval()
    for name, value in decompressed(tmp_path).items():  # the library multiplies codes and scales in bfloat16
        assert torch.equal(found.get_parameter(name), value.bfloat16().float()), name


def test_layers_are_rounded_on_what_rounded_layers_give(model: str, made: Path, text: Path) -> None:
    """The inputs of each layer's first products come from transformers' model whose layers before are rounded."""
    values, windows, plain = decompressed(made), windows_of(text), with_values(model, {})
    equal: list[float] = []
    for index in range(3):
        before = {name: value for name, value in values.items() if int(name.split(".")[2]) < index}
        names = [f"model.layers.{index}.self_attn.q_proj", f"model.layers.{index}.mlp.down_proj"]
        for name, x in inputs_of(with_values(model, before), names, windows).items():
            weight = plain.get_parameter(f"{name}.weight").detach()
            got = values[f"{name}.weight"]
            equal.append(float((round_with_feedback(weight, x.T @ x, 4).values() == got).float().mean()))
            ours, simple = ((x @ (weight - w).T).square().sum() for w in (got, nearest(weight, 4).values()))
            assert ours < simple
    assert min(equal) > 0.98, equal


BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
FAMILIES = {"llama": BIASES, "gemma2": TIED, "gemma3_text": TIED, "phi3": {}, "olmo2": {}}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, text: Path, tmp_path: Path) -> None:
    """Biases, norms between, scaled and tied embeddings, windows, projections in one: nearer to the model than what is
    rounded to nearest."""
    model = model_of(family, tmp_path / "model", **FAMILIES[family])
    assert status("quantize", model, "-o", tmp_path / "out", "--text", text, *SMALL) == 0
    plain, values = with_values(model, {}), decompressed(tmp_path / "out")
    simple = {name: nearest(plain.get_parameter(name).detach(), 4).values() for name in values}
    found = Reader("m", locate(str(tmp_path / "out"))).weights(torch.float32)()
    linears = [name for name, part in plain.named_modules() if isinstance(part, nn.Linear) and name != "lm_head"]
    assert {f"{name}.weight" for name in linears} == values.keys()
    with torch.no_grad():
        exact, ours, rough = (
            torch.cat([one(input_ids=window).logits.log_softmax(-1) for window in windows_of(text)])
            for one in (plain, found, with_values(model, simple))
        )
    ours_kl, rough_kl = ((exact.exp() * (exact - one)).sum(-1).mean() for one in (ours, rough))
    assert ours_kl < 0.9 * rough_kl
    assert status("generate", tmp_path / "out", "-p", "w5 w6", "--max-tokens", 2, "--kv-cache-dtype", "bf16") == 0


def test_layers_that_groups_do_not_divide_stay_in_16_bits(text: Path, tmp_path: Path) -> None:
    """And outputs need not fill the words of their zero points."""
    model = model_of("llama", tmp_path / "model", intermediate_size=100)
    assert status("quantize", model, "-o", tmp_path / "out", "--text", text, *SMALL) == 0
    values = decompressed(tmp_path / "out")
    assert len(values) == 18
    assert values["model.layers.0.mlp.up_proj.weight"].shape == (100, 64)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    packed = dict(packed_weights(load_model(str(tmp_path / "out")).model))
    for name, value in values.items():
        assert torch.equal(packed[name].unpack(torch.arange(len(value))), value), name


class Interrupted(Exception):
    pass


def broken_at(owner: Any, name: str, count: int, patch: pytest.MonkeyPatch) -> None:
    """The ``count``-th call fails."""
    own, calls = getattr(owner, name), list[int]()

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise Interrupted
        return own(*args, **kwargs)

    patch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "count", "again"),
    [
        (whole, "round_layer", 1, 3), (whole, "round_layer", 3, 1),
        (Parts, "put", 4, 2),  # a layer's tensors are kept, what it gives is not
        (whole, "write_shards", 1, 0),
    ],
)  # fmt: skip
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    owner: Any, name: str, count: int, again: int, model: str, text: Path, made: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = ("quantize", model, "-o", tmp_path / "out", "--text", text, *SMALL)
    with monkeypatch.context() as patch:
        broken_at(owner, name, count, patch)
        with pytest.raises(Interrupted):
            status(*command)
    assert not (tmp_path / "out" / "config.json").exists()
    layers, own = list[str](), whole.round_layer
    monkeypatch.setattr(whole, "round_layer", lambda *args: layers.append(args[1]) or own(*args))
    assert status(*command) == 0
    assert "going on with" in capsys.readouterr().err
    assert len(layers) == again
    for file in made.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (tmp_path / "out" / "unfinished").exists()


def test_without_a_text_the_model_writes_one(model: str, tmp_path: Path) -> None:
    assert status("quantize", model, "-o", tmp_path, *SMALL) == 0
    assert len(decompressed(tmp_path)) == 21


def test_many_tensors_are_spread_over_files(
    model: str, text: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbits.models.safetensors.pack.SHARD", 40_000)
    assert status("quantize", model, "-o", tmp_path, "--text", text, *SMALL) == 0
    files = sorted(tmp_path.glob("model*"))
    assert [file.name for file in files][-1] == "model.safetensors.index.json"
    assert len(files) > 2
    whole_file = load_file(made / "model.safetensors")
    spread = {name: tensor for file in files[:-1] for name, tensor in load_file(file).items()}
    assert spread.keys() == whole_file.keys()
    assert all(torch.equal(spread[name], tensor) for name, tensor in whole_file.items())
    assert len(dict(packed_weights(load_model(str(tmp_path)).model))) == 22


def test_mistakes_are_one_clear_line(
    model: str, text: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*options: object, source: object = model, words: object = text, out: Path = tmp_path / "new") -> str:
        return complaint(capsys, "quantize", source, "-o", out, "--text", words, *SMALL, *options)

    (tmp_path / "short.txt").write_text("w5 " * 300)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "novel.txt").write_text("Call me")
    assert "4 are needed" in wrong(words=tmp_path / "short.txt")
    assert "so at most as many tokens" in wrong("--windows", 99)
    assert "No such file" in wrong(words=tmp_path / "none.txt")
    assert "choose from int4, int8" in wrong("--weights", "int3")
    assert "over the 512 tokens" in wrong("--window", 1024)
    assert "it holds novel.txt" in wrong(out=tmp_path / "other")
    assert "cannot make the directory" in wrong(out=tmp_path / "short.txt")
    assert "cannot write to the directory '/proc'" in wrong(out=Path("/proc/new"))
    assert "quantized already (compressed-tensors)" in wrong(source=made)
    assert "is not empty" in wrong(source=model, out=made)
    for family, said in (("mixtral", "is a mixture of experts"), ("lfm2", "has no place for the states")):
        source = model_of(family, tmp_path / family)
        capsys.readouterr()
        assert said in wrong(source=source)
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_what_is_quantized_is_taken_when_asked(made: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--weights", "int8", "--allow-requantize", *SMALL)
    assert status("quantize", made, "-o", tmp_path, *options) == 0
    coarse, fine = decompressed(made), decompressed(tmp_path)
    for name, value in coarse.items():
        assert (fine[name] - value).abs().max() < value.abs().max() / 40, name


def test_parts_of_another_run_are_refused(
    model: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("quantize", model, "-o", tmp_path, "--text", text, *SMALL)
    with monkeypatch.context() as patch:
        broken_at(whole, "round_layer", 2, patch)
        with pytest.raises(Interrupted):
            status(*command)
    capsys.readouterr()
    said = status(*command, "--weights", "int8"), capsys.readouterr().err
    assert said[0] == 2
    assert "holds parts of another calibration (weights 'int4' and not 'int8')" in said[1]


def test_weights_that_are_not_finite_are_named(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    source = save(broken, tmp_path / "model")
    assert status("quantize", source, "-o", tmp_path / "out", "--text", text, *SMALL) == 2
    assert "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in capsys.readouterr().err
