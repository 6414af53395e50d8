"""What ``kvbits evaluate`` measured is remembered, so that a start with the same dtype can say it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from kvbits.auto import store
from kvbits.auto.ladder import identity, is_reference
from kvbits.auto.loss import Loss
from kvbits.evaluation.laboratory import Laboratory


def remember(laboratory: Laboratory, text: str, tokens: Sequence[int], note: Callable[[str], None]) -> None:
    """Keep the KL of every dtype that ``laboratory`` ran on a text (name, token ids); ``note`` is told why not."""
    losses = []
    for policy in laboratory.policies:
        if policy.label in laboratory.kl and not is_reference(policy):
            kl, context = laboratory.kl[policy.label], laboratory.fidelity[policy.label].context
            found = (kl.mean, kl.low, kl.high, kl.items, context)
            losses.append(Loss(identity(policy), *found, text, laboratory.compute_dtype))
    if not losses:
        return
    conditions = {
        "evaluated": [loss.dtype for loss in losses],
        "tokens": losses[0].tokens,
        "context": losses[0].context,
        "text": hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest(),
        "arithmetic": laboratory.compute_dtype,
        "weights": laboratory.loaded.weights,
    }
    try:
        store.save(laboratory.loaded.fingerprint, laboratory.loaded.name, conditions, losses)
    except OSError as error:
        note(f"cannot keep what was measured ({error})")
