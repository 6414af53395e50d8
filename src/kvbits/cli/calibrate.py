"""``kvbits calibrate``: fit a cache policy to a model and a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import can_be_folder, folder
from kvbits.cli.session import Bar, load, note, tokens_of

if TYPE_CHECKING:
    from kvbits.codecs import Policy
    from kvbits.config import ModelGeometry
    from kvbits.evaluation.compare import Comparison


def calibrate(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the policy goes.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A UTF-8 text; repeat for several. Without any, the model writes its own."),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(metavar="B", help="Bits per element of sealed pages, all counted.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="K", help="Fewest bits whose measured KL, in nats a token, is at most K.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--kv-cache-memory",
            "--memory",
            metavar="SIZE",
            help="Bytes in which --sessions of --session-tokens must fit.",
        ),
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, metavar="N", help="With --kv-cache-memory.")] = 1,
    session_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="With --kv-cache-memory.")] = 4096,
    sink: Annotated[
        str, typer.Option(metavar="DTYPE", help="Every sequence's first page; 'none': as the rest.")
    ] = "int8",
    window: Annotated[
        int, typer.Option("--window", "--context", min=4, metavar="TOKENS", help="Tokens of one window.")
    ] = 2048,
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows to calibrate on, all over the text.")] = 8,
    check_windows: Annotated[int, typer.Option(min=1, metavar="N", help="Other windows, to measure the result.")] = 2,
    disable_mla: options.DisableMLA = False,
    weights: options.Weights = "auto",
    device: options.Device = "cpu",
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Learn how to round, measure what each layer's keys and values can bear, and give them bits accordingly.

    The result is checked through the real kernels on windows it was not fitted to, and written to DIR; use it with
    --kv-policy DIR. Interrupted, the same command goes on where it was: finished parts are kept in DIR/unfinished.
    """
    begin = time.perf_counter()
    from kvbits.calibration.goal import Goal, Sizes
    from kvbits.config import parse_bytes
    from kvbits.engine.precheck import check_geometry, check_model, check_no_states
    from kvbits.evaluation.windows import check_text, read_text

    goal = Goal(bits, max_kl, None if memory is None else parse_bytes(memory), sessions, session_tokens)
    sizes = Sizes(window, windows, check_windows)
    contents = [(path.name, read_text(path)) for path in text or ()]
    can_be_folder(output)
    outline = check_model(
        model, [] if sink == "none" else [sink], dtype="float32", weights=weights, device=device, context=window
    )
    check_no_states(outline, "calibration")
    if contents:
        check_text([content for _, content in contents], window, windows + check_windows)
    if outline.geometry is not None:
        from kvbits.calibration.policy import check_goal

        check_goal(outline.geometry, goal, None if sink == "none" else sink)

    def check(geometry: ModelGeometry, config: Any) -> None:
        from kvbits.calibration.layerwise import check_layers
        from kvbits.calibration.policy import check_goal

        check_layers(geometry, config)
        check_geometry(geometry, [] if sink == "none" else [sink], context=window)
        check_goal(geometry, goal, None if sink == "none" else sink)

    from kvbits.calibration.output import UNFINISHED
    from kvbits.calibration.run import calibrate as run

    loaded = load(
        model,
        "float32",
        threads,
        weights,
        device,
        trust_remote_code,
        max_model_len=window,
        disable_mla=disable_mla,
        check=check,
    )
    folder(output)
    texts = [(name, tokens_of(loaded, content)) for name, content in contents]
    try:
        policy, found = run(loaded, texts, output, goal, None if sink == "none" else sink, sizes, Bar, note)
    except KeyboardInterrupt:
        note(f"what is finished is kept in '{output / UNFINISHED}'; the same command goes on from there")
        raise
    from kvbits.auto.loss import OWN_TEXT
    from kvbits.auto.record import remember_policy

    remember_policy(loaded, policy, found, ", ".join(name for name, _ in contents) or OWN_TEXT, note)
    _print(policy, found)
    print(f"policy: {output}\n{time.perf_counter() - begin:.0f} s in all")


def _print(policy: Policy, found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{found.bits_per_element:.3f} bits per element")
    for name in ("layer", "keys", "values"):
        table.add_column(name, justify="right")
    for index, scheme in enumerate(policy.layers):
        table.add_row(str(index), scheme.key.name, scheme.value.name)
    Console().print(table)
    s = found.summary
    print(
        f"checked on {found.windows} windows: KL {s.kl_mean:.2g}, perplexity {s.perplexity:.3f} "
        f"({100 * (s.perplexity / s.perplexity_16bit - 1):+.2f} %), same top token {100 * s.top1_agreement:.1f} %"
    )
