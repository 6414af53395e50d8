"""Run with an installed kvbits, outside its sources: the library, the program and the types are there and work."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kvbits
from kvbits.kernels.cuda.nvrtc import HEADERS
from kvbits.models.load import wrap


def tiny() -> kvbits.LLM:
    """A random model of bytes, so that nothing is downloaded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=1, max_position_embeddings=256, **sizes))
    loaded = wrap(model.eval(), PreTrainedTokenizerFast(tokenizer_object=tokenizer), "tiny")
    return kvbits.LLM(loaded, kv_cache_dtype="int4", kv_cache_memory="4MiB")


def main() -> None:
    sources = Path(__file__).resolve().parents[1] / "src"
    assert not Path(kvbits.__file__).is_relative_to(sources), f"kvbits is read from {sources}; run this elsewhere"
    assert version("kvbits") == kvbits.__version__
    assert files("kvbits").joinpath("py.typed").is_file()
    assert all(files("kvbits.kernels.cuda").joinpath(name).is_file() for name in ("decode.cu", *HEADERS))
    llm = tiny()
    prompts = ["The page manager", "A refcount " * 12]
    outputs = llm.generate(prompts, kvbits.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    assert all(len(o.outputs[0].token_ids) == 16 for o in outputs), outputs
    assert llm.engine.pool.policy.name == "int4"
    program = Path(sys.executable).with_name("kvbits")
    shown = subprocess.run([program, "--help"], check=True, capture_output=True, text=True).stdout
    assert "serve" in shown, shown
    print(f"kvbits {kvbits.__version__} on Python {sys.version.split()[0]}: {kvbits.__file__}")


if __name__ == "__main__":
    main()
