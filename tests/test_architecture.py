"""What the design promises about imports: their direction, and that importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvbits"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_imports_point_down() -> None:
    pytest.importorskip("importlinter", reason="the contracts need the lint extra")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_importing_kvbits_loads_no_heavy_library_and_starts_nothing() -> None:
    done = python(
        "import os, sys, threading\n"
        "before = dict(os.environ)\n"
        "import kvbits\n"
        "heavy = {'torch', 'numpy', 'transformers', 'matplotlib', 'kvbits.kernels._native'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
        "assert dict(os.environ) == before\n"
        "print('fine')"
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_the_command_line_is_read_before_torch_is_loaded() -> None:
    heavy = "{'torch', 'transformers', 'kvbits.kernels._native'}"
    done = python(f"import sys, kvbits.cli.main; print({heavy} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "module", ["kvbits.pages", "kvbits.engine.scheduler", "kvbits.engine.request", "kvbits.config"]
)
def test_bookkeeping_runs_without_torch(module: str) -> None:
    done = python(f"import sys, {module}; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_importing_everything_changes_no_global_of_torch() -> None:
    done = python(
        "import torch\n"
        "state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),"
        " torch.initial_seed() * 0 + torch.random.get_rng_state().sum().item())\n"
        "before = state()\n"
        "import kvbits.evaluation.demo, kvbits.evaluation.picture, kvbits.llm, kvbits.kernels.cpu\n"
        "assert state() == before\n"
        "from transformers import AttentionInterface\n"
        "print('kvbits' in AttentionInterface().valid_keys())"
    )
    assert done.stdout == "False\n", done.stderr


def test_only_the_kernels_touch_the_native_module() -> None:
    users = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = (getattr(node, "module", None) or "") if isinstance(node, ast.ImportFrom) else ""
            if "_native" in names or any("_native" in part.split(".") for part in (*names, module)):
                users.add(path.relative_to(SOURCE).as_posix())
    assert users == {
        "kernels/coder.py",
        "kernels/cpu.py",
        "kernels/decoder.py",
        "kernels/experts.py",
        "kernels/products.py",
    }
