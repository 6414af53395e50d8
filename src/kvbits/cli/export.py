"""``kvbits export``: calibrated scales and policies for other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import JsonFile, can_be_folder, folder
from kvbits.cli.session import Bar, load, note, tokens_of
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.config import ModelGeometry
    from kvbits.export.checkpoint import Layout
    from kvbits.export.flags import Translation
    from kvbits.export.scales import Granularity, LayerScales

_LAYOUTS: dict[str, Layout] = {"compressed-tensors": "compressed-tensors", "modelopt": "modelopt"}
_TARGETS = (*_LAYOUTS, "flags")


def export(
    model: options.Model,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="'compressed-tensors' (vLLM, SGLang) or 'modelopt' (TensorRT-LLM): a checkpoint with calibrated FP8 "
            "scales; 'flags': a policy in other engines' options.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where the checkpoint goes.")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A UTF-8 text to calibrate on; repeat for several.")
    ] = None,
    per: Annotated[
        str, typer.Option(metavar="WHAT", help="One scale per 'tensor' or per 'head' of a layer.")
    ] = "tensor",
    window: Annotated[
        int, typer.Option("--window", "--context", min=4, metavar="TOKENS", help="Tokens of one window.")
    ] = 2048,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows, spread over the text.")] = 4,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="With --to flags: as for generate.")
    ] = None,
    kv_policy: options.KVPolicy = None,
    engine: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --to flags: only this engine; repeat.")
    ] = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Write FP8 scales as other engines load them, or say a policy in their options.

    What an engine cannot express is said plainly.
    """
    if to not in _TARGETS:
        raise ConfigError(f"--to is '{to}'; choose from {', '.join(_TARGETS)}")
    results = JsonFile(json_file)
    if to == "flags":
        if kv_cache_dtype is not None:
            from kvbits.codecs.names import parse_names

            parse_names(kv_cache_dtype, None)
        results.write(_flags(model, kv_cache_dtype, kv_policy, engine, trust_remote_code))
        return
    if per not in ("tensor", "head"):
        raise ConfigError(f"--per is '{per}'; choose from tensor, head")
    if to == "modelopt" and per == "head":
        raise ConfigError("the modelopt layout holds one scale per tensor; --per head needs --to compressed-tensors")
    if output is None or not text:
        raise ConfigError(f"--to {to} needs --text FILE to calibrate on and --output DIR")
    from kvbits.engine.precheck import check_model, check_no_states
    from kvbits.evaluation.windows import read_text

    texts = [(path.name, read_text(path)) for path in text]
    outline = check_model(model, dtype="float32", context=window)
    check_no_states(outline, f"export to {to}")
    granularity: Granularity = "head" if per == "head" else "tensor"
    report = _checkpoint(model, _LAYOUTS[to], granularity, output, texts, window, windows, threads, trust_remote_code)
    results.write(report)


def _checkpoint(
    model: str,
    layout: Layout,
    granularity: Granularity,
    output: Path,
    texts: list[tuple[str, str]],
    context: int,
    windows: int,
    threads: int | None,
    trusted: bool,
) -> dict[str, Any]:
    from kvbits.engine.precheck import check_geometry
    from kvbits.evaluation.windows import check_text

    check_text([content for _, content in texts], context, windows + 1)
    can_be_folder(output)
    from kvbits import __version__
    from kvbits.calibration.texts import split_windows
    from kvbits.export.checkpoint import add_scales
    from kvbits.export.scales import collect_scales
    from kvbits.models.checkpoint import attention_modules, write_checkpoint
    from kvbits.models.held import blank

    modules: list[str] = []

    def check(geometry: ModelGeometry, config: Any) -> None:
        geometry.refuse_states("export of scales")
        geometry.refuse_chunks("export of scales")
        check_geometry(geometry, context=context)
        modules.extend(attention_modules(blank(config), geometry))

    loaded = load(model, "float32", threads, trust_remote_code=trusted, max_model_len=context, check=check)
    folder(output)
    # no windows are kept for a check: the errors are those of the calibration text itself
    parts, _ = split_windows([tokens_of(loaded, content) for _, content in texts], context, windows, 1)
    with Bar(context * windows, "calibrating") as advance:
        layers = collect_scales(loaded, parts, granularity, advance)
    note(f"Writing {output} ...")
    write_checkpoint(model, output, trusted)
    report = {
        "model": loaded.name,
        "layout": layout,
        "per": granularity,
        "texts": [name for name, _ in texts],
        "windows": windows,
        "context": context,
        "layers": [layer.as_json() for layer in layers],
    }
    add_scales(output, layers, modules, layout, granularity, __version__, report)
    _print_scales(layers)
    _print_use(layout, granularity, output)
    return report


def _print_scales(layers: list[LayerScales]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Relative error of keys and values in float8 e4m3, with these scales (with scale 1)")
    for name in ("layer", "k_scale", "keys", "v_scale", "values"):
        table.add_column(name, justify="right")
    for index, layer in enumerate(layers):
        table.add_row(
            str(index),
            ", ".join(f"{x:.4g}" for x in layer.key.tolist()),
            f"{100 * layer.key_error:.2f} % ({100 * layer.key_error_at_one:.2f} %)",
            ", ".join(f"{x:.4g}" for x in layer.value.tolist()),
            f"{100 * layer.value_error:.2f} % ({100 * layer.value_error_at_one:.2f} %)",
        )
    Console().print(table)


def _print_use(layout: Layout, granularity: Granularity, output: Path) -> None:
    if layout == "modelopt":
        print(f"trtllm-serve {output}")
        return
    print(f"vllm serve {output} --kv-cache-dtype fp8")
    if granularity == "tensor":
        print(
            f"python -m sglang.launch_server --model-path {output} --kv-cache-dtype fp8_e4m3 "
            f"--quantization-param-path {output}/sglang-kv-scales.json"
        )


def _flags(
    model: str, dtype: str | None, policy: Path | None, engines: list[str] | None, trusted: bool
) -> dict[str, Any]:
    if (dtype is None) == (policy is None):
        raise ConfigError("--to flags needs a policy to translate: --kv-cache-dtype DTYPE or --kv-policy DIR")
    from kvbits.codecs import policy_of
    from kvbits.config import POLICY_PREFIX
    from kvbits.export.engines import ENGINES
    from kvbits.export.flags import translate
    from kvbits.models.facts import facts_of_model

    geometry = facts_of_model(model, "expanded", trusted).geometry
    chosen = policy_of(f"{POLICY_PREFIX}{policy}" if dtype is None else dtype, geometry, None)
    found = [translate(chosen, name, policy is not None, geometry.places) for name in engines or ENGINES]
    for translation in found:
        _print_translation(translation)
    return {"model": geometry.name, "policy": chosen.name, "engines": [t.as_json() for t in found]}


def _print_translation(t: Translation) -> None:
    print(f"{t.title}: {' '.join(t.arguments) or json.dumps(t.config)}")
    print(f"  {t.what}")
    if t.needs:
        print(f"  needs {t.needs}")
    for sentence in t.lost:
        print(f"  lost: {sentence}")
