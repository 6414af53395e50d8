"""What a command imports before its first token, and that transformers and torch are whole afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("scipy.optimize", "torch.distributed.tensor", "torch._dynamo")

COMMAND = """
import sys
from kvbits.cli.session import load
loaded = load("smollm2-135m", "bfloat16", None)
from kvbits.llm import LLM
from kvbits.engine.params import SamplingParams
llm = LLM(loaded, kv_cache_dtype="int8", kv_cache_memory="64MiB")
print(llm.generate("The capital of France is", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].text)
print([name for name in {heavy} if name in sys.modules])
"""

AFTERWARDS = """
import torch
from transformers.utils import is_scipy_available
import scipy.optimize, torch._dynamo
assert torch.distributed.is_available() and is_scipy_available() == True
assert torch.compiler.disable.__module__ == "torch.compiler"
compiled = torch.compile(lambda x: x + 1, backend="eager")
assert compiled(torch.ones(2)).tolist() == [2, 2]
print("whole")
"""


def lines(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    return done.stdout.splitlines()


def test_the_first_token_needs_neither_scipy_nor_a_compiler() -> None:
    pytest.importorskip("scipy")
    found = lines(COMMAND.format(heavy=HEAVY) + AFTERWARDS)
    assert found[0].strip().startswith("Paris")
    assert found[-2:] == ["[]", "whole"]


def test_versions_that_cannot_do_without_are_imported_whole() -> None:
    """A module that needs more than a name of the compiler: all is as without it, but slower."""
    code = """
import sys, transformers.utils
from kvbits.models import lean
lean._decorator = lambda name: (_ for _ in ()).throw(AttributeError(name))
from kvbits.cli.session import load
loaded = load("smollm2-135m", "bfloat16", None)
print("torch._dynamo" in sys.modules, loaded.fused is not None)
"""
    assert lines(code) == ["True True"]


def test_a_command_that_brought_triton_ends_without_its_list_of_leaks() -> None:
    pytest.importorskip("triton")
    code = "import triton\nfrom kvbits.cli.main import run\nrun(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
