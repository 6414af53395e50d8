"""``kvbits plan``: what fits a memory, before anything is bought or started."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbits.cli import options
from kvbits.cli.extras import require
from kvbits.cli.output import JsonFile, writable
from kvbits.cli.session import Bar
from kvbits.config import AUTO
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.planning.facts import ModelFacts
    from kvbits.planning.hf_config import MLA
    from kvbits.planning.request import Options, Planned
    from kvbits.planning.traffic import Run

GIB = 1 << 30


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="A model of the tables (llama-3.1-8b, qwen3-32b, deepseek-v3, ...; 'list' shows them), a config.json, "
            "or a model as for generate.",
        ),
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of one device: weights, workspace, cache.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE|SIZE",
            help="auto, bf16, int8, int4, awq, fp8, mxfp4, ... or bytes. Default: as the model's files are held.",
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(metavar="TOKENS", help="Tokens of a session; repeat for several. Default: the model's context."),
    ] = None,
    kv_cache_dtype: options.KVCacheDtypes = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option("--policy", "--kv-policy", metavar="DIR", help="A calibrated policy; repeat for several."),
    ] = None,
    state_dtype: options.StateDtype = AUTO,
    workspace: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes of a step's activations. Default: an estimate.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(metavar="N", help="Devices that share the model.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="The model's context, where rope scaling changes it.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(metavar="N", help="Most sequences at once. Default: no limit; 256 with --trace.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, metavar="TOKENS", help="Token budget of a step.")
    ] = 2048,
    disable_mla: options.DisableMLA = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requests to simulate: Mooncake JSON lines or Azure CSV.")
    ] = None,
    load: Annotated[
        list[float] | None, typer.Option(metavar="X", help="With --trace: arrivals X times as dense; repeat.")
    ] = None,
    trace_requests: Annotated[
        int | None, typer.Option(metavar="N", help="With --trace: only its first N requests.")
    ] = None,
    bandwidth: Annotated[
        str, typer.Option(metavar="SIZE", help="With --trace: bytes a second that a device reads from its memory.")
    ] = "2.7TB",
    tflops: Annotated[
        float, typer.Option(metavar="X", help="With --trace: 10^12 operations a second that a device reaches.")
    ] = 400.0,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Sessions against context, PNG or SVG.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json_file: options.JsonFile = None,
) -> None:
    """Plan sessions and context for every cache dtype, from a model's configuration alone.

    Sizes are exact and are those of the engine's own pool. With --trace, a discrete-event simulation says how many
    requests wait or are preempted; its step times come from --bandwidth and --tflops (by default four fifths of an
    H100's bandwidth and two fifths of its dense 16-bit peak).
    """
    from kvbits.planning.facts import known_models

    if model == "list":
        print("\n".join(known_models()))
        return
    if memory is None:
        raise ConfigError("there is no memory to plan; give --memory SIZE")
    results = JsonFile(json_file)
    if picture is not None:
        require("plot")
        _check_picture(picture)
    from kvbits.codecs.names import parse_names
    from kvbits.config import WATERMARK, check_state_dtype, parse_bytes

    check_state_dtype(state_dtype)
    for size in (memory, workspace, bandwidth):
        if size is not None:
            parse_bytes(size)
    for name in kv_cache_dtype or ():
        parse_names(name, None)
    from kvbits.planning.request import Options, make_plan

    facts = _facts(model, "expanded" if disable_mla else "latent", trust_remote_code)
    asked = Options(
        memory=memory,
        weights=weights or facts.weights,
        contexts=tuple(context or ()),
        dtypes=tuple(kv_cache_dtype or ()),
        policies=tuple(policy or ()),
        state_dtype=state_dtype,
        workspace=workspace,
        ranks=tensor_parallel_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        watermark=WATERMARK,
    )
    planned = make_plan(facts, asked)
    _print(planned, facts, asked)
    document = {
        **planned.plan.as_json(),
        "weights": asked.weights,
        "left_out": planned.left_out,
        "source": facts.source,
        "parameters": facts.parameters.total,
        "tensor_parallel_size": tensor_parallel_size,
        "mla": "latent" if facts.geometry.latent else "expanded" if disable_mla or facts.geometry.expanded else None,
    }
    for scheme, swept in zip(document["schemes"], planned.swept.schemes, strict=True):
        scheme["range"] = [{"context": c.context, "sessions": c.sessions} for c in swept.contexts]
    if picture is not None:
        from kvbits.planning.picture import draw

        draw(planned.swept, picture)
    if trace is not None:
        from kvbits.planning.traffic import Traffic

        traffic = Traffic.read(trace, trace_requests, tuple(load or (1.0,)), bandwidth, tflops)
        count = len(traffic.arrivals) * len(traffic.loads) * len(planned.policies)
        with Bar(count, "simulating", "request") as advance:
            runs = list(traffic.run(facts, planned, asked, advance))
        _print_runs(runs, len(traffic.arrivals))
        document["trace"] = {**traffic.as_json(), "runs": [run.as_json() for run in runs]}
    results.write(document)


def _facts(model: str, mla: MLA, trusted: bool) -> ModelFacts:
    """From the tables without loading transformers, where they have the model and its files are not here."""
    from kvbits.models.locate import is_packaged
    from kvbits.planning.facts import known_facts

    known = None if is_packaged(model) else known_facts(model, mla)
    if known is not None:
        return known
    from kvbits.models.lean import lean

    with nullcontext() if trusted else lean():
        from kvbits.models.facts import facts_of_model

        return facts_of_model(model, mla, trusted)


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"the picture '{path}' is none of .png, .svg, .pdf")
    writable(path)


def _together(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by reason."""
    found: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        found.setdefault(reason, []).append(name)
    return found


def _print(planned: Planned, facts: ModelFacts, options: Options) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console, made = Console(), planned.plan
    each = f", on each of {options.ranks} devices" if options.ranks > 1 else ""
    console.print(
        f"{made.model}{each}: {_gib(made.memory_bytes)} = {_gib(made.weights_bytes)} weights ({options.weights}) + "
        f"{_gib(made.workspace_bytes)} workspace + {_gib(made.cache_bytes)} cache",
        highlight=False,
    )
    windowed = any(c.windowed_sessions is not None for s in made.schemes for c in s.contexts)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = ["KV cache", "bits", "KV bytes\na token", "context", "sessions", "open\npages", "fills\nfirst", "x 16\nbit",
             "longest\ncontext"]  # fmt: skip
    for name in [*names, "ideal"] if windowed else names:
        table.add_column(name, justify="left" if name in ("KV cache", "fills\nfirst") else "right")
    for scheme in made.schemes:
        for c in scheme.contexts:
            table.add_row(
                scheme.dtype,
                f"{scheme.bits_per_element:.2f}",
                f"{scheme.kv_bytes_per_token:,.0f}",
                f"{c.context:,}",
                f"{c.running:,}",
                f"{100 * c.open_bytes / c.session_bytes:.1f} %",
                c.fills_first,
                f"{c.gain_over_16bit:.2f}",
                f"{scheme.longest_context:,}" + (" *" if scheme.limited_by == "model" else "  "),
                *([f"{c.windowed_sessions:,}"] if c.windowed_sessions is not None else []),
            )
    console.print(table)
    for reason, names in _together(planned.left_out).items():
        print(f"Left out: {', '.join(names)}: {reason}.")
    if any(scheme.limited_by == "model" for scheme in made.schemes):
        print("* the model's own limit; memory would hold more.")
    if windowed:
        print(
            "Pages that have left a sliding window are given back (on GPUs kvbits keeps them). Ideal: sessions without "
            "the padding of layer groups to frames of one size."
        )
    if made.state_bytes:
        from kvbits.memory import show

        print(
            f"Recurrent layers keep {show(made.state_bytes)} of each session, whatever its length, "
            "and at least as much for prompts that begin alike: counted."
        )
    if facts.geometry.latent:
        print("The cache is the latents of multi-head latent attention; on GPUs it is that of --disable-mla.")
    if facts.geometry.expanded:
        print(f"The cache is every head's keys and values, not latents: {facts.geometry.expanded}.")


def _print_runs(runs: list[Run], requests: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{requests:,} requests", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("KV cache")
    names = (
        "load",
        "waited\n> 1 s",
        "wait, s\np50 / p99",
        "preempted",
        "refused",
        "running",
        "pool\nuse",
        "prefix\nhits",
    )
    for name in (*names, "first token, s\np50 / p99", "tokens/s"):
        table.add_column(name, justify="right")
    for run in runs:
        r = run.outcome.as_json()
        table.add_row(
            run.dtype,
            f"{run.load:g}",
            f"{r['waited']:,}",
            f"{r['wait_p50_s']:,.1f} / {r['wait_p99_s']:,.1f}",
            f"{r['preempted']:,}",
            f"{r['refused']:,}",
            f"{r['mean_running']:,.0f}",
            f"{100 * r['mean_use']:.0f} %",
            f"{100 * r['prefix_hit_share']:.1f} %",
            f"{r['first_token_p50_s']:,.1f} / {r['first_token_p99_s']:,.1f}",
            f"{r['answer_tokens_per_s']:,.0f}",
        )
    Console().print(table)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
