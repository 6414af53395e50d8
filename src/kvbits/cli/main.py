"""The ``kvbits`` program: its commands, and how an error reaches the terminal.

Commands import torch and the engine when they run, so that ``kvbits --help`` is fast.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from kvbits import __version__
from kvbits.cli import (
    advise,
    bench,
    bench_serve,
    cache,
    calibrate,
    chat,
    demo,
    evaluate,
    export,
    extras,
    generate,
    plan,
    quantize,
    report,
    serve,
    top,
)
from kvbits.errors import KVBitsError

USER_ERROR = 2
INTERRUPTED = 130


_SELDOM = (50_000, 20, 100)
"""When garbage is collected: importing torch and transformers makes a million objects that stay, and walking them again
and again takes a fifth of the time to the first token."""


def _version(asked: bool) -> None:
    if asked:
        print(f"kvbits {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="kvbits",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Serve long-context language models from a quantized key/value cache."""


app.command()(generate.generate)
app.command()(serve.serve)
app.command()(chat.chat)
app.command()(top.top)
app.command()(evaluate.evaluate)
app.command()(advise.advise)
app.command()(calibrate.calibrate)
app.command()(quantize.quantize)
app.command()(bench.bench)
app.command()(bench_serve.bench_serve)
app.command()(demo.demo)
app.add_typer(cache.app, name="cache")
app.command()(plan.plan)
app.command()(export.export)
app.command()(report.report)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake of the user's in one line, 130 interrupted."""
    _share_the_cores()
    gc.set_threshold(*_SELDOM)
    status = _status(arguments)
    if "triton" not in sys.modules:  # whose binding code lists all that was not collected
        gc.freeze()  # nothing of what is left has to be looked at to end
    sys.exit(status)


def _share_the_cores() -> None:
    """Let the threads of torch's OpenMP wait actively for some 250 us only, then sleep; before torch is loaded.

    By default they spin for as long as it takes: beside any other busy process each of the hundreds of barriers of a
    step then waits for the scheduler, and a step of 40 ms takes over a second. Always sleeping
    (``OMP_WAIT_POLICY=PASSIVE``) costs a third of the speed on an idle machine. Results do not change; whoever set a
    policy keeps it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def _status(arguments: list[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments, prog_name="kvbits", standalone_mode=False)
    except (KeyboardInterrupt, Abort):
        result = INTERRUPTED
    except TyperException as error:
        return _fail(error.format_message())
    except ModuleNotFoundError as error:
        line = extras.missing(error)
        if line is None:
            raise
        return _fail(line)
    except (KVBitsError, OSError) as error:
        return _fail(str(error))
    if result == INTERRUPTED:
        print("kvbits: interrupted", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    """One line on stderr, whatever the message's own line breaks."""
    text = " ".join(message.split())
    if text:  # empty: help was shown instead
        print(f"kvbits: error: {text}", file=sys.stderr)
    return USER_ERROR
