"""``kvbits calibrate``: fit a cache policy to a model and a text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbits.cli import options
from kvbits.cli.output import folder
from kvbits.cli.session import Bar, load, note, tokens_of
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.calibration.policy import Planner
    from kvbits.evaluation.compare import Comparison
    from kvbits.models import LoadedModel

_ROUNDS = 4
"""Budgets that are tried for --max-kl: the prediction ranks policies well and is off by a factor."""


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
        str | None, typer.Option(metavar="SIZE", help="Bytes in which --sessions of --session-tokens must fit.")
    ] = None,
    sessions: Annotated[int, typer.Option(metavar="N", help="With --memory.")] = 1,
    session_tokens: Annotated[int, typer.Option(metavar="TOKENS", help="With --memory.")] = 4096,
    sink: Annotated[
        str, typer.Option(metavar="DTYPE", help="Every sequence's first page; 'none': as the rest.")
    ] = "int8",
    context: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of one window.")] = 2048,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows to calibrate on, spread over the text.")] = 8,
    check_windows: Annotated[int, typer.Option(metavar="N", help="Other windows, to measure the result on.")] = 2,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Learn how to round, measure what each layer's keys and values can bear, and give them bits accordingly.

    The result is checked through the real kernels on windows it was not fitted to, and written to DIR; use it with
    --kv-policy DIR.
    """
    begin = time.perf_counter()
    if sum(x is not None for x in (bits, max_kl, memory)) != 1:
        raise ConfigError("give exactly one of --bits, --max-kl and --memory")
    for name, value in (
        ("--bits", bits),
        ("--max-kl", max_kl),
        ("--sessions", sessions),
        ("--session-tokens", session_tokens),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}; it must be positive")
    folder(output)
    from kvbits.evaluation.windows import read_text

    contents = [read_text(path) for path in text or ()]
    from kvbits.calibration.collect import collect
    from kvbits.calibration.fit import fit
    from kvbits.calibration.policy import Planner, candidates, check_bits, check_memory
    from kvbits.calibration.sensitivity import sensitivity
    from kvbits.calibration.texts import split_windows
    from kvbits.config import parse_bytes
    from kvbits.evaluation.compare import check_dtypes

    size = None if memory is None else parse_bytes(memory)
    loaded = load(model, "float32", threads, trust_remote_code=trust_remote_code)
    first_page = None if sink == "none" else sink
    check_dtypes(loaded, [first_page or "int8"], context)
    # What no calibration could meet is refused before the work.
    if bits is not None:
        check_bits(loaded.geometry, bits)
    if size is not None:
        check_memory(loaded.geometry, first_page, size, sessions, session_tokens)
    tokens = [tokens_of(loaded, c) for c in contents] or _own_text(loaded, context, windows, check_windows)
    fitted, checked = split_windows(tokens, context, windows, check_windows)
    with Bar(context * windows, "gradients") as advance:
        statistics = collect(loaded, fitted, progress=advance)
    with Bar(len(statistics.samples), "fitting") as advance:
        table = fit(statistics, candidates(loaded.geometry), advance)
    planner = Planner(loaded.geometry, table, first_page)
    facts: dict[str, Any] = {"texts": [path.name for path in text or ()], "windows": windows, "context": context}
    facts["sensitivity"] = sensitivity(table)
    run = _Run(loaded, planner, output, checked, facts)
    if bits is not None:
        found = run.measure(planner.of_bits(bits))
    elif max_kl is not None:
        found = run.search(max_kl)
    else:
        assert size is not None
        found = run.measure(planner.of_memory(size, sessions, session_tokens))
    _print(found, loaded, output, time.perf_counter() - begin)


def _own_text(loaded: LoadedModel, context: int, windows: int, check_windows: int) -> list[list[int]]:
    """Texts of one window each that the model writes, as many as are needed."""
    from kvbits.calibration.selftext import write_windows
    from kvbits.calibration.texts import check_counts

    check_counts(context, windows, check_windows)
    with Bar(context * (windows + check_windows), "writing a text") as advance:
        return write_windows(loaded, context, windows + check_windows, progress=advance)


class _Run:
    """Writes policies and measures them."""

    def __init__(
        self, loaded: LoadedModel, planner: Planner, output: Path, checked: list[list[int]], facts: dict[str, Any]
    ) -> None:
        self._loaded, self._planner, self._output = loaded, planner, output
        self._checked, self._facts = checked, facts

    def measure(self, budget: int) -> Comparison:
        """Write the policy of ``budget`` bytes, run it, and write it again with what was measured."""
        from kvbits.codecs.artifact import PREFIX, save_policy
        from kvbits.evaluation.compare import compare

        geometry, name = self._loaded.geometry, self._loaded.fingerprint
        policy, predicted = self._planner.policy(budget), self._planner.predicted(budget)
        save_policy(self._output, policy, geometry, name, {})
        total = 2 * sum(len(window) for window in self._checked)
        with Bar(total, f"checking {self._planner.bits(budget):.3g} bits") as advance:
            (result,) = compare(self._loaded, [f"{PREFIX}{self._output}"], self._checked, progress=advance)
        measured = {k: v for k, v in result.as_json().items() if k != "dtype"}
        save_policy(self._output, policy, geometry, name, {**self._facts, "predicted_kl": predicted, "check": measured})
        return result

    def search(self, most: float) -> Comparison:
        """The fewest bits whose measured KL is at most ``most``, within a few rounds of correcting the prediction."""
        target, best, nearest = most, -1, float("inf")
        tried: set[int] = set()
        for _ in range(_ROUNDS):
            budget = self._planner.of_kl(target)
            if budget in tried:
                break
            tried.add(budget)
            result = self.measure(budget)
            kl = result.summary.kl_mean
            note(f"{result.bits_per_element:.3f} bits: KL {kl:.2g}")
            nearest = min(nearest, kl)
            if kl <= most and (best < 0 or budget < best):
                best = budget
                if kl > 0.85 * most:
                    return result
            target = max(target * 0.95 * most / kl, self._planner.least_kl)
        if best < 0:
            raise ConfigError(f"a KL of {most:g} cannot be met; the nearest that was measured is {nearest:.2g}")
        return self.measure(best)


def _print(found: Comparison, loaded: LoadedModel, output: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from kvbits.codecs.artifact import load_policy

    policy = load_policy(output, loaded.geometry, loaded.fingerprint)
    table = Table(title=f"{found.bits_per_element:.3f} bits per element")
    for name in ("layer", "keys", "values"):
        table.add_column(name, justify="right")
    for index, scheme in enumerate(policy.layers):
        table.add_row(str(index), scheme.key.name, scheme.value.name)
    Console().print(table)
    s = found.summary
    print(
        f"checked on {found.windows} windows: KL {s.kl_mean:.2g}, perplexity {s.perplexity:.3f} "
        f"({100 * (s.perplexity / s.perplexity_16bit - 1):+.2f} %), same top token {100 * s.top1_agreement:.1f} %\n"
        f"policy: {output}\n{seconds:.0f} s in all"
    )
