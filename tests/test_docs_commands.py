"""Every command of the README and of the documentation is typed as it stands, on a tiny model, page by page and in the
order of the page: what one writes, the next reads. What cannot be is listed with its reason."""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import status
from helpers.serving import byte_model, byte_tokenizer, engine_of, running
from helpers.tiny import save, tiny_model

from kvbits.cli import cluster, serve
from kvbits.server import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "docker compose up": "needs Docker and a network; deploy/ is tested in test_deploy",
    "kvbits advise": "the least document of its tasks has more tokens than the model here; tested in test_lab",
    "lm_eval": "needs the extra lm-eval; its model is tested in test_lm_eval",
    "make": "minutes to half an hour each; that the targets exist is tested in test_docs",
    "pip install": "changes the environment; make test-install",
    "python benchmarks/compare_engines.py": "minutes, and the other engines; tested in test_compare_engines",
    "python benchmarks/evidence.py": "hours, and data that is not here; tested in test_evidence",
    "python -m kvbits.lm_eval": "needs the extra lm-eval; its model is tested in test_lm_eval",
    "python -m pytest": "this suite",
    "source .venv/bin/activate": "is the shell's",
    "vllm serve": "needs vLLM; make test-vllm",
}
"""How a command begins, and why it is not run."""

SMALLER: dict[str, tuple[object, ...]] = {
    "bench": ("--context", 256, "--batch", 2, "--new-tokens", 2),
    "bench-serve": ("--num-prompts", 3),
    "cache": ("--kv-cache-memory", "16MiB"),
    "calibrate": ("--window", 256, "--windows", 1, "--check-windows", 1),
    "evaluate": ("--window", 64, "--windows", 1, "--tasks", "fidelity"),
    "export": ("--window", 64, "--windows", 1),
    "generate": ("--max-tokens", 3, "--kv-cache-memory", "16MiB"),
    "quantize": ("--window", 64, "--windows", 1),
    "serve": ("--kv-cache-memory", "16MiB"),
}  # fmt: skip
"""Options put behind those of the page, which they then replace: its model is smaller as well."""

WORDS = "the quick brown fox jumps over a lazy dog and asks what a page of a cache holds "


def typed(page: Path) -> list[str]:
    """The commands in the page's blocks for a shell, without comments, continued lines joined."""
    found, language, lines = [], None, []
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("```"):
            lines.append(line)
            continue
        if language in ("", "sh"):
            found += re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
        language, lines = (line[3:].strip() if language is None else None), []
    return [line.strip() for line in found if not line.lstrip().startswith(("#", "sk-")) and line.strip()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of three layers, whose tokens are bytes."""
    loaded = tiny_model("llama", vocab_size=259, head_dim=64, max_position_embeddings=8192)
    return save(loaded, tmp_path_factory.mktemp("model"), byte_tokenizer)


@pytest.fixture(scope="module")
def policy(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "policy"
    assert status("calibrate", model, "--bits", 4.6, "-o", folder, *SMALLER["calibrate"]) == 0
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages take as there: texts, a trace, a disk; and no server or cluster that runs on."""
    monkeypatch.chdir(tmp_path)
    for name in ("book.txt", "other.txt"):
        (tmp_path / name).write_text(WORDS * 40)
    for name in ("edit.txt", "manual.txt", "manual-and-question.txt"):
        (tmp_path / name).write_text(WORDS * 2)
    for name in ("data", "fast"):
        (tmp_path / name).mkdir()
    requests = [{"timestamp": 100 * i, "input_length": 20 + i, "output_length": 2, "hash_ids": [0]} for i in range(5)]
    (tmp_path / "mooncake_conversation_trace.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in requests))
    monkeypatch.setattr(run, "serve", lambda engine, options, sockets, *more: [s.close() for s in sockets])
    monkeypatch.setattr(cluster, "find_spec", lambda name: object())
    monkeypatch.setattr(serve, "serve_cluster", lambda replica, *more: None)
    return tmp_path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(engine_of(byte_model())) as server:
        yield server.url


def arguments(line: str, model: str, url: str) -> list[str]:
    """The words of ``kvbits ...`` with what is here in the place of what the page names."""
    names = {"MODEL": model, "smollm2-135m": model, "/mnt/fast": "fast", "http://127.0.0.1:8000": url,
             "50GiB": "1MiB", "8GiB": "1MiB", "policy/": "policy"}  # fmt: skip
    words = shlex.split(line, comments=True)[1:]
    if words[0] == "plan":  # from the configuration alone: nothing is smaller
        return [model if word == "smollm2-135m" else word for word in words]
    found = [names.get(word, word) for word in words]
    found = [name for word in found for name in (sorted(glob.glob(word)) if "*" in word else [word])]
    return [*found, *map(str, SMALLER.get(words[0], ())), *(["--port", free_port()] if words[0] == "serve" else [])]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run_as_written(
    page: Path, model: str, folder: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = typed(page)
    if "policy/" in str(lines) and "calibrate" not in str(lines):
        shutil.copytree(request.getfixturevalue("policy"), folder / "policy")
    for line in lines:
        command = re.sub(r"^([A-Z_]+=\S+ )+", "", line)
        if any(f"{command} ".startswith(f"{start} ") for start in NOT_RUN):
            continue
        assert command.startswith("kvbits "), f"{line}: say in NOT_RUN why it is not run"
        url = request.getfixturevalue("url") if "bench-serve" in line else ""
        capsys.readouterr()
        code = status(*arguments(command, model, url))
        assert code == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"


def test_what_is_not_run_is_in_the_pages() -> None:
    lines = [re.sub(r"^([A-Z_]+=\S+ )+", "", line) for page in PAGES for line in typed(page)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)] == []
    assert len(lines) > 50
