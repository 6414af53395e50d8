"""A pytest plug-in that runs vLLM's own tests of its CPU attention on kvbits' part of the plug-in.

    python -m pytest -p vllms_own --noconftest VLLM/tests/kernels/attention/test_cpu_attn.py

(``PYTHONPATH=tests:tests/with_vllm:VLLM``; VLLM is the sources of the installed version, such as its sdist.) The three
operations that those tests call are answered by blocks, metadata and kernels of ``kvbits.vllm``: what was stored by
slot comes into blocks of 64 tokens, first all tokens before the queries, then these. Caches in 16 bit are ``bf16``,
vLLM's fp8 is ``--kvbits-policy`` (int8). What kvbits refuses in vLLM is skipped, with the reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import vllm._custom_ops
from helpers.vllm_memory import VllmMemory
from torch import Tensor

from kvbits.config import LayerGeometry, pages_of
from kvbits.kernels.cpu import CpuBackend
from kvbits.vllm.step import Step
from kvbits.vllm.views import view_of

_stored: dict[int, tuple[Tensor, Tensor, str]] = {}
_policy = "int8"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kvbits-policy", default="int8")


def pytest_configure(config: pytest.Config) -> None:
    global _policy
    _policy = config.getoption("--kvbits-policy")
    for name in ("cpu_attn_reshape_and_cache", "cpu_attn_get_scheduler_metadata", "cpu_attention_with_kv_cache"):
        setattr(vllm._custom_ops, name, globals()[name])


def cpu_attn_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, isa: str, **fp8: Any
) -> None:
    assert torch.equal(slot_mapping, torch.arange(len(slot_mapping)))
    _stored[key_cache.data_ptr()] = key, value, _policy if fp8.get("kv_cache_dtype", "auto") != "auto" else "bf16"


def cpu_attn_get_scheduler_metadata(**given: Any) -> None:
    if given["dtype"] not in (torch.bfloat16, torch.float32):
        pytest.skip(f"refused: the model runs in {given['dtype']}")
    if not given["causal"]:
        pytest.skip("refused: attention that is not causal (encoders, dynamic_causal)")


def cpu_attention_with_kv_cache(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    scale: float, causal: bool, alibi_slopes: Tensor | None, sliding_window: int, block_table: Tensor, softcap: float,
    scheduler_metadata: None, s_aux: Tensor | None, **others: Any,
) -> None:  # fmt: skip
    if alibi_slopes is not None:
        pytest.skip("refused: ALiBi")
    key, value, policy = _stored[key_cache.data_ptr()]
    heads, dim = key.shape[1:]
    layer = LayerGeometry(
        query.shape[1], heads, dim, dim, scale, window=sliding_window if sliding_window > 0 else None,
        softcap=softcap or None, sinks=s_aux is not None,
    )  # fmt: skip
    backend = CpuBackend()
    counts, ends = query_start_loc.diff(), seq_lens
    block = len(key) // key_cache.shape[0]
    slots = [(block_table[i, : -(-n // block), None] * block + torch.arange(block)).flatten()[:n]
             for i, n in enumerate(ends.tolist())]  # fmt: skip
    memory = OneLayer(policy, layer, len(ends), int(ends.max()))
    if reason := backend.supports(memory.policy.layers[0], layer):
        pytest.skip(f"refused: {reason}")
    view = view_of(memory.layer(0), 0, layer, memory)
    sinks = None if s_aux is None else s_aux.float()
    before = ends - counts
    for first, last in ((torch.zeros_like(ends), before), (before, ends)):
        rows = torch.cat([s[a:b] for s, a, b in zip(slots, first.tolist(), last.tolist(), strict=True)])
        start = torch.nn.functional.pad((last - first).cumsum(0, dtype=torch.int32), (1, 0))
        if not len(rows):
            continue
        asked = query if last is ends else query.new_zeros(len(rows), *query.shape[1:])
        found = output if last is ends else torch.empty_like(asked)
        step = Step.of(len(ends), start, last, memory.table)
        backend.forward(view, step.batch(memory), asked, key[rows], value[rows], sinks, found)


class OneLayer(VllmMemory):
    """Blocks of one layer for ``requests`` of up to ``tokens`` tokens, in any order."""

    def __init__(self, policy: str, layer: LayerGeometry, requests: int, tokens: int) -> None:
        pages = pages_of(tokens)
        super().__init__(policy, 1, (layer,), requests * (pages + 1))
        order = torch.randperm(len(self.bytes)).to(torch.int32)
        self.table = order[requests:].view(requests, pages)
        self._open = order[:requests].numpy()[None, :, None]

    def open_blocks(self, requests: np.ndarray) -> np.ndarray:
        return self._open[:, requests]
