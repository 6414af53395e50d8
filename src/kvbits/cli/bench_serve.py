"""``kvbits bench-serve``: replay a trace against any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.extras import require
from kvbits.cli.keys import client_key
from kvbits.cli.output import JsonFile, writable
from kvbits.cli.session import note
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.replay.run import LoadShape, Outcome, Prompt
    from kvbits.replay.target import Target
    from kvbits.replay.trace import TraceRequest


def bench_serve(
    dataset_path: Annotated[
        Path,
        typer.Option(
            "--dataset-path",
            "--trace",
            metavar="FILE",
            help="Mooncake trace (.jsonl), Azure LLM trace (.csv), or prompts (.json, .jsonl).",
        ),
    ],
    base_url: Annotated[str, typer.Option(metavar="URL", help="The server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the first that the server names.")] = None,
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="The server's key.")] = None,
    api_key_file: options.ApiKeyFile = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text that a trace's prompts are cut from. Default: Python's reference."),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N requests that fit.")
    ] = None,
    speed: Annotated[
        float, typer.Option(metavar="X", help="Times as fast as the trace; 'inf' sends all at once.")
    ] = 1.0,
    request_rate: Annotated[
        float | None, typer.Option(metavar="R", help="Requests a second at random times, instead of the trace's.")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most requests that are open at once.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut longer answers; the length of those that have none.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Leave out longer requests. Default: what the server names.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers have exactly the trace's length.")] = True,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Limit that a good request keeps: ttft, tpot or e2el; may repeat."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Of one request.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of --request-rate's times.")] = 0,
    json_file: options.JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture here, for example x.png.")
    ] = None,
) -> None:
    """Send a trace's requests at its times, with real text in its lengths and with its shared prefixes."""
    results = JsonFile(json_file)
    require("client")
    if picture is not None:
        require("plot")
        writable(picture)
    for name, value in (("speed", speed), ("request-rate", request_rate), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} is {value}; it must be positive")
    from kvbits.replay.report import parse_goals, summary
    from kvbits.replay.run import LoadShape
    from kvbits.replay.target import find_target
    from kvbits.replay.trace import capped, fitting, read_trace

    goals = parse_goals(goodput or [])
    every = capped(read_trace(dataset_path), max_output_tokens)
    target = find_target(base_url, model, client_key(api_key, api_key_file))
    requests = fitting(every, context or target.context)[:num_prompts]
    if not requests:
        raise ConfigError(f"none of the {len(every):,} requests fits a context of {context or target.context} tokens")
    prompts, described = _prompts(target, requests, text)
    note(f"{len(requests):,} of {len(every):,} requests to {target.model} at {target.url}; prompts are {described}")
    extra: dict[str, Any] = {"temperature": temperature}
    if ignore_eos and any(r.output_tokens for r in requests):
        extra["ignore_eos"] = True
    load = LoadShape(speed, request_rate, max_concurrency, tuple(extra.items()), timeout, seed)
    outcome = _run(target, requests, prompts, load)
    figures = summary(outcome, goals)
    title = f"{dataset_path.name}, {len(requests):,} requests to {target.model}"
    _print(title, figures)
    settings = {
        "url": target.url, "model": target.model, "dataset": dataset_path.name, "prompts": described,
        "speed": speed if math.isfinite(speed) else "inf", "request_rate": request_rate,
        "max_concurrency": max_concurrency, "max_output_tokens": max_output_tokens, **extra,
    }  # fmt: skip
    results.write({"settings": settings, **figures, "records": [r.as_json() for r in outcome.records]})
    if picture is not None:
        from kvbits.replay.picture import draw

        draw(outcome, figures, title, picture)
    if not figures["completed"]:
        raise ConfigError(f"no request was answered; the first failure: {outcome.records[0].error}")


def _prompts(target: Target, requests: list[TraceRequest], text: Path | None) -> tuple[list[Prompt], str]:
    """A prompt for each request, and in a word what they are."""
    from kvbits.replay.prompts import BlockText

    if all(request.has_text for request in requests):
        return [list(r.messages) if r.messages is not None else r.prompt or "" for r in requests], "the file's own"
    from kvbits.evaluation.documents import reference_text
    from kvbits.evaluation.windows import read_text

    content = reference_text() if text is None else read_text(text)
    tokens = target.tokenize(content)
    if tokens is None:
        source = BlockText(content, CHARACTERS_PER_TOKEN)
        described = f"text, {CHARACTERS_PER_TOKEN:g} characters to a token, since the server does not tokenize"
    else:
        source, described = BlockText(tokens), "token ids by the server's tokenizer"
    return [source.prompt(request) for request in requests], described


CHARACTERS_PER_TOKEN = 4.0
"""Of English text, where the server lends no tokenizer."""


def _run(target: Target, requests: list[TraceRequest], prompts: list[Prompt], load: LoadShape) -> Outcome:
    from tqdm import tqdm

    from kvbits.replay.run import replay
    from kvbits.replay.send import Record

    with tqdm(total=len(requests), unit="req", file=sys.stderr, leave=False) as bar:
        tokens = failed = 0

        def done(record: Record) -> None:
            nonlocal tokens, failed
            tokens += record.output_tokens
            failed += record.error is not None
            bar.set_postfix(new_tokens=tokens, failed=failed, refresh=False)
            bar.update()

        return asyncio.run(replay(target, requests, prompts, load, done))


def _print(title: str, figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    share, good = figures["cached_share"], figures["good_requests_per_s"]
    rows = {
        "completed, failed": f"{figures['completed']:,}, {figures['failed']:,}",
        "seconds": f"{figures['seconds']:,.1f}",
        "requests/s": f"{figures['requests_per_s']:.3f}",
        "good requests/s": "" if good is None else f"{good:.3f} ({100 * figures['good_share']:.1f} % of all)",
        "new tokens/s": f"{figures['output_tokens_per_s']:,.1f}",
        "prompt and new tokens/s": f"{figures['total_tokens_per_s']:,.1f}",
        "prompt tokens from the cache": "not told" if share is None else f"{100 * share:.1f} %",
        "most requests at once": f"{figures['most_open']}",
    }
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    names = {"ttft": "first token", "itl": "between tokens", "tpot": "per new token", "e2el": "whole answer"}
    for key, name in names.items():
        found = figures[key]
        if found is not None:
            cuts = ", ".join(f"{q} {1000 * found[q]:,.1f}" for q in ("p50", "p90", "p99"))
            table.add_row(f"{name}, ms", cuts)
    for error, count in figures["failures"].items():
        table.add_row("failed", f"{count} x {error}")
    Console().print(table)
