"""What the cache options of other engines can say. One table an engine; no torch.

Sources, read in November 2026: vLLM 0.33 ``vllm/config/cache.py`` (``CacheDType``), its page "Quantized KV Cache", and
``TurboQuantConfig.get_boundary_skip_layers`` for ``edges``; SGLang 0.5.23 ``sglang/srt/arg_groups/fields/model.py``;
LMDeploy 0.18 ``lmdeploy/messages.py`` (``QuantPolicy``); llama.cpp ``common/arg.cpp`` (``-ctk``, ``-ctv``); the
properties of OpenVINO 2026.4's CPU plug-in. tests/test_export_choices.py compares with what is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CacheDtype:
    """One way to store keys and values: bits per element of each, and how the engine names it.

    ``what`` describes the codes; ``needs`` what must be there for it (``""``: nothing). ``edges``: so many layers at
    either end stay in 16 bits whether asked for or not.
    """

    name: str
    key_bits: float
    value_bits: float
    what: str
    needs: str = ""
    edges: int = 0


@dataclass(frozen=True)
class Side:
    """A way to store one of keys and values, where an engine lets them differ freely."""

    name: str
    bits: float
    what: str


@dataclass(frozen=True)
class Engine:
    """An engine's options.

    ``dtypes`` are the choices for all layers together; ``sides`` the choices for keys and for values apart (then
    ``dtypes`` is empty). ``skips_layers``: single layers can stay in 16 bits. ``keys_by_channel``: what makes scales of
    keys channel by channel. ``never`` are the engine's other choices, which no translation gives, with the reason.
    """

    name: str
    title: str
    dtypes: tuple[CacheDtype, ...] = ()
    sides: tuple[Side, ...] = ()
    skips_layers: bool = False
    keys_by_channel: tuple[str, str] | None = None
    never: Mapping[str, str] = field(default_factory=dict)


_TURBO = "a head size and a GPU that TurboQuant takes"
_SCALES = "calibrated scales in the checkpoint (kvbits export --to compressed-tensors), else every scale is 1"
_SGLANG_SCALES = "--quantization-param-path with calibrated scales (kvbits export), else every scale is 1"

_SAME_16 = "the model's dtype, as auto"
_LATENT = "latent attention only"
_ROCM = "a few AMD GPUs only"

VLLM = Engine(
    "vllm",
    "vLLM",
    dtypes=(
        CacheDtype("auto", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("fp8", 8, 8, "float8 e4m3, one scale per tensor or head", _SCALES),
        CacheDtype("int8_per_token_head", 8, 8, "8-bit integers, one scale per token and head", "the Triton backend"),
        CacheDtype("turboquant_k8v4", 8, 4, "keys float8 e4m3, values 4 bit", _TURBO, edges=2),
        CacheDtype("int4_per_token_head", 4, 4, "4-bit codes, one scale per token and head", "the Triton backend"),
        CacheDtype("turboquant_4bit_nc", 4, 4, "4 bit, rotated", _TURBO, edges=2),
        CacheDtype("nvfp4", 4, 4, "float4 e2m1 in blocks of 16 with float8 scales", "a GPU with FP4 (Blackwell)"),
        CacheDtype("turboquant_k3v4_nc", 3, 4, "keys 3 bit, values 4 bit, rotated", _TURBO, edges=2),
        CacheDtype("turboquant_3bit_nc", 3, 3, "3 bit, rotated", _TURBO, edges=2),
    ),
    skips_layers=True,
    never={
        "float16": _SAME_16,
        "bfloat16": _SAME_16,
        "fp8_e4m3": "the same as fp8",
        "fp8_e5m2": "coarser than fp8, in as many bytes",
        "fp8_per_token_head": "as many bits as fp8, and more scales",
        "fp8_inc": "Gaudi only",
        "fp8_ds_mla": _LATENT,
        "nvfp4_ds_mla": _LATENT,
        "nvfp4_4over6": "nvfp4, its scales chosen by search",
        "octave_k3v4": _ROCM,
        "octave_k3v3": _ROCM,
        "octave_k3v3_compact": _ROCM,
        "ultraquant_4bit": _ROCM,
    },
)
SGLANG = Engine(
    "sglang",
    "SGLang",
    dtypes=(
        CacheDtype("auto", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("fp8_e4m3", 8, 8, "float8 e4m3, one scale per layer", _SGLANG_SCALES),
        CacheDtype("nvfp4", 4, 4, "float4 e2m1 in blocks of 16 with float8 scales", "a GPU with FP4 (Blackwell)"),
    ),
    never={
        "bf16": _SAME_16,
        "bfloat16": _SAME_16,
        "fp8_e5m2": "coarser than fp8_e4m3, in as many bytes",
        "mxfp8": "one attention backend only",
        "fp4_mx_block16": "nvfp4 with coarser scales",
    },
)
LMDEPLOY = Engine(
    "lmdeploy",
    "LMDeploy",
    dtypes=(
        CacheDtype("0", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("8", 8, 8, "8-bit integers, asymmetric, per token and head"),
        CacheDtype("4", 4, 4, "4-bit integers, asymmetric, per token and head"),
        CacheDtype("42", 4, 2, "TurboQuant: keys 4 bit, values 2 bit, rotated", "the PyTorch engine"),
    ),
    never={
        "16": "float8 e4m3 with one scale per tensor, where 8 has one per token and head",
        "17": "float8 e5m2, coarser than 16",
    },
)
LLAMA_CPP = Engine(
    "llama.cpp",
    "llama.cpp",
    sides=(
        Side("f16", 16, "float16"),
        Side("q8_0", 8, "8-bit integers in blocks of 32 (8.5 bits stored)"),
        Side("q5_1", 5.5, "5-bit integers with a zero point in blocks of 32 (6 bits stored)"),
        Side("q5_0", 5, "5-bit integers in blocks of 32 (5.5 bits stored)"),
        Side("q4_0", 4, "4-bit integers in blocks of 32 (4.5 bits stored)"),
    ),
)
OPENVINO = Engine(
    "openvino",
    "OpenVINO GenAI",
    sides=(
        Side("f16", 16, "float16"),
        Side("u8", 8, "8-bit integers, asymmetric, in groups"),
        Side("u4", 4, "4-bit integers, asymmetric, in groups"),
    ),
    keys_by_channel=("KEY_CACHE_QUANT_MODE", "BY_CHANNEL"),
    never={
        "f32": "more than 16 bits",
        "bf16": "as many bits as f16",
        "i8": "keys only, for one attention kernel",
        "u3": "needs KEY_CACHE_QUANT_ALG and VALUE_CACHE_QUANT_ALG TURBO, without batching",
    },
)
ENGINES: dict[str, Engine] = {e.name: e for e in (VLLM, SGLANG, LMDEPLOY, LLAMA_CPP, OPENVINO)}
"""Every engine that :func:`kvbits.export.flags.translate` knows."""
