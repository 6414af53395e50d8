"""Bridge to lm-evaluation-harness: ``python -m kvbits.lm_eval --model kvbits --model_args pretrained=...``.

Importing this needs no lm-eval and registers nothing; :func:`register` makes the model known to a harness that runs in
this process.
"""

from kvbits.lm_eval.registration import NAME, register

__all__ = ["NAME", "register"]
