"""A policy in other engines' options: what is exact, what is nearest, and that nothing lost goes unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.cli.main import run
from kvbits.codecs import parse_policy
from kvbits.errors import ConfigError
from kvbits.export.engines import ENGINES
from kvbits.export.flags import Translation, translate

WINDOW = "the newest tokens are not kept in 16 bit until their page is full"
PER_CHANNEL = "scales of keys are not per channel of a page"


def of(dtype: str, engine: str, layers: int = 32) -> Translation:
    return translate(parse_policy(dtype, layers), engine)


@pytest.mark.parametrize(
    ("dtype", "engine", "arguments"),
    [
        ("bf16", "vllm", ("--kv-cache-dtype", "auto")),
        ("int8", "vllm", ("--kv-cache-dtype", "fp8")),
        ("int4", "vllm", ("--kv-cache-dtype", "int4_per_token_head")),
        ("int8,int4", "vllm", ("--kv-cache-dtype", "turboquant_k8v4")),
        ("int8", "sglang", ("--kv-cache-dtype", "fp8_e4m3")),
        ("int4", "sglang", ("--kv-cache-dtype", "nvfp4")),
        ("int8", "lmdeploy", ("--quant-policy", "8")),
        ("int4", "lmdeploy", ("--quant-policy", "4")),
        ("int4,int2", "lmdeploy", ("--quant-policy", "42")),
        ("bf16", "lmdeploy", ("--quant-policy", "0")),
        ("int8,int4", "llama.cpp", ("-ctk", "q8_0", "-ctv", "q4_0", "-fa", "on")),
        ("bf16", "llama.cpp", ("-ctk", "f16", "-ctv", "f16")),
        ("int8,bf16", "llama.cpp", ("-ctk", "q8_0", "-ctv", "f16")),
    ],
)
def test_what_each_engine_is_told(dtype: str, engine: str, arguments: tuple[str, ...]) -> None:
    assert of(dtype, engine).arguments == arguments


def test_openvino_is_configured_by_properties() -> None:
    found = of("int8,int4", "openvino")
    assert found.config == {"KEY_CACHE_PRECISION": "u8", "VALUE_CACHE_PRECISION": "u4"}
    assert found.arguments == ()
    assert PER_CHANNEL not in found.lost
    per_channel = of("int4", "openvino")
    assert per_channel.config == {
        "KEY_CACHE_PRECISION": "u4",
        "VALUE_CACHE_PRECISION": "u4",
        "KEY_CACHE_QUANT_MODE": "BY_CHANNEL",
    }
    assert PER_CHANNEL not in per_channel.lost


def test_vllm_leaves_single_layers_in_16_bit() -> None:
    found = of("0-1:bf16,2-29:int8,30:bf16,31:int8", "vllm")
    assert found.arguments == ("--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0", "1", "30")
    assert found.lost == (WINDOW,)
    # an engine that cannot says which layers differ, and how
    other = of("0-1:bf16,2-29:int8,30:bf16,31:int8", "lmdeploy")
    assert other.arguments == ("--quant-policy", "8")
    assert other.lost[:2] == (
        "keys of layers 0-1, 30 have 16 bits in the policy and 8 here",
        "values of layers 0-1, 30 have 16 bits in the policy and 8 here",
    )


def test_layers_that_an_engine_keeps_in_16_bit_by_itself_are_named() -> None:
    found = of("int8,int4", "vllm")
    assert found.arguments == ("--kv-cache-dtype", "turboquant_k8v4")
    assert found.lost[0] == "keys of layers 0-1, 30-31 have 8 bits in the policy and 16 here"
    assert (found.key_bits, found.value_bits) == (9.0, 5.5)


def test_fewer_bits_than_asked_for_are_the_last_choice() -> None:
    """A bit too few counts three times a bit too many."""
    mostly = of("0-27:int4,28-31:int8/int4", "lmdeploy")
    assert mostly.arguments == ("--quant-policy", "4")
    assert "keys of layers 28-31 have 8 bits in the policy and 4 here" in mostly.lost
    half = of("0-15:int4,16-31:int8/int4", "llama.cpp")
    assert half.arguments[:4] == ("-ctk", "q8_0", "-ctv", "q4_0")


def test_what_no_option_can_say_is_said() -> None:
    policy = parse_policy("int4+sink:int8", 8)
    for engine in ENGINES:
        lost = translate(policy, engine, calibrated=True).lost
        assert any("first page" in sentence and "int8" in sentence for sentence in lost)
        assert any("calibrated rounding" in sentence for sentence in lost)
        assert WINDOW in lost
        assert (PER_CHANNEL in lost) == (engine != "openvino")


@given(st.lists(st.sampled_from(["bf16", "int8", "int6/int4", "int4", "int3", "int8/int2"]), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_every_difference_is_named(layers: list[str]) -> None:
    """Bits that the translation really uses, rebuilt from its sentences and its means."""
    policy = parse_policy(",".join(f"{i}:{name}" for i, name in enumerate(layers)), len(layers))
    for engine in ENGINES:
        found = translate(policy, engine)
        for what, mean, codecs in (
            ("keys", found.key_bits, [s.key for s in policy.layers]),
            ("values", found.value_bits, [s.value for s in policy.layers]),
        ):
            wanted = [float(getattr(c, "bits", 16)) for c in codecs]
            sentences = [s for s in found.lost if s.startswith(f"{what} of ")]
            for sentence in sentences:
                head, _, tail = sentence.partition(" have ")
                here = float(tail.split(" and ")[1].split()[0])
                named = range(len(layers)) if "all layers" in head else _numbers(head.split(maxsplit=3)[3])
                for layer in named:
                    assert wanted[layer] == float(tail.split()[0])
                    wanted[layer] = here
            assert sum(wanted) / len(wanted) == pytest.approx(mean)


def _numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'vlm'; choose from vllm, sglang"):
        of("int4", "vlm")


def test_the_command_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "flags.json"
    with pytest.raises(SystemExit) as caught:
        run(["export", "llama-3.1-8b", "--to", "flags", "--kv-cache-dtype", "int4", "--json", str(out)])
    assert caught.value.code == 0
    document = json.loads(out.read_text())
    assert [e["engine"] for e in document["engines"]] == list(ENGINES)
    shown = capsys.readouterr().out
    assert "vLLM: --kv-cache-dtype int4_per_token_head" in shown
    assert "lost: " + PER_CHANNEL in shown
