"""What the cache options of other engines can say. One table an engine; no torch.

Sources, read in November 2026: vLLM ``vllm/config/cache.py`` (``CacheDType``), its page "Quantized KV Cache", and
``TurboQuantConfig.get_boundary_skip_layers`` for ``edges``; SGLang's page "Quantized KV Cache"; LMDeploy
``docs/en/quantization/kv_quant.md``; llama.cpp ``common/arg.cpp`` (``-ctk``, ``-ctv``); OpenVINO's properties
``KEY_CACHE_PRECISION`` and ``VALUE_CACHE_PRECISION``.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    ``dtypes`` is empty). ``skips_layers``: single layers can stay in 16 bits.
    """

    name: str
    title: str
    dtypes: tuple[CacheDtype, ...] = ()
    sides: tuple[Side, ...] = ()
    skips_layers: bool = False


_TURBO = "a head size and a GPU that TurboQuant takes"
_SCALES = "calibrated scales in the checkpoint (kvbits export --to compressed-tensors), else every scale is 1"
_SGLANG_SCALES = "--quantization-param-path with calibrated scales (kvbits export), else every scale is 1"

VLLM = Engine(
    "vllm",
    "vLLM",
    dtypes=(
        CacheDtype("auto", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("fp8", 8, 8, "float8 e4m3, one scale per tensor or head", _SCALES),
        CacheDtype("int8_per_token_head", 8, 8, "8-bit integers, one scale per token and head", "the Triton backend"),
        CacheDtype("turboquant_k8v4", 8, 4, "keys float8 e4m3, values 4 bit", _TURBO, edges=2),
        CacheDtype("int4_per_token_head", 4, 4, "4-bit codes, one scale per token and head", "the Triton backend"),
        CacheDtype("turboquant_k3v4_nc", 3, 4, "keys 3 bit, values 4 bit, rotated", _TURBO, edges=2),
        CacheDtype("turboquant_3bit_nc", 3, 3, "3 bit, rotated", _TURBO, edges=2),
    ),
    skips_layers=True,
)
SGLANG = Engine(
    "sglang",
    "SGLang",
    dtypes=(
        CacheDtype("auto", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("fp8_e4m3", 8, 8, "float8 e4m3, one scale per layer", _SGLANG_SCALES),
        CacheDtype("fp4_e2m1", 4, 4, "float4 e2m1 in blocks with a scale", "a GPU with FP4 (Blackwell)"),
    ),
)
LMDEPLOY = Engine(
    "lmdeploy",
    "LMDeploy",
    dtypes=(
        CacheDtype("0", 16, 16, "the model's own 16-bit dtype"),
        CacheDtype("8", 8, 8, "8-bit integers, asymmetric, per token and head"),
        CacheDtype("4", 4, 4, "4-bit integers, asymmetric, per token and head"),
    ),
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
)
ENGINES: dict[str, Engine] = {e.name: e for e in (VLLM, SGLANG, LMDEPLOY, LLAMA_CPP, OPENVINO)}
"""Every engine that :func:`kvbits.export.flags.translate` knows."""
