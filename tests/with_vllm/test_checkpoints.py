"""A checkpoint of ``kvbits quantize`` in vLLM's own engine and kernels: it reads the same numbers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from helpers.command import status
from helpers.packed_files import decompressed, with_values
from helpers.tiny import save, tiny_model
from helpers.vllm_engine import Engine

pytestmark = pytest.mark.vllm

VOCABULARY = 97


def test_vllm_reads_the_rounded_weights(engine: Engine, tmp_path: Path) -> None:
    """Without kvbits in it; sizes that its kernels take are multiples of 32."""
    tiny = tiny_model("llama", hidden_size=128, head_dim=32, intermediate_size=256)
    model, out, text = save(tiny.bfloat16(), tmp_path / "model"), tmp_path / "out", tmp_path / "words.txt"
    source = random.Random(5)
    text.write_text(" ".join(f"w{min(4 + int(source.expovariate(0.05)), 96)}" for _ in range(700)))
    assert status("quantize", model, "-o", out, "--text", text, "--window", 128, "--windows", 4) == 0
    ids = [source.randrange(4, VOCABULARY) for _ in range(100)]
    params = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": VOCABULARY, "detokenize": False}
    own = {"dtype": "bfloat16", "max_logprobs": VOCABULARY, "max_model_len": 256}
    plain = {"VLLM_PLUGINS": ""}
    run = engine(str(out), [{"prompts": [ids], "params": params}], None, environment=plain, **own)
    rows = run.rounds[0]["answers"][0]["prompt_logprobs"][1:]
    found = torch.tensor([[row[str(token)] for token in range(VOCABULARY)] for row in rows])
    with torch.no_grad():
        meant, before = (
            with_values(model, values)(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            for values in (decompressed(out), {})
        )
    ours, lost = ((meant.exp() * (meant - one)).sum(-1).mean() for one in (found, before))
    print(f"KL of vLLM's to the rounded weights in float32 {ours:.6f}, of the unrounded ones {lost:.6f}")
    assert ours < 0.1 * lost
