"""What ``kvbits evaluate`` and ``calibrate`` measured is remembered, so that a start with the same dtype can say it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

from kvbits.auto import store
from kvbits.auto.ladder import identity, is_reference
from kvbits.auto.loss import Loss
from kvbits.codecs import Policy
from kvbits.evaluation.bootstrap import Interval
from kvbits.evaluation.compare import Comparison
from kvbits.evaluation.findings import of_text
from kvbits.evaluation.laboratory import Laboratory
from kvbits.models import LoadedModel

Note = Callable[[str], None]


def remember(laboratory: Laboratory, text: str, tokens: Sequence[int], note: Note) -> None:
    """Keep the KL of every dtype that ``laboratory`` ran on a text (name, token ids); ``note`` is told why not."""
    found = [
        (policy, laboratory.kl[policy.label], laboratory.fidelity[policy.label].context)
        for policy in laboratory.policies
        if policy.label in laboratory.kl and not is_reference(policy)
    ]
    _keep(laboratory.loaded, found, text, tokens, laboratory.compute_dtype, note)


def remember_policy(loaded: LoadedModel, policy: Policy, checked: Comparison, text: str, note: Note) -> None:
    """Keep the KL that was measured (in float32) when ``policy`` was calibrated to a text; ``note`` is told why not."""
    kl, _ = of_text(checked.fidelity, checked.context - 1 - checked.context // 2)
    _keep(loaded, [(policy, kl, checked.context)], text, (), "float32", note)


def _keep(
    loaded: LoadedModel,
    found: Sequence[tuple[Policy, Interval, int]],
    text: str,
    tokens: Sequence[int],
    arithmetic: str,
    note: Note,
) -> None:
    losses = [
        Loss(identity(policy), kl.mean, kl.low, kl.high, kl.items, context, text, arithmetic)
        for policy, kl, context in found
    ]
    if not losses:
        return
    conditions = {
        "evaluated": [loss.dtype for loss in losses],
        "tokens": losses[0].tokens,
        "context": losses[0].context,
        "text": hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest(),
        "arithmetic": arithmetic,
        "weights": loaded.weights,
    }
    try:
        store.save(loaded.fingerprint, loaded.name, conditions, losses)
    except OSError as error:
        note(f"cannot keep what was measured ({error})")
