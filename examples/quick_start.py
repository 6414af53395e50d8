"""Several texts at once from one INT4 cache, and what the cache holds.

python examples/quick_start.py
python examples/quick_start.py MODEL --dtype int8 --memory 256MiB
"""

import argparse

from kvbits import LLM, SamplingParams

BEGINNINGS = ["The sky is blue because", "A generator in Python is", "Three rivers of Europe are"]


def main() -> None:
    """Continue three texts together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--dtype", default="int4", help="a dtype, a policy string or a policy's directory")
    parser.add_argument("--memory", default="64MiB")
    parser.add_argument("--new-tokens", type=int, default=24)
    options = parser.parse_args()
    llm = LLM(options.model, kv_cache_dtype=options.dtype, kv_cache_memory=options.memory)
    params = SamplingParams(max_tokens=options.new_tokens, temperature=0)
    for begun, answer in zip(BEGINNINGS, llm.generate(BEGINNINGS, params), strict=True):
        print(f"{begun} ... {' '.join(answer.outputs[0].text.split())}")
    pool = llm.engine.pool
    print(f"cache: {pool.policy.name}, {pool.bits_per_element():.2f} bits an element")


if __name__ == "__main__":
    main()
