"""Tests of this directory are left out where vLLM is not installed ("make test-vllm" installs it)."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
from helpers.vllm_engine import Engine, run_engine

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return partial(run_engine, tmp_path)
