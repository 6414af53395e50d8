"""FP8 scales of a model's keys and values, calibrated on a text, as vLLM loads them; then read back and checked.

python examples/export_scales.py TEXT                           # writes the checkpoint smollm2-135m-fp8-kv
python examples/export_scales.py TEXT --model MODEL --output DIRECTORY --per head
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from kvbits.cli.main import run


def main() -> None:
    """Export, load with transformers and compressed-tensors, print the first layers' scales."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, default=Path("smollm2-135m-fp8-kv"))
    parser.add_argument("--per", default="tensor", choices=["tensor", "head"])
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    command = ["export", options.model, "--to", "compressed-tensors", "--per", options.per, "--text", options.text,
               "--context", options.context, "--windows", 2, "--output", options.output]  # fmt: skip
    try:
        run([str(word) for word in command])
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)

    config = json.loads((options.output / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    print(f"compressed-tensors reads: {scheme.num_bits} bits, {scheme.type}, per {scheme.strategy}")
    model, info = AutoModelForCausalLM.from_pretrained(options.output, output_loading_info=True, dtype=torch.bfloat16)
    print(f"missing: {len(info['missing_keys'])}, unexpected: {len(info['unexpected_keys'])}")
    for index, layer in enumerate(model.model.layers[:3]):
        attention = layer.self_attn
        print(f"layer {index}: k_scale {attention.k_scale.flatten().tolist()}, "
              f"v_scale {attention.v_scale.flatten().tolist()}")  # fmt: skip


if __name__ == "__main__":
    main()
