"""The tables of other engines' options against the choices of the versions that are installed here, if any are.

``pip install --no-deps`` is enough: sources are read, not imported, save OpenVINO's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbits.export.engines import ENGINES


def source(package: str, file: str) -> ast.Module:
    """A file of an installed package; skips where it is not installed. Importing would want a GPU's libraries."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return ast.parse((Path(next(iter(found.submodule_search_locations))) / file).read_text(encoding="utf-8"))


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def assigned(tree: ast.AST, name: str) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            yield node


def known(engine: str) -> set[str]:
    table = ENGINES[engine]
    return {d.name for d in table.dtypes} | {s.name for s in table.sides} | set(table.never)


def test_vllm() -> None:
    (node,) = assigned(source("vllm", "config/cache.py"), "CacheDType")
    assert isinstance(node, ast.Assign)
    assert known("vllm") >= strings(node.value), "vLLM has dtypes that nobody has looked at"
    # 0.32 lacks the three of octave_*
    assert {n for n in known("vllm") - strings(node.value) if not n.startswith("octave_")} == set()


def test_sglang() -> None:
    (node,) = assigned(source("sglang", "srt/arg_groups/fields/model.py"), "kv_cache_dtype")
    (choices,) = [k.value for n in ast.walk(node) if isinstance(n, ast.Call) for k in n.keywords if k.arg == "choices"]
    assert known("sglang") == strings(choices)


def test_lmdeploy() -> None:
    tree = source("lmdeploy", "messages.py")
    (policies,) = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "QuantPolicy"]
    values = [n.value for n in policies.body if isinstance(n, ast.Assign)]
    assert known("lmdeploy") == {str(v.value) for v in values if isinstance(v, ast.Constant)}


def test_openvino() -> None:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # properties of a plug-in that is not loaded are kept unread
    accepted = set()
    for precision in (
        "f32",
        "f16",
        "bf16",
        "u8",
        "i8",
        "u4",
        "i4",
        "u3",
        "u2",
        "u1",
        "nf4",
        "f8e4m3",
        "f8e5m2",
        "f4e2m1",
    ):
        with contextlib.suppress(RuntimeError):
            core.set_property("CPU", {"KEY_CACHE_PRECISION": precision})
            accepted.add(precision)
    assert known("openvino") == accepted
    name, value = ENGINES["openvino"].keys_by_channel or ("", "")
    core.set_property("CPU", {name: value})
