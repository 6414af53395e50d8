"""Without an optional library one clear line names its extra, before anything slow; completion and help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvbits
from kvbits.cli import extras

ROOT = Path(__file__).parents[1]

SCRIPT = """
import importlib.util, sys
blocked = sys.argv.pop(1).split(",")
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in blocked else spec(name, *rest)
from kvbits.cli.main import run
run()
"""


def without(libraries: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, libraries, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("library", "extra", "arguments"),
    [
        ("fastapi", "server", ["serve", "no-such-model"]),
        ("uvicorn", "server", ["serve", "no-such-model"]),
        ("aiohttp", "client", ["bench-serve", "--base-url", "http://127.0.0.1:9", "--trace", "x"]),
        ("matplotlib", "plot", ["demo", "no-such-model"]),
        ("matplotlib", "plot", ["evaluate", "no-such-model", "--kv-cache-dtype", "int8", "--html", "x.html"]),
        ("matplotlib", "plot", ["plan", "llama-3.1-8b", "--memory", "80GiB", "--picture", "x.png"]),
        ("plotly", "report", ["report", "missing.json"]),
    ],
)
def test_a_missing_library_is_one_line_that_names_its_extra(library: str, extra: str, arguments: list[str]) -> None:
    done = without(library, *arguments)
    want = f"kvbits: error: this needs {library}, which is not installed: pip install 'kvbits[{extra}]'"
    assert (done.returncode, done.stderr.strip()) == (2, want)


def test_the_library_needs_no_extra() -> None:
    """What ``pip install kvbits`` brings runs a plan, and imports all that LLM needs."""
    # pydantic is there whatever is asked for: typer brings it
    every = ",".join(library for libraries in extras._EXTRAS.values() for library in libraries if library != "pydantic")
    assert without(every, "plan", "llama-3.1-8b", "--memory", "80GiB", "--context", "8192").returncode == 0
    code = SCRIPT.rpartition("from kvbits.cli.main")[0] + "from kvbits import LLM, SamplingParams; import kvbits.hf"
    subprocess.run([sys.executable, "-c", code, every], check=True, timeout=300)


def test_extras_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, libraries in extras._EXTRAS.items():
        names = {Requirement(line).name.replace("-", "_") for line in package[extra]}
        assert set(libraries) - {"starlette"} <= names, extra  # starlette comes with fastapi


def test_a_library_that_no_extra_has_is_a_bug() -> None:
    assert extras.missing(ModuleNotFoundError("x", name="no_such_thing")) is None
    assert extras.missing(ModuleNotFoundError("x", name="plotly.graph_objects")) == (
        "this needs plotly, which is not installed: pip install 'kvbits[report]'"
    )


def program(*arguments: str, **environment: str) -> str:
    code = "from kvbits.cli.main import run; run()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True).stdout


def test_help_shows_brackets() -> None:
    shown = "".join(program("serve", "--help", COLUMNS="300", PATH="/usr/bin").split())
    assert "'kvbits[gpu]'" in shown
    assert "'kvbits[ray]'" in shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = program("--show-completion", shell, PATH="/usr/bin", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_KVBITS_COMPLETE" in script


def test_completion_knows_commands() -> None:
    found = program(PATH="/usr/bin", _KVBITS_COMPLETE="complete_bash", COMP_WORDS="kvbits ev", COMP_CWORD="1").split()
    assert found == ["evaluate"]


def test_the_version_stands_in_one_place() -> None:
    assert f"## {kvbits.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
    assert "\nversion = " not in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "src/kvbits/py.typed").exists()
