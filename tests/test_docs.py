"""The documentation: its Python runs, its commands, files and names exist, its lists are what the sources say, its site
builds without a warning."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from kvbits.cli.main import app
from kvbits.codecs.policy import SCHEMES
from kvbits.evaluation.verdict import LIMITS
from kvbits.models.gguf.families import FAMILIES
from kvbits.weights import FORMATS

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
RUN = ("index", "choosing", "planning", "export")
"""Pages whose Python needs nothing but what the tests have. The others' talks to a server or names no model."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of ``page`` in one of ``languages``; "" is a fence without one."""
    found, language, lines = [], None, []
    for line in page.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines = line[3:].strip(), []
        else:
            found += ["".join(lines)] if language in languages else []
            language = None
    assert language is None, f"{page.name}: a block does not end"
    return found


@pytest.mark.parametrize("name", RUN)
def test_python_runs(name: str) -> None:
    found = blocks(ROOT / "docs" / f"{name}.md", "python")
    assert found
    for block in found:
        exec(compile(block, f"{name}.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_commands_and_their_options_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    seen = set()
    for page in TEXTS:
        for block in blocks(page, "sh", ""):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].split()
                if len(words) < 2 or words[0] != "kvbits" or words[1].startswith("-"):
                    continue
                command = commands.get(words[1])
                assert command is not None, f"{page.name}: {line}"
                seen.add(words[1])
                options = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
                if hasattr(command, "commands"):  # a group: its commands' options
                    options |= {n for c in command.commands.values() for p in c.params for n in p.opts}
                unknown = {w.split("=")[0] for w in words[2:] if w.startswith("--")} - options
                assert not unknown, f"{page.name}: {line}: {unknown}"
    assert {"generate", "serve", "evaluate", "calibrate", "plan", "export", "report"} <= seen


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the docs extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "choosing.html").is_file()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_what_python_imports_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("kvbits"):
                continue
            try:
                module = importlib.import_module(str(node.module))
            except ModuleNotFoundError as error:
                if error.name == "ray":  # an extra that need not be there
                    continue
                raise
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page.name}: {node.module}.{alias.name}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_files_of_the_project_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|cpp|h|json|html|yml|md))`", text):
        if "NAME" in name or "ISA" in name:
            continue
        assert any((ROOT / under / name).is_file() for under in ("", "src/kvbits", "docs")), f"{page.name}: {name}"
    for name in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / name).is_file(), f"{page.name}: {name}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets, f"{page.name}: {named - targets}"


FOREIGN = {
    "--additional-config", "--block-size", "--kv-cache-memory-bytes", "--kv-transfer-config", "--enable-dbo",
    "--geometry", "--isa", "--phase", "--repeats", "--rounds", "--case", "--stress-seed", "--write", "--checkpoint",
    "--install-completion", "--no-deps", "--platform", "--help", "--kl-divergence",
    "--quantization-param-path", "--quant-policy", "--kv-cache-dtype-skip-layers",
}  # fmt: skip
"""Options that the text names and no command of kvbits has: benchmarks', pytest's, pip's, other engines'."""


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_options_and_extras_in_the_text_exist(page: Path) -> None:
    commands = list(typer.main.get_command(app).commands.values())  # type: ignore[attr-defined]
    commands += [inner for command in commands for inner in getattr(command, "commands", {}).values()]
    known = {name for command in commands for p in command.params for name in (*p.opts, *p.secondary_opts)}
    text = page.read_text("utf-8")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    named = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    assert named <= known | FOREIGN, f"{page.name}: {named - known - FOREIGN}"
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([a-z-]+) = \[", section, re.MULTILINE))
    wanted = {name for names in re.findall(r"(?:kvbits|'\.)\[([a-z,-]+)\]", text) for name in names.split(",")}
    assert wanted <= extras, f"{page.name}: {wanted - extras}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_metrics_in_the_text_exist(page: Path) -> None:
    server = "".join(path.read_text("utf-8") for path in (ROOT / "src/kvbits/server").glob("*.py"))
    for name in re.findall(r"`(?:vllm|kvbits):(\w+)`", page.read_text("utf-8")):
        assert f'{name.removesuffix("_total")}"' in server, f"{page.name}: {name}"


def test_one_standard_of_cpp() -> None:
    standard = re.search(r"CMAKE_CXX_STANDARD (\d+)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert standard is not None
    said = {(page.name, n) for page in TEXTS for n in re.findall(r"C\+\+(\d\d)", page.read_text("utf-8"))}
    assert said
    assert {n for _, n in said} == {standard[1]}, said


def test_the_line_of_imports_is_the_contract() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", "utf-8")
    layers = contracts["importlinter:contract:layers"]["layers"].split("\n")
    line = re.search(r"^`(cli > .*)`$", ARCHITECTURE, re.MULTILINE)
    assert line is not None
    assert line[1] == " > ".join(re.sub(r"[()]", "", layer) for layer in layers if layer)


def test_every_package_and_every_source_of_the_kernels_is_described() -> None:
    named = set(re.findall(r"`([\w./-]+)`", ARCHITECTURE))
    package = ROOT / "src" / "kvbits"
    missing = {path.stem for path in package.iterdir() if not path.name.startswith(("_", "py.typed"))} - named
    files = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    missing |= {str(file) for file in files if str(file) not in named and str(file.parent) not in named - {"csrc"}}
    assert not missing


@functools.cache
def sources() -> dict[str, str]:
    """Text by path of all that a list under "Adding something" may name."""
    ends = {".py", ".h", ".cpp", ".txt", ".json", ".md"}
    files = [path for top in ("src", "csrc", "tests", "docs", "deploy") for path in (ROOT / top).rglob("*")]
    found = [path for path in files if path.suffix in ends]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*found, ROOT / "CMakeLists.txt"]}


def named_in(pattern: str, under: Sequence[str], stem: str = "", word: str = "") -> set[str]:
    """Files below ``under`` that hold ``pattern``, with ``stem`` in their names written as ``word``."""
    found = {path for path, text in sources().items() if path.startswith(tuple(under)) and re.search(pattern, text)}
    return {path.replace(stem, word) for path in found} if stem else found


LISTS = {
    "A dtype made of known codecs": [
        named_in(f'"{name}"|`{name}`', ("src/kvbits/codecs", "tests/test_formats", "docs/formats"))
        for name in SCHEMES
        if name != "fp8_e4m3"  # the long name of fp8
    ],
    "A width of integer codes": [
        named_in(
            rf'"int{bits}"|`int{bits}`|affine<{bits}, false',
            ("src/kvbits/codecs", "src/kvbits/kernels", "csrc", "tests/test_formats", "docs/formats"),
        )
        for bits in (6, 5, 4, 3, 2)
    ],
    "A codec": [
        named_in(f"{name}|{name.title()}", ("src/kvbits/codecs", "src/kvbits/kernels", "csrc"), name, "NAME")
        for name in ("float8", "codebook")
    ],
    "A format of weights": [
        named_in(rf"\b({name}|{name.upper()})\b", ("src/kvbits/weights", "csrc/weights"))
        for name in FORMATS
        if name != "bf16"  # has no scales
    ],
    "A measure of quality": [named_in(f'"{name}"', ("src",)) for name in LIMITS],
    "A metric of the server": [
        named_in(name, ("src", "deploy", "docs/serving"))
        for name in ("num_preemptions", "prefix_cache_hits", "cached_pages_evicted", "kv_cache_usage_perc")
    ],
    "An instruction set": [named_in(isa, ("csrc", "CMakeLists"), isa, "ISA") for isa in ("avx2", "avx512")],
    "A model family": [
        named_in(f'"{name}"|"{family.model_type}"', ("src", "tests")) for name, family in FAMILIES.items()
    ],
    "A field of the API": [
        named_in(rf"\b{name}\b", ("src",)) for name in ("min_p", "top_k", "repetition_penalty", "frequency_penalty")
    ],
}
"""For each heading the files that know a thing of the kind; what all of them share is what a new one needs."""


@pytest.mark.parametrize("heading", LISTS)
def test_the_list_of_what_a_new_thing_needs_is_the_sources(heading: str) -> None:
    section = ARCHITECTURE.split(f"### {heading}\n")[1].split("\n### ")[0]
    assert set(re.findall(r"^- `([^`]+)`", section, re.MULTILINE)) == set.intersection(*LISTS[heading])


def test_every_list_of_what_a_new_thing_needs_is_checked() -> None:
    section = ARCHITECTURE.split("## Adding something\n")[1]
    assert set(re.findall(r"^### (.*)$", section, re.MULTILINE)) == set(LISTS)
