"""One policy in the options of five engines, and what each of them cannot express.

python examples/export_flags.py
python examples/export_flags.py --dtype int8,int4 --layers 32
"""

import argparse

from kvbits.codecs import parse_policy
from kvbits.export.engines import ENGINES
from kvbits.export.flags import translate


def main() -> None:
    """Translate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="0-1:bf16,2-29:int8/int4+sink:int8")
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    policy = parse_policy(args.dtype, args.layers)
    print(f"policy: {policy.name}")
    for name in ENGINES:
        found = translate(policy, name)
        print(f"\n{found.title}: {' '.join(found.arguments) or found.config}")
        for sentence in found.lost:
            print(f"  lost: {sentence}")


if __name__ == "__main__":
    main()
