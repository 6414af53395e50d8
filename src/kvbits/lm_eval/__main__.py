"""``python -m kvbits.lm_eval ...``: lm-eval's own command line, which knows ``--model kvbits`` as well."""

from __future__ import annotations

import sys

from kvbits.errors import KVBitsError
from kvbits.lm_eval.registration import register


def main() -> int:
    """Run lm-eval's command; what is wrong with the model's arguments is one line and exit code 2."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except KVBitsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
