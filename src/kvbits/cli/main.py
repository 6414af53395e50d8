"""The ``kvbits`` program: its commands, and how an error reaches the terminal.

Commands import torch and the engine when they run, so that ``kvbits --help`` is fast.
"""

from __future__ import annotations

import sys

import typer
from typer.exceptions import Abort, TyperException

from kvbits.cli import bench, calibrate, chat, demo, evaluate, generate, serve, top
from kvbits.errors import KVBitsError

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="kvbits",
    help="Serve long-context language models from a quantized key/value cache.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(chat.chat)
app.command()(top.top)
app.command()(evaluate.evaluate)
app.command()(calibrate.calibrate)
app.command()(bench.bench)
app.command()(demo.demo)


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake of the user's in one line, 130 interrupted."""
    sys.exit(_status(arguments))


def _status(arguments: list[str] | None) -> int:
    command = typer.main.get_command(app)
    try:
        result = command.main(arguments, prog_name="kvbits", standalone_mode=False)
    except (KeyboardInterrupt, Abort):
        result = INTERRUPTED
    except TyperException as error:
        return _fail(error.format_message())
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
