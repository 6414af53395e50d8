"""``kvbits top``: a live view of a server in the terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.keys import client_key
from kvbits.cli.remote import Remote
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Group

_COLOURS = {"free": "bright_black", "open": "yellow", "sealed": "blue", "shared": "magenta", "cached": "green"}
_WIDTH = 60


def top(
    url: Annotated[str, typer.Argument(metavar="[URL]", help="The server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="The server's key.")] = None,
    api_key_file: options.ApiKeyFile = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False,
) -> None:
    """Show the pool, the sessions, tokens per second and latencies of a running server."""
    if not interval > 0:
        raise ConfigError(f"interval is {interval}; it must be a positive number of seconds")
    from rich.console import Console
    from rich.live import Live

    remote = Remote(url, client_key(api_key, api_key_file))
    state = remote.get("/kvbits/state")
    if once:
        Console().print(_view(state, None, 0.0))
        return
    with Live(_view(state, None, 0.0), screen=True) as live:
        while True:
            time.sleep(interval)
            before, state = state, remote.get("/kvbits/state")
            live.update(_view(state, before, interval), refresh=True)


def _view(state: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    pool = state["pool"]
    head = Text(
        f"{state['model']}: KV cache {state['kv_cache_dtype']}, {state['bits_per_element']:.2f} bits per element, "
        f"{pool['frames']:,} frames, {100 * pool['usage']:.0f} % held by sessions"
    )
    bar = Text()
    for name in ("open", "sealed", "cached", "free"):
        bar.append("█" * round(_WIDTH * pool[name] / pool["frames"]), style=_COLOURS[name])
    legend = Text("  ").join(Text(f"{name} {pool[name]:,}", style=colour) for name, colour in _COLOURS.items())
    return Group(head, bar, legend, Text(_figures(state, before, seconds)), _sessions(state, Table()))


def _figures(state: dict[str, Any], before: dict[str, Any] | None, seconds: float) -> str:
    parts = [f"running {state['running']}", f"waiting {state['waiting']}", f"preemptions {state['preemptions']}"]
    if before is not None:
        rate = (state["generated_tokens"] - before["generated_tokens"]) / seconds
        parts.append(f"{rate:.1f} tokens/s")
    for name, text in (("time_to_first_token", "first token"), ("inter_token", "next token")):
        times = state["latency"][name]
        if times is not None:
            parts.append(f"{text} p50 {1000 * times['p50']:.1f} ms, p99 {1000 * times['p99']:.1f} ms")
    if state["prefix_queries"]:
        parts.append(f"prompt tokens from the cache {100 * state['prefix_hits'] / state['prefix_queries']:.0f} %")
    return " | ".join(parts)


def _sessions(state: dict[str, Any], table: Any) -> Any:
    for name in ("request", "state", "prompt", "cached", "stored", "generated"):
        table.add_column(name, justify="left" if name in ("request", "state") else "right")
    for s in state["sessions"][:20]:
        numbers = (s["prompt_tokens"], s["cached_tokens"], s["stored_tokens"], s["generated_tokens"])
        table.add_row(s["id"][:24], s["state"], *(f"{n:,}" for n in numbers))
    return table
