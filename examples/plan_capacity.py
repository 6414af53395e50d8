"""How many conversations of 128Ki tokens one device holds, from 16 bit to INT8 to INT4. Nothing is loaded.

python examples/plan_capacity.py
python examples/plan_capacity.py qwen3-32b --memory 96GiB --context 40960
"""

import argparse

from kvbits.planning.facts import known_facts, known_models
from kvbits.planning.request import Options, make_plan


def main() -> None:
    """Plan and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", choices=known_models(), metavar="MODEL")
    parser.add_argument("--memory", default="80GiB")
    parser.add_argument("--context", type=int, default=131_072)
    args = parser.parse_args()
    facts = known_facts(args.model)
    asked = Options(
        memory=args.memory, weights="bf16", contexts=(args.context,), dtypes=("bf16", "int8", "int8,int4", "int4")
    )
    plan = make_plan(facts, asked).plan
    print(f"{facts.name} from {args.memory}: {plan.cache_bytes / 2**30:.1f} GiB are left for the cache")
    for scheme in plan.schemes:
        at = scheme.contexts[0]
        print(
            f"{scheme.dtype:>10}: {scheme.kv_bytes_per_token:9,.0f} bytes a token, {at.sessions:3} sessions of "
            f"{at.context:,} tokens, {at.gain_over_16bit:.2f} times 16 bit"
        )


if __name__ == "__main__":
    main()
