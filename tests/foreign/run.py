"""Other servers' own tests of chat, completions and tokenizing against ours.

``make test-foreign`` runs it. Nothing of them is copied: vLLM's source distribution is downloaded and unpacked beside
the environment that they need; SGLang's has no tests, so that ``--sglang`` names a checkout of it. A plugin stands in
for their engines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import tomllib

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.environment import environment  # noqa: E402

VERSIONS = {"vllm": "0.33.0"}


def sources(python: Path, project: str, directory: Path) -> Path:
    """The unpacked source distribution of ``project``."""
    name = f"{project}-{VERSIONS[project]}"
    if not (directory / name).exists():
        command = [python, "-m", "pip", "download", "--no-deps", "--no-binary", project, "-d", directory]
        # Only its name and version are asked for, not a build.
        settings = {"VLLM_VERSION_OVERRIDE": VERSIONS[project], "VLLM_TARGET_DEVICE": "empty"}
        subprocess.run([*command, f"{project}=={VERSIONS[project]}"], check=True, env={**os.environ, **settings})
        with tarfile.open(directory / f"{name}.tar.gz") as archive:
            archive.extractall(directory, [m for m in archive if m.name.startswith(f"{name}/tests/")])
    return directory / name


def main() -> int:
    """Run the tests in scope; what pytest returned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model whose template knows tools")
    parser.add_argument("--environment", type=Path, required=True, help="where environment and sources are")
    parser.add_argument("--only", choices=("vllm", "sglang"), help="one project's tests alone")
    parser.add_argument("--sglang", type=Path, help="a checkout of SGLang, or of its edition for JAX")
    parser.add_argument("pytest", nargs="*", help="options of pytest")
    options = parser.parse_args()
    directory = options.environment.resolve()
    python = environment(directory, HERE / "requirements.txt")
    result = 0
    for project, files in tomllib.loads((HERE / "scope.toml").read_text())["files"].items():
        if project != (options.only or project) or (project == "sglang" and options.sglang is None):
            continue
        root = options.sglang.resolve() if project == "sglang" else sources(python, project, directory)
        if project == "vllm":
            # Without their own fixtures, which start their own engine.
            (root / "tests" / "conftest.py").unlink(missing_ok=True)
            (root / "tests" / "__init__.py").touch()
        files = [file for file in files if (root / file).exists()]
        settings = {"FOREIGN_KVBITS": str(Path(sys.executable).with_name("kvbits")), "FOREIGN_MODEL": options.model,
                    "PYTHONPATH": str(HERE)}  # fmt: skip
        command = [python, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--rootdir", root, "--tb", "short", *options.pytest]
        run = subprocess.run([*command, *(root / file for file in files)], check=False, env={**os.environ, **settings})
        result = result or run.returncode
    return result


if __name__ == "__main__":
    sys.exit(main())
