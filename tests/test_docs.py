"""The documentation: its Python runs, its commands exist, its site builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from kvbits.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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
    for page in [*PAGES, ROOT / "README.md"]:
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
